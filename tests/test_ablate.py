"""The ablation ladder: equal budgets, reports that `compare` reads alike, nothing done twice, clear refusals.

Most commands of the ladder run in this process: to import torch two dozen times would take most of the time.
"""
import importlib.util
import json
import shutil
import subprocess
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import atlas
import train
from data import prepare
from eval import ablate, neutrality, report, run
from eval.__main__ import main
from options import DISTILLATION, TrainConfig

LANGUAGES = ("en", "ro", "ru", "zh")
SIZES = {"preset": "tiny", "steps": 2, "teacher_steps": 2, "teacher_preset": "tiny", "tokens_per_batch": 1024, "max_length": 32,
         "eval_tokens": 1024, "device": "cpu", "dtype": "float32", "log_every": 1}
WEIGHTS = ("adv_weight", "kd_weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder/data: prepared text of four languages; folder/eval: their tasks; folder/config.json."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas, "languages", lambda: LANGUAGES)
        atlas.write(folder)
    prepare(folder / "text", folder / "data", vocab_size=1500, validation_share=0.05)
    (folder / "config.json").write_text(json.dumps(SIZES | {"data": f"{folder}/data", "eval_data": f"{folder}/eval"}))
    yield folder
    torch.set_num_threads(threads)


def run_here(command, stdout, **options):
    """subprocess.run of train.py or `python -m eval`, in this process."""
    result = (CliRunner().invoke(train.main, command[2:]) if command[1] == "train.py"
              else CliRunner().invoke(main, [*command[3:], "--jobs", "1"]))     # no further processes: they would import torch
    stdout.write(result.output)
    return types.SimpleNamespace(returncode=result.exit_code)


@pytest.fixture(scope="module")
def ladder(folder):
    """The ladder with two seeds -> (its folder, what was printed)."""
    real, calls = subprocess.run, []
    with pytest.MonkeyPatch.context() as patch:
        def first_for_real(command, **options):
            calls.append(command[1])
            return (real if len(calls) == 1 else run_here)(command, **options)
        patch.setattr(subprocess, "run", first_for_real)
        patch.setattr(ablate, "at_once", lambda device: 1)
        patch.setattr(neutrality, "STEPS", 10)      # half of the time of eight evaluations would be its probes
        result = command("--config", folder / "config.json", "--out", folder / "out", "--seeds", 2, "--limit", 8)
    assert result.exit_code == 0, result.output
    assert calls == ["train.py"] * (1 + 4 * 2) + ["-m"] * 4 * 2       # one teacher, four rungs, two seeds
    return folder / "out", result.output


def command(*arguments):
    return CliRunner().invoke(main, ["ablate", *map(str, arguments)])


@pytest.mark.parametrize("rung", ablate.RUNGS)
def test_a_rung_takes_out_all_that_its_objective_had(rung):
    """Options of distillation that go with a weight must leave with it: TrainConfig refuses them alone."""
    config = TrainConfig(**dict(kd_similarity_weight=1.0, kd_anchors=100, kd_neutral=4, kd_sentence_weight=1.0) | ablate.RUNGS[rung][1])
    assert (config.kd_similarity_weight, config.kd_anchors, config.kd_neutral) == ((1, 100, 4) if rung in ("distillation", "all") else (0, 0, 0))
    assert bool(config.adv_weight) == (rung in ("adversary", "all"))


