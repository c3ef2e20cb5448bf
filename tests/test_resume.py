"""Training cannot lose work: killed at any moment, damaged checkpoints, signals, a full disk.

The crash harness kills -9 a real training process at random moments, resumes it until it is done, and compares
the final weights bit for bit with an undisturbed run.
"""
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import train
from checkpoint import Checkpoints
from data import prepare
from files import read_safetensors
from launch import UserError

REPO = pathlib.Path(train.__file__).parent
OPTIONS = ("--preset", "tiny", "--steps", "40", "--tokens-per-batch", "1024", "--max-length", "32", "--device", "cpu",
           "--eval-tokens", "1024", "--eval-every", "8", "--log-every", "1", "--save-every", "4", "--adv-weight", "0.1", "--kd-weight", "0",
           "--dtype", "float32", "--optimizer", "muon")
KILLS = 25


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    import atlas
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text").mkdir()
    texts = atlas.corpus()
    for code in ("en", "ru"):
        (folder / "text" / f"{code}.txt").write_text("\n\n".join(texts[code]))
    prepare(folder / "text", folder / "data", vocab_size=1000, validation_share=0.05)
    return folder / "data"


def start(data, out, *more, options=OPTIONS):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, "train.py", "--data", str(data), "--out", str(out), *options, *more], cwd=REPO,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process, code=0):
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == code, printed
    return printed


def steps_logged(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [r["step"] for r in records if "loss" in r]


def steps_validated(out):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [r["step"] for r in records if "validation" in r]


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(data, out))
    return out


def same_weights(a, b):
    a, b = (read_safetensors(folder / "final" / "model.safetensors") for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_killed_at_random_moments_ends_with_the_same_bits(data, undisturbed, tmp_path):
    """kill -9, 25 times, in the middle of steps and of saving: no step twice, none skipped, the same final weights.

    To kill more often than once a start-up, the process is a small one that forks a fresh trainer for each life.
    """
    seed = random.randrange(10 ** 6)
    print(f"seed {seed}")
    out = tmp_path / "run"
    harness = subprocess.run([sys.executable, str(REPO / "tests" / "kill_harness.py"), str(seed), str(KILLS), str(out), "--data",
                              str(data), *OPTIONS], cwd=REPO, capture_output=True, text=True, timeout=400,
                             env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert harness.returncode == 0, harness.stdout[-3000:] + harness.stderr[-3000:]
    print(harness.stdout.splitlines()[-1])
    assert int(re.fullmatch(r"\d+ lives, (\d+) kills", harness.stdout.splitlines()[-1])[1]) >= 0.8 * KILLS
    assert steps_logged(out) == list(range(1, 41)) and steps_validated(out) == [8, 16, 24, 32, 40]
    assert same_weights(out, undisturbed)


def test_sigterm_saves_and_says_how_to_go_on(data, undisturbed, tmp_path):
    process = start(data, tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed = finish(process)
    assert "--resume" in printed and f"--out {tmp_path / 'run'}" in printed
    assert not (tmp_path / "run" / "final").exists()
    finish(start(data, tmp_path / "run", "--resume"))
    assert steps_logged(tmp_path / "run") == list(range(1, 41)) and same_weights(tmp_path / "run", undisturbed)


def test_more_steps_with_extend(data, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    options = tuple("44" if o == "40" else o for o in OPTIONS)
    refused = finish(start(data, tmp_path / "run", "--resume", options=options), code=2)
    assert "--extend" in refused and "--steps (was 40, now 44)" in refused
    printed = finish(start(data, tmp_path / "run", "--resume", "--extend", options=options))
    assert steps_logged(tmp_path / "run") == list(range(1, 45))
    # The speed is that of the steps that were made now, not of all there were.
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    fastest = max(row["tokens_per_second"] for row in rows if "tokens_per_second" in row and row["step"] > 40)
    assert int(re.search(r"tokens, ([\d,]+) tokens/s", printed)[1].replace(",", "")) <= 1.1 * fastest


# ------------------------------------------------------------------------------------------ one checkpoint

def state(step):
    torch.manual_seed(step)
    return dict(weights={"a": torch.randn(1000), "b": torch.randn(10, 10)}, step=step, groups=[{"lr": 0.1}])


@pytest.fixture
def three(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, keep=3, warn=said.append)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    assert not said and (tmp_path / "latest").read_text() == "step-00000003"
    return checkpoints, said


def test_newest_whole_checkpoint_is_found(three):
    checkpoints, said = three
    step, found = checkpoints.load_newest()
    assert step == 3 and torch.equal(found["weights"]["a"], state(3)["weights"]["a"]) and found["groups"] == [{"lr": 0.1}]


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing"])
def test_damage_anywhere_is_noticed_and_the_one_before_used(three, name, damage):
    checkpoints, said = three
    path = checkpoints.path(3) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        for place in random.Random(0).sample(range(len(content)), 3):
            content[place] ^= 0x11
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-7])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    step, found = checkpoints.load_newest()
    assert step == 2 and torch.equal(found["weights"]["b"], state(2)["weights"]["b"])
    assert len(said) == 1 and "step-00000003 is passed over" in said[0]


def test_none_that_can_be_read_is_not_none_at_all(three, tmp_path):
    checkpoints, said = three
    for step in (1, 2, 3):
        (checkpoints.path(step) / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints"):
        checkpoints.load_newest()
    assert len(said) == 3 and Checkpoints(tmp_path / "new").load_newest() is None


def test_code_in_a_checkpoint_does_not_run(three, tmp_path):
    """A pickle that would run a command, with a manifest that fits it, is passed over."""
    import hashlib
    checkpoints, said = three

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save(Evil(), checkpoints.path(3) / "state.pt")
    content = (checkpoints.path(3) / "state.pt").read_bytes()
    (checkpoints.path(3) / "manifest.json").write_text(json.dumps(
        dict(step=3, size=len(content), sha256=hashlib.sha256(content).hexdigest())))
    assert checkpoints.load_newest()[0] == 2 and not (tmp_path / "ran").exists() and said


def test_last_few_and_every_mth_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [4, 8, 9, 10]


def test_damaged_ones_do_not_push_out_whole_ones(tmp_path):
    """Both of the newest are damaged, so the run goes on from an older one: what it then saves must stay."""
    checkpoints = Checkpoints(tmp_path, keep=2, warn=lambda text: None)
    for step in (4, 12, 16):
        checkpoints.keep = 3
        checkpoints.save(step, state(step))
    checkpoints.wait()
    for step in (12, 16):
        (checkpoints.path(step) / "state.pt").write_bytes(b"")
    checkpoints.keep = 1
    assert checkpoints.load_newest()[0] == 4
    checkpoints.save(8, state(8))
    checkpoints.wait()
    assert checkpoints.load_newest()[0] == 8


def test_a_full_disk_is_a_warning_and_the_old_checkpoint_stays(three, monkeypatch):
    checkpoints, said = three

    def full(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    checkpoints.save(4, state(4))
    checkpoints.wait()
    assert len(said) == 1 and "No space left" in said[0] and "intact" in said[0]
    assert checkpoints.steps() == [1, 2, 3] and not list(checkpoints.folder.glob(".*tmp"))
    assert checkpoints.load_newest()[0] == 3


def test_saving_does_not_see_later_changes(tmp_path):
    checkpoints, tensor = Checkpoints(tmp_path), torch.zeros(10)
    checkpoints.save(1, dict(t=tensor))
    tensor += 1
    checkpoints.wait()
    assert torch.equal(checkpoints.load_newest()[1]["t"], torch.zeros(10))
