"""train.py --tensorboard: the numbers of metrics.jsonl as event files, or one line where that is not possible."""
import json
import resource
import sys

import pytest
from click.testing import CliRunner

import atlas
import train
from data import prepare
from events import Events, Log, scalars


def test_scalars():
    record = {"step": 3, "loss": 0.5, "validation": {"mlm_loss": 2, "languages": {"ro": 1.5}}, "note": "text", "none": None}
    assert dict(scalars(record)) == {"step": 3, "loss": 0.5, "validation/mlm_loss": 2, "validation/languages/ro": 1.5}


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path, capsys):
    """In the middle of a line: half of it would spoil the next one, after somebody made room."""
    log = Log(tmp_path, train.TrainConfig(), 1)
    record = lambda step: {"step": step, "validation": {"mlm_loss": 2.0}}  # noqa: E731
    log(record(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 10, limits[1]))
    try:
        log(record(2))
        log(record(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log(record(4))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 4]
    printed = capsys.readouterr()
    assert printed.out.count("validation") == 4 and printed.err.count("warning: the log") == 1


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = CliRunner().invoke(train.main, ["--tensorboard", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert result.output.count("\n") == 1 and "tensorboard is not installed" in result.output


def read(folder):
    """{name: {step: value}} of the event files in a folder, as TensorBoard shows them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="waits for tensorboard")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_events_say_what_the_metrics_say(tmp_path):
    pytest.importorskip("tensorboard", reason="waits for tensorboard")
    texts = atlas.corpus()
    (tmp_path / "text").mkdir()
    for code in ("en", "ro"):
        (tmp_path / f"text/{code}.txt").write_text("\n\n".join(texts[code]))
    prepare(tmp_path / "text", tmp_path / "data", vocab_size=1000, validation_share=0.05)
    options = ["--data", str(tmp_path / "data"), "--preset", "tiny", "--teacher-preset", "tiny", "--steps", "6", "--teacher-steps", "2", "--tokens-per-batch", "1024", "--max-length", "32",
               "--log-every", "2", "--eval-every", "4", "--eval-tokens", "512", "--device", "cpu", "--tensorboard"]
    result = CliRunner().invoke(train.main, [*options, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    for folder in (tmp_path / "run", tmp_path / "run/teacher"):
        expected = {}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            for name, value in scalars(record):
                expected.setdefault(name, {})[record["step"]] = pytest.approx(value, rel=1e-5, abs=1e-5)
        del expected["step"]
        assert read(folder) == expected and "mlm_loss" in expected


def test_steps_that_are_done_again_are_shown_once(tmp_path):
    pytest.importorskip("tensorboard", reason="waits for tensorboard")
    before = Events(tmp_path, 1)
    for step in (1, 2, 3, 4):
        before.add({"step": step, "loss": 10.0 + step})
    before.writer.close()
    after = Events(tmp_path, 3)                                        # resumed from a checkpoint of step 2
    after.add({"step": 3, "loss": 23.0})
    after.writer.close()
    assert read(tmp_path) == {"loss": {1: 11.0, 2: 12.0, 3: 23.0}}