def test_budgets_are_equal(ladder):
    """The runs of one seed differ in the weights of the losses alone, and start from the same weights."""
    out, _ = ladder
    for seed in (0, 1):
        settings = {rung: json.loads((out / rung / f"seed-{seed}" / "run.json").read_text()) for rung in ablate.RUNGS}
        assert {rung: tuple(s[w] > 0 for w in WEIGHTS) for rung, s in settings.items()} == {
            "mlm": (False, False), "adversary": (True, False), "distillation": (False, True), "all": (True, True)}
        assert len({json.dumps({k: v for k, v in s.items() if k not in DISTILLATION + WEIGHTS}, sort_keys=True)
                    for s in settings.values()}) == 1
        assert settings["mlm"]["seed"] == seed and settings["mlm"]["steps"] == 2
        first = [json.loads((out / rung / f"seed-{seed}" / "metrics.jsonl").read_text().split("\n")[0]) for rung in settings]
        assert len({(row["step"], row["tokens_seen"], row["mlm_loss"]) for row in first}) == 1
        last = {rung: json.loads((out / rung / f"seed-{seed}" / "metrics.jsonl").read_text().split("\n")[1]) for rung in settings}
        assert [rung for rung in last if "adv_loss" in last[rung]] == ["adversary", "all"]
        assert [rung for rung in last if "kd_loss" in last[rung]] == ["distillation", "all"]
    # Two steps of distillation did something; two of the adversary, which begins at lambda 0, need not.
    hashes = {rung: report.load(out / rung / "report.json")["model"]["sha256"] for rung in ablate.RUNGS}
    assert hashes["distillation"] != hashes["mlm"]


def test_every_model_is_fine_tuned_alike(ladder):
    out, _ = ladder
    reports = {rung: report.load(out / rung / "report.json") for rung in ablate.RUNGS}
    for value in reports.values():
        assert [len(c["scores"]) for c in value["cells"]] == [2] * len(value["cells"])
        assert all(t["seeds"] == [0, 1] for t in value["training"]) and len(value["training"]) == 4
    assert len({json.dumps([(t["task"], t["steps"], list(t["sweep"]), t["share_of_test"]) for t in value["training"]])
                for value in reports.values()}) == 1
    # The second seed takes the learning rate that the rung's first one chose.
    for rung, value in reports.items():
        again = json.loads((out / rung / "seed-1" / "report.json").read_text())
        assert [list(t["sweep"]) for t in again["training"]] == [[f"{t['lr']:g}"] for t in value["training"]]
        assert len(value["training"][0]["sweep"]) == len(run.RATES)


def test_the_table_is_what_compare_says(ladder):
    out, printed = ladder
    assert (out / "ablation.md").read_text().strip() in printed
    reports = {rung: report.load(out / rung / "report.json") for rung in ablate.RUNGS}
    for rung in ("adversary", "distillation", "all"):
        row = next(line for line in printed.split("\n## Against")[1].split("\n")
                   if line.startswith(f"| {ablate.RUNGS[rung][0]} |")).split(" | ")
        lines = "\n".join(report.compare(reports["mlm"], reports[rung]))
        fine_tuned = lines.split("## Fine-tuned tasks")[1].split("## Without")[0]
        assert f"**{row[1]}**" in fine_tuned and f"**{row[3]} points**" in fine_tuned
        assert f"95% interval for these tasks: {row[4]} points" in fine_tuned
        assert f"paired permutation p = {row[5]}" in fine_tuned
    # The scores: the mean over languages and seeds of what the report holds.
    scores = [np.mean(c["scores"]) for c in reports["all"]["cells"] if c["task"] == "sts"]
    line = next(line for line in printed.split("\n") if line.startswith("| all |"))
    assert f"{np.mean(scores):.3f}" in line
    english = [np.mean(c["scores"]) for c in reports["all"]["cells"] if c["task"] in run.HEADS and c["language"] == "en"]
    assert [f"({score:.3f})" in line for score in english] == [True] * 4


