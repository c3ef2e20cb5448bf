"""Several processes on the CPU (gloo): the same global batches, the same curve, and a clean end when one dies."""
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import train
from data import prepare
from launch import STOPPED, launch

REPO = pathlib.Path(train.__file__).parent
OPTIONS = ("--preset", "tiny", "--steps", "8", "--tokens-per-batch", "4096", "--micro-batch-tokens", "2048", "--max-length", "32",
           "--device", "cpu", "--eval-tokens", "1024", "--log-every", "1", "--adv-weight", "0.3", "--teacher-preset", "tiny",
           "--teacher-steps", "2", "--dtype", "float32", "--save-every", "1000",
           # Muon orthogonalises in bfloat16, which turns another order of sums into differences of 1e-4 in a dozen steps.
           "--optimizer", "adamw", "--lr", "1e-3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import atlas
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "text").mkdir()
    texts = atlas.corpus()
    for code in ("en", "ar", "ru"):
        (folder / "text" / f"{code}.txt").write_text("\n\n".join(texts[code]))
    prepare(folder / "text", folder / "data", vocab_size=1000, validation_share=0.05)
    return folder / "data"


def start(data, out, *more):
    return subprocess.Popen([sys.executable, "train.py", "--data", str(data), "--out", str(out), *OPTIONS, *more], cwd=REPO,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=dict(os.environ, OMP_NUM_THREADS="1"))


def curve(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    process = start(data, out)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    return curve(out)


@pytest.mark.parametrize("processes,micro", [(2, 1024), (4, 2048)])      # two micro-batches a process, and one
def test_the_curve_does_not_depend_on_the_number_of_processes(data, one, tmp_path, processes, micro):
    process = start(data, tmp_path / "run", "--nproc", str(processes), "--micro-batch-tokens", str(micro))
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert printed.count("step      8/8") == 1  # one rank speaks
    many, largest = curve(tmp_path / "run"), 0.0
    assert len(many) == len(one)
    for a, b in zip(one, many):
        if "loss" in a:
            assert a["tokens_seen"] == b["tokens_seen"] and a["chance"] == b["chance"]
            for k in ("loss", "mlm_loss", "kd_loss", "adv_loss"):  # the log is rounded to 1e-6
                largest = max(largest, max(0.0, abs(a[k] - b[k]) - 1e-6) / a[k])
        else:
            assert a["validation"]["mlm_loss"] == pytest.approx(b["validation"]["mlm_loss"], rel=1e-4)
    print(f"{processes} processes: largest relative difference of a loss {largest:.1e}")
    assert largest < 1e-4


def test_gradients_may_travel_in_16_bits(data, one, tmp_path):
    process = start(data, tmp_path / "run", "--nproc", "2", "--reduce-dtype", "bfloat16")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    apart = [abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(one, curve(tmp_path / "run")) if "loss" in a]
    assert 0 < max(apart) < 0.02, apart  # rounded, and no worse


def test_distillation_alone_in_two_processes(data, tmp_path):
    """No loss reaches the student's MLM head. Its teacher is trained all the same, by MLM."""
    process = start(data, tmp_path / "run", "--nproc", "2", "--micro-batch-tokens", "1024", "--steps", "6", "--mlm-weight", "0",
                    "--adv-weight", "0", "--kd-weight", "0", "--kd-sentence-weight", "1")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert curve(tmp_path / "run" / "teacher")[0]["loss"] > 4
    losses = [r["sentence_loss"] for r in curve(tmp_path / "run") if "loss" in r]
    assert losses[-1] < 0.7 * losses[0], losses


def ranks_of(process):
    """Process ids of the trainers that torchrun started."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "train.py" in line]


def wait_for_steps(process, out, n):
    deadline = time.time() + 120
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < n:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.1)


def test_a_dead_rank_ends_all_within_a_minute(data, tmp_path):
    out = tmp_path / "run"
    process = start(data, out, "--nproc", "2", "--steps", "100000", "--kd-weight", "0")
    wait_for_steps(process, out, 3)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    since = time.time()
    printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0 and time.time() - since < 60
    assert "SIGKILL" in printed or "Signal 9" in printed or "-9" in printed


SLOW = """
import os, pathlib, signal, sys, time
from launch import tell_stopped
def stop(number, frame):
    time.sleep(float(sys.argv[2]))  # the step, and the checkpoint
    tell_stopped()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(100)
"""


@pytest.mark.parametrize("needed, code", [(0.1, 0), (30, 1)])
def test_a_stop_that_was_cut_off_is_none(tmp_path, needed, code):
    """The launcher's patience is here two seconds: one process stops within them, the other is killed before it has saved."""
    (tmp_path / "slow.py").write_text(SLOW)
    program, folder = str(tmp_path / "slow.py"), str(tmp_path)
    call = f"from launch import launch; import sys; sys.exit(launch({program!r}, 1, [{folder!r}, '{needed}']))"
    process = subprocess.Popen([sys.executable, "-c", call], cwd=REPO, stderr=subprocess.PIPE, text=True, env=dict(
        os.environ, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2", PYTHONPATH=str(REPO)))
    while not (tmp_path / "0").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code and said.count("nothing was saved") == code, said


ALONE = """
import os, sys, time
from launch import end_of_rank
try:
    if os.environ["RANK"] == "1":
        raise ValueError("this batch is mine alone")
    time.sleep(60)
except ValueError as error:
    end_of_rank(error)
"""


def test_a_rank_that_fails_alone_says_so(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE)
    call = f"from launch import launch; import sys; sys.exit(launch({str(tmp_path / 'alone.py')!r}, 2, []))"
    done = subprocess.run([sys.executable, "-c", call], cwd=REPO, capture_output=True, text=True, timeout=60,
                          env=dict(os.environ, PYTHONPATH=str(REPO), TMPDIR=str(tmp_path)))
    assert done.returncode == 2 and done.stderr.count("Error: rank 1: this batch is mine alone") == 1, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["alone.py"]          # no log folder of torch's is left


def test_a_step_and_its_checkpoint_may_take_an_hour(monkeypatch):
    for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "OMP_NUM_THREADS", STOPPED):  # so that what launch sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    configs = []
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch",
                        lambda config, program: configs.append(config) or (lambda *arguments: None))
    assert launch("train.py", 2, []) == 0 and configs[0].shutdown_timeout == 3600


def test_a_bad_option_is_said_once_by_all_ranks(data, tmp_path):
    process = start(data, tmp_path / "run", "--nproc", "3")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "cannot share evenly" in printed, printed
    assert printed.count("cannot share evenly") == 1 and "Traceback" not in printed, printed


def test_sigint_stops_all_and_another_number_of_processes_goes_on(data, tmp_path):
    """Stopped with 2 processes, resumed with 1: the same batches as without the stop."""
    out = tmp_path / "run"
    long = ("--steps", "24", "--kd-weight", "0", "--tokens-per-batch", "2048")
    process = start(data, out, "--nproc", "2", *long)
    wait_for_steps(process, out, 4)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    printed = process.communicate(timeout=120)[0]
    assert "--resume" in printed and process.returncode == 0, printed
    stopped = max(r["step"] for r in curve(out))
    assert stopped < 24
    process = start(data, out, "--resume")
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and "--steps (was 24, now 8)" in printed  # OPTIONS differ
    process = subprocess.Popen([sys.executable, "train.py", "--out", str(out), "--resume"], cwd=REPO, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    assert [r["step"] for r in curve(out) if "loss" in r] == list(range(1, 25))