def test_nothing_is_done_twice(ladder, folder, monkeypatch):
    """Two reports are lost: these two models are evaluated again, at the same time, with the same result."""
    out, printed = ladder
    again = ("--config", folder / "config.json", "--out", out, "--seeds", 2, "--limit", 8)
    lost = [out / rung / "seed-1" / "report.json" for rung in ("mlm", "all")]
    before = [json.loads(path.read_text()) for path in lost]
    for path in lost:
        path.unlink()
    real, calls = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append(command) or real(command, **options))
    monkeypatch.setattr(ablate, "at_once", lambda device: 2)
    result = command(*again)
    assert result.exit_code == 0, result.output
    assert sorted(c[c.index("--model") + 1] for c in calls) == [str(p.parent / "final") for p in sorted(lost)]
    for path, then in zip(lost, before):
        for now, cell in zip(json.loads(path.read_text())["cells"], then["cells"], strict=True):
            assert now["digests"] == cell["digests"] and np.allclose(now["scores"], cell["scores"], atol=1e-3)
    assert "all, seed 1: fine-tuned" in result.output and "pretraining" not in result.output.split("# Ablation")[0]
    # Another ladder does not go into the same folder.
    result = command(*again[:-1], 9)
    assert result.exit_code == 2 and "another limit" in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize("budget, seconds, wanted", [
    (1000, 0.01, (300, 400, 3)),            # everything fits
    (1000, 0.15, (275, 367, 3)),            # fewer steps
    (1000, 0.30, (196, 262, 2)),            # no less than half of them, rather fewer seeds
    (100, 0.60, (17, 23, 1)),               # one seed and fewer steps still
])
def test_what_fits_the_budget(tmp_path, monkeypatch, budget, seconds, wanted):
    """A clock that stands still: all but the steps is free, so the pretraining has 55% of the budget."""
    monkeypatch.setattr(ablate.time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(ablate, "seconds_a_step", lambda folder: seconds)
    monkeypatch.setattr(ablate.Ladder, "train", lambda *arguments: None)
    asked = {"config": {"steps": 300, "teacher_steps": 400}, "tasks": [], "seeds": 3, "limit": None, "budget": budget}
    plan = ablate.Ladder(tmp_path, asked, print).plan()
    assert (plan["steps"], plan["teacher_steps"], plan["seeds"]) == wanted
    cost = seconds * (plan["teacher_steps"] + 4 * plan["seeds"] * plan["steps"])
    assert cost <= ablate.PRETRAINING * budget + seconds


@pytest.mark.parametrize("seconds, seeds", [(60, 3), (80, 2), (100, 1)])
def test_a_slow_machine_trains_fewer_seeds(tmp_path, monkeypatch, seconds, seeds):
    """No seed begins that would end after LATEST of the budget: four runs of it, each as long as those before."""
    now = [0.0]
    monkeypatch.setattr(ablate.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ablate.Ladder, "train", lambda *arguments: now.__setitem__(0, now[0] + seconds))
    ladder = ablate.Ladder(tmp_path, {"config": {}, "tasks": [], "seeds": 3, "limit": None, "budget": 1000}, print)
    ladder.state["plan"] = {"steps": 1, "teacher_steps": 0, "seeds": 3}
    ladder.pretrain()
    assert now[0] == 4 * seconds * seeds and ladder.state["plan"]["seeds"] == seeds
    assert [note.split(":")[0] for note in ladder.state["notes"]] == [f"{seeds} of 3 seeds"] * (seeds < 3)


@pytest.mark.parametrize("change, said", [
    ({"stepz": 3}, "no option 'stepz'"),
    ({"steps": "many"}, "steps is 'many'; it takes a int"),
    ({"steps": 0}, "--steps is 0"),
    ({"steps": True}, "steps is True"),
    ({"preset": "huge"}, "preset is 'huge'; choose from"),
    ({"data": "nowhere"}, "data: no folder nowhere"),
    ({"seed": 1}, "--seeds"),
    ({"kd_weight": 0}, "a distillation weight above 0"),
    ({"teacher_steps": 0}, "no teacher"),
    ({"teacher": "/"}, "--teacher: /"),
    ({"eval_data": None}, "eval_data is None"),
])
def test_bad_config(folder, tmp_path, change, said):
    """One line, exit code 2, and nothing written."""
    good = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(good | change))
    result = command("--config", tmp_path / "config.json", "--out", tmp_path / "out")
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1, result.output
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_none(tmp_path):
    for text in ("", "[1]", "{"):
        (tmp_path / "config.json").write_text(text)
        result = command("--config", tmp_path / "config.json", "--out", tmp_path / "out")
        assert result.exit_code == 2 and "config.json" in result.output and result.output.count("\n") == 1


@pytest.mark.parametrize("text, said", [
    ("{", "not JSON"), ("[]", "not what a ladder wrote"), ('{"asked": {}}', "not what a ladder wrote"),
    ('{"asked": {}, "plan": null, "notes": []}', "not what a ladder wrote"),
    ('{"asked": {"config": 1, "tasks": 1, "seeds": 1, "limit": 1, "budget": 1}, "plan": {"steps": 1}, "notes": []}', "not what a ladder"),
    ('{"asked": {"config": 1, "tasks": 1, "seeds": 1, "limit": 1, "budget": 1}, "plan": null, "notes": []}', "another config"),
])
def test_a_folder_with_another_ablation_json(folder, tmp_path, text, said):
    (tmp_path / "ablation.json").write_text(text)
    result = command("--config", folder / "config.json", "--out", tmp_path)
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1, result.output


def test_train_ablate_refuses_alike(tmp_path):
    result = CliRunner().invoke(train.main, ["--ablate", "--steps", "0", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--steps is 0" in result.output and not (tmp_path / "out").exists()


def test_a_run_that_fails_is_named(folder, tmp_path, monkeypatch):
    """train.py's last line, and where the rest is."""
    def run(command, stdout, **options):
        if "/adversary/" in " ".join(command):
            stdout.write("a warning\nno space left\n")
            return types.SimpleNamespace(returncode=1)
        return run_here(command, stdout, **options)
    monkeypatch.setattr(subprocess, "run", run)
    result = command("--config", folder / "config.json", "--out", tmp_path / "out", "--seeds", 1, "--limit", 4)
    assert result.exit_code == 2 and "train.log" in result.output and result.output.split("\n")[-2].endswith("no space left")


def test_the_page_of_the_example_is_what_its_reports_say(tmp_path, monkeypatch):
    """examples/results.py on the reports beside it, which have to stay readable. Its intervals are not looked at."""
    monkeypatch.setattr(report, "RESAMPLES", 100)
    path = ablate.REPOSITORY / "examples" / "results.py"
    results = importlib.util.module_from_spec(spec := importlib.util.spec_from_file_location("results", path))
    spec.loader.exec_module(results)
    sizes = dict.fromkeys(("layers", "in the layers", "embeddings", "pieces", "all"), 12) | {"MB": 4.0}
    facts = {"sizes": {"teacher": sizes, "student": sizes | {"layers": 3}}, "options": "", "machine": "", "date": "", "steps": 1,
             "speed": {"threads": 1, "rate": {"teacher": 10.0, "student": 25.0}, "ratio": 2.5}, "tokens": 1, "seconds": 60,
             "load": "", "text": "0" * 64, "long": {"steps": 8000, "tokens": 32_768_000, "seconds": 5880}}
    lines = list(results.page(path.parent / "reports", facts))
    assert any(line.startswith("| | teacher |") and line.endswith("| all | long |") for line in lines)
    assert any(line.startswith("**long** is") and "8,000 steps, 32.8 M tokens, 98 minutes" in line for line in lines)
    assert "| layers | 12 | 3 | 25.0% |" in lines and "| sentences/s, 1 thread(s) | 10 | 25 | 2.50 x |" in lines
    means = {name: np.mean([c["scores"][0] for c in report.load(path.parent / "reports" / f"{name}.json")["cells"]
                            if c["task"] == "retrieval"]) for name in ("teacher", "all", "long")}
    row = next(line for line in lines if line.startswith("| retrieval ("))
    assert f"| {means['teacher']:.3f} |" in row
    assert row.endswith("".join(f" {means[name]:.3f} ({means[name] / means['teacher']:.0%}) |" for name in ("all", "long")))
    for name in ("teacher", *results.NAMES):           # without --long there is no fifth student and no word of one
        shutil.copy(path.parent / "reports" / f"{name}.json", tmp_path)
    del facts["long"]
    lines = list(results.page(tmp_path, facts))
    assert any(line.startswith("| | teacher |") and line.endswith("| all |") for line in lines)
    assert not any(line.startswith("**long**") for line in lines)
    value = report.load(path.parent / "reports" / "all.json")
    short = results.compact(value, most=20)
    assert all(c["n"] == len(c["digests"]) // 8 == len(c["examples"][0]) for c in short["cells"])
    assert all((c["n"] <= 20) == (c["task"] in ("retrieval", "sts-cosine")) for c in short["cells"])
