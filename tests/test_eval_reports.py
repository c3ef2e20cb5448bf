"""Reports: can one be used again, do two compare as they should, is a damaged one told, does the page show them?"""
import json

import numpy as np
import pytest

from data import train_tokenizer
from eval import metrics, page, report, run
from eval_common import *  # noqa: F403  (the model, the data, the command)


# ---- reports ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def reports(folder):
    """Two reports of the same random model; the second is told to train like the first."""
    paths = [folder / "a.json", folder / "b.json"]
    with pytest.MonkeyPatch.context() as patch:
        each_trains(patch, epochs=5)
        for path, extra in zip(paths, ([], ["--like", paths[0]])):
            done = command("run", "--model", folder / "model", "--data", folder / "eval", "--limit", 24, "--seeds", 2,
                           "--out", path, "--dtype", "float32", "--rates", "1e-3,1e-4", *extra)
            assert done.exit_code == 0, done.output
    return paths


def test_a_report_is_complete_and_its_scores_can_be_computed_again(reports, folder):
    value = report.load(reports[0])
    assert value["format"] == run.FORMAT and len(value["model"]["sha256"]) == 64
    assert set(value["data"]) == {"ner/atlas", "nli/atlas", "qa/atlas", "sts/atlas", "retrieval/atlas"}
    assert {"torch", "numpy", "python", "sentencepiece"} <= set(value["versions"])
    assert {c["task"] for c in value["cells"]} == {"ner", "nli", "qa", "sts", "sts-cosine", "retrieval"} <= set(run.SCORES)
    for cell in value["cells"]:
        assert cell["language"] in LANGUAGES and len(cell["digests"]) == 8 * cell["n"]
        assert np.array(cell["examples"]).shape == (len(cell["scores"]), cell["n"], len(cell["columns"]))
    for task in ("ner", "nli", "qa", "sts"):
        assert {c["language"] for c in value["cells"] if c["task"] == task} == set(LANGUAGES)
    for t in value["training"]:
        assert t["seeds"] == [0, 1] and t["steps"] == t["steps_wanted"] and t["lr"] in map(float, t["sweep"])
    layers = value["neutrality"]["retrieval/atlas"]["layers"]
    assert len(layers) == 3 and all(np.isfinite(list(layer.values())).all() for layer in layers)
    text = command("show", reports[0]).output
    for t in value["training"]:
        assert f"- {t['task']}: {t['data']}, {t['how']} ({t['examples']} examples, {t['steps']} steps of {t['batch']})" in text
    assert all(f"## {cell['task']}: {cell['metric']}" in text for cell in value["cells"])
    row = next(line for line in text.split("## qa")[1].splitlines() if line.startswith("| qa/atlas | ro"))
    cell = next(c for c in value["cells"] if (c["task"], c["language"]) == ("qa", "ro"))
    assert text.count(" exact match |") == 1 and text.count(" Pearson |") == 2
    assert row.endswith(f"| {np.mean([exact for seed in cell['examples'] for exact, _ in seed]):.3f} |")


def test_a_budget_cuts_and_says_so(folder):
    done = command("run", "--model", folder / "model", "--data", folder / "eval", "--tasks", "nli,sts", "--seeds", 3,
                   "--budget", "1s", "--out", folder / "c.json")
    assert done.exit_code == 0, done.output
    value = report.load(folder / "c.json")
    for t in value["training"]:
        assert t["steps"] < t["steps_wanted"] and len(t["seeds"]) == 1 and len(t["sweep"]) == 1
    assert all(f"{task} on {task}/atlas: cut to fit the budget" in done.output for task in ("nli", "sts"))
    shares = {t["task"]: t["share_of_test"] for t in value["training"]} | {"sts-cosine": value["settings"]["untrained_share"]}
    sizes = {"nli": 300, "sts": 200, "sts-cosine": 200}
    assert all(c["n"] == max(50, int(min(1, shares[c["task"]]) * sizes[c["task"]])) for c in value["cells"])
    assert shares["nli"] < 1 and value["seconds"] < 40


def test_the_same_plan_gives_the_same_scores(reports):
    """--like repeats steps, learning rates and seeds; the model is the same, so is every example's result."""
    a, b = map(report.load, reports)
    assert [c["examples"] for c in a["cells"]] == [c["examples"] for c in b["cells"]]


def test_like_a_report_of_before_splits_were_drawn_is_refused(reports, folder, tmp_path):
    value = json.loads(reports[0].read_text())
    assert value["settings"].pop("order") == "drawn"
    (tmp_path / "old.json").write_text(json.dumps(value))
    done = command("run", "--model", folder / "model", "--data", folder / "eval", "--like", tmp_path / "old.json", "--out", tmp_path / "x.json")
    assert done.exit_code == 2 and "before splits were drawn" in done.output and done.output.count("\n") == 1, done.output
    assert not (tmp_path / "x.json").exists()


def test_compare_prints_and_reads_what_is_there(reports, tmp_path):
    same = command("compare", *reports)
    assert same.exit_code == 0 and "**+0.00%**" in same.output and "Wilcoxon p = 1" in same.output
    value = json.loads(reports[0].read_text())
    for cell in value["cells"]:
        if cell["task"] == "nli":
            cell["examples"] = [[[1] for _ in seed] for seed in cell["examples"]]
            cell["scores"] = [1.0] * len(cell["scores"])
    (tmp_path / "better.json").write_text(json.dumps(value))
    done = command("compare", reports[0], tmp_path / "better.json")
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if line.startswith("| nli/atlas ro"))
    old = np.mean(next(c for c in json.loads(reports[0].read_text())["cells"]
                       if c["task"] == "nli" and c["language"] == "ro")["scores"])
    assert f"| {old:.3f} | 1.000 |" in row and f"{100 * (1 - old) / old:+.1f}%" in row
    assert "6 languages, better in 6: Wilcoxon p = 0.03125" in done.output


@pytest.mark.parametrize("spoil, words", [
    (lambda v: v.pop("settings"), "no 'settings'"),
    (lambda v: v["model"].pop("parameters"), "no 'parameters'"),
    (lambda v: v["training"].append({}), "no 'task'"),
    (lambda v: v["cells"][0].pop("digests"), "no 'digests'"),
    (lambda v: v["cells"][0].update(examples=[]), "examples of shape (0,)"),
    (lambda v: v["cells"][0].update(task="x"), "no 'x'"),
    (lambda v: v["cells"][0]["scores"].__setitem__(0, 0.5), "not the scores [0.5"),
    (lambda v: v.update(cells=3), "not iterable"),
    (lambda v: v.update(neutrality={"retrieval/x": {"layers": []}}), "no 'languages'"),
    (lambda v: v.update(neutrality={"retrieval/x": {"layers": [], "languages": ["en"], "prior": 1}}), "without layers"),
    (lambda v: v.update(neutrality={"retrieval/x": {"layers": [{}], "languages": ["en"], "prior": 1}}), "no 'linear'"),
    (lambda v: v["training"][0].pop("stopped"), "no 'stopped'"),
    (lambda v: v["training"][0].update(stopped=None), "stopped is None"),
    (lambda v: v["model"].update(parameters="many"), "parameters is 'many'"),
    (lambda v: v["neutrality"]["retrieval/atlas"]["layers"][0].update(cka="x"), "cka is 'x'"),
    (lambda v: v.update(notes=[5]), "a note that is no text"),
])
def test_damaged_reports_are_refused(reports, tmp_path, spoil, words):
    value = json.loads(reports[0].read_text())
    spoil(value)
    (tmp_path / "bad.json").write_text(json.dumps(value))
    for arguments in (["show"], ["compare", reports[0]], ["report", "--out", tmp_path / "page.html"]):
        done = command(*arguments, tmp_path / "bad.json")
        assert done.exit_code == 2 and "bad.json: damaged report: " in done.output and words in done.output, done.output
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"loss": 1}', '{"step": "x"}'])
def test_metrics_that_are_none(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    done = command("report", tmp_path, "--out", tmp_path / "page.html")
    assert done.exit_code == 2 and "not the metrics of a training run" in done.output
    assert not (tmp_path / "page.html").exists()


def test_a_diverged_run_is_drawn_as_far_as_it_goes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "mlm_loss": 2.0}\n{"step": 2, "loss": NaN, '
                                            '"mlm_loss": NaN}\n{"step": 3, "loss": Infinity, "mlm_loss": Infinity}\n')
    done = command("report", tmp_path, "--out", tmp_path / "new/folder/page.html")
    assert done.exit_code == 0, done.output
    assert "nan" not in (text := (tmp_path / "new/folder/page.html").read_text()).lower() and "Loss by part" in text


def test_bad_input_is_known_before_anything_is_computed(folder, tmp_path):
    """One line, exit code 2, no report."""
    (tmp_path / "file").write_text("x")
    for name, text in {"a/nli/x/en.train.tsv": "a\tb\tneutral\nc\td\tentailment\ne\tf\tcontradiction\n",
                       "b/retrieval/x/t.fra-eng.fra": "Un.\nDeux.\n", "b/retrieval/x/t.fra-eng.eng": "One.\nTwo.\n",
                       "c/nli/x/en.train.tsv": "a\tb\tneutral\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for data, names, out, words in ((tmp_path / "a", "nli", "o.json", "labels are entailment, not contradiction, neutral"),
                                    (tmp_path / "b", "retrieval,neutrality", "o.json", "6 sentences of a language"),
                                    (tmp_path / "c", "nli", "o.json", "1 training examples are too few"),
                                    (folder / "eval", "sts", "file/o.json", "not a folder that can be written to")):
        done = command("run", "--model", folder / "model", "--data", data, "--tasks", names, "--out", tmp_path / out)
        assert done.exit_code == 2 and words in done.output, done.output
        assert len([line for line in done.output.splitlines() if line.strip()]) - 2 * ("Usage" in done.output) == 1
    assert not (tmp_path / "o.json").exists()


def test_reports_of_different_lengths_compare_on_what_both_have(reports, tmp_path):
    value = json.loads(reports[0].read_text())
    for cell in value["cells"]:
        cell["examples"] = [seed[:20] for seed in cell["examples"]]
        cell["n"], cell["digests"] = 20, cell["digests"][:160]
        cell["scores"] = [float(run.SCORES[cell["task"]][2](*np.array(seed, float).T)) for seed in cell["examples"]]
    (tmp_path / "short.json").write_text(json.dumps(value))
    done = command("compare", reports[0], tmp_path / "short.json")
    assert "nli: nli/atlas: only the first 20 examples are in both: ar, en, fi, ro, ru, zh" in done.output and "**+0.00%**" in done.output
    assert "retrieval: retrieval/atlas: other examples" in done.output      # fewer candidates: another task


def test_the_spread_that_is_printed_is_that_of_paired_runs():
    rng = np.random.default_rng(0)
    tables = (rng.random((2, 6, 3, 20, 1)) < 0.6).astype(float)              # [system and baseline, language, seed, n, 1]
    cells = {"nli": {f"nli/x {code}": report.statistics.Cell(metrics.mean, *tables[:, i]) for i, code in enumerate(LANGUAGES)}}
    *_, last = report.verdict(cells, report.mean_scores(cells), [], 0)
    difference = (tables[0] - tables[1]).mean((2, 3)).T                      # [seed, language]
    _, sd_language, sd_seed, sd_run = report.statistics.effect_spread(difference)
    assert f"{sd_language:.3f} between cells, {sd_seed:.3f} between seeds, {sd_run:.3f} between seeds for all" in last


def test_percentages_are_of_baselines_that_every_seed_reaches():
    cell_of = lambda *scores: report.statistics.Cell(metrics.mean, np.ones((2, 1, 1)), np.array(scores).reshape(2, 1, 1))  # noqa: E731
    notes = []
    kept = report.with_percentage({"nli": {"nli/x de": cell_of(0.5, 0.2), "nli/x fr": cell_of(0.5, 0.05)},
                                   "qa": {"qa/x fr": cell_of(0.0, 0.0)}}, notes)
    assert {task: list(row) for task, row in kept.items()} == {"nli": ["nli/x de"]}
    assert [note.split(":")[0] for note in notes] == ["nli", "qa"] and "with any seed: x fr;" in notes[0]
    notes = []                                      # one cell of three would speak for its task
    kept = report.with_percentage({"nli": {"nli/x de": cell_of(0.5, 0.2), "nli/x fr": cell_of(0.5, 0.05), "nli/x ru": cell_of(0.5, 0.05)},
                                   "sts": {"sts/x de": cell_of(0.5, 0.2)}}, notes)
    assert list(kept) == ["sts"] and "only 1 of 3 cells" in notes[1] and len(notes) == 2


def test_trainings_that_differ_are_told():
    one = {"task": "nli", "data": "nli/x", "source": "en", "steps": 9, "batch": 32, "seeds": [0], "share_of_test": 1.0,
           "steps_done": [9], "stopped": ["steps"]}
    sides = [{"settings": {}, "data": {}, "training": [one]}, {"settings": {}, "data": {}, "training": [one | {"batch": 8}]}]
    assert report.settings_that_differ(sides[0], sides[0]) == []
    assert report.settings_that_differ(*sides) == ["nli on nli/x: batch 32 in the baseline, 8 in the candidate"]
    sides[1]["training"] = [one | {"steps_done": [4], "stopped": ["budget"]}]          # what --like of a run that a budget ended does
    assert report.settings_that_differ(*sides) == [
        "nli on nli/x: a budget ended runs early: [9] steps done in the baseline, [4] in the candidate"]


def test_a_task_whose_data_sets_have_other_numbers_of_seeds_is_compared_by_those_that_all_have():
    cells = [{"task": "ner", "data": f"ner/{data}", "language": code, "n": 30, "digests": "0" * 240, "scores": [0.5] * seeds,
              "examples": [[[1.0, 2.0, 1.0]] * 30] * seeds} for data, seeds in (("a", 3), ("b", 1)) for code in ("de", "fr")]
    found, notes = report.pairs(*[{"cells": cells}] * 2)
    assert {cell.system.shape for cell in found["ner"].values()} == {(1, 30, 3)}
    assert notes == ["ner: only the first 1 of 3 seeds, which all its data sets have"]


def test_a_language_is_one_difference_and_its_tasks_weigh_alike():
    """Whatever the number of data sets that have it."""
    scores = {"ner": {"ner/a swa": (0.4, 0.2), "ner/b sw": (0.6, 0.2), "ner/a de": (0.1, 0.2)}, "nli": {"nli/x sw": (0.6, 0.7)}}
    assert report.language_differences(scores) == pytest.approx([((0.2 + 0.4) / 2 - 0.1) / 2, -0.1])


def test_language_codes_become_one():
    assert [report.language_code(c) for c in ("swa", "swh", "sw", "cmn", "zh", "yue")] == ["sw"] * 3 + ["zh"] * 2 + ["yue"]


@pytest.mark.parametrize("spoil, said", [
    (lambda v: v.update(format="x"), "not a report"),
    (lambda v: v["cells"][0].update(scores=[0.123] * len(v["cells"][0]["scores"])), "damaged report"),
    (lambda v: v["cells"][0].pop("examples"), "damaged report"),
])
def test_a_spoilt_report_gets_one_line(reports, tmp_path, spoil, said):
    value = json.loads(reports[0].read_text())
    spoil(value)
    (tmp_path / "x.json").write_text(json.dumps(value))
    done = command("compare", reports[0], tmp_path / "x.json")
    assert done.exit_code == 2 and said in done.output and len(done.output.strip().splitlines()) == 1


def test_bad_input_gets_one_line(folder, tmp_path):
    def refused(*arguments):
        done = command("run", *arguments, "--out", tmp_path / "x.json")
        lines = done.output.strip().splitlines()
        assert done.exit_code == 2 and not (tmp_path / "x.json").exists(), done.output
        return lines[-1] if lines[0].startswith("Usage") else "".join(lines) if len(lines) == 1 else pytest.fail(done.output)
    model, data = folder / "model", folder / "eval"
    assert "no task ocr" in refused("--model", model, "--data", data, "--tasks", "nli,ocr")
    assert "not a model folder" in refused("--model", data, "--data", data)
    assert "no duration" in refused("--model", model, "--data", data, "--budget", "soon")
    assert "no duration" in refused("--model", model, "--data", data, "--budget", "0s")
    assert "no data for nli" in refused("--model", model, "--data", tmp_path, "--tasks", "nli")
    assert f"{data} has some" in refused("--model", model, "--data", folder, "--tasks", "nli")      # OUT of data.py atlas
    (tmp_path / "sts").mkdir()
    (tmp_path / "sts/sts-de-test.csv").write_text("a,b,1\nc,d,2\n")
    assert "names no source" in refused("--model", model, "--data", tmp_path, "--tasks", "sts")
    (tmp_path / "nli" / "x").mkdir(parents=True)
    (tmp_path / "nli" / "x" / "en.test.tsv").write_text("a\tb\t?\n")
    assert "hidden test set" in refused("--model", model, "--data", tmp_path, "--tasks", "nli")
    (tmp_path / "other").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "other" / name).write_bytes((model / name).read_bytes())
    (tmp_path / "other" / "tokenizer.model").write_bytes(train_tokenizer(["some text in one language"] * 9, 275))
    assert "tokenizer of another model" in refused("--model", tmp_path / "other", "--data", data)


def test_metric_of_each_task_is_the_one_named():
    assert run.SCORES["ner"][2] is metrics.f1_from_counts and run.SCORES["sts"][2] is metrics.spearman
    assert run.SCORES["qa"][2](np.array([1, 0]), np.array([1.0, 0.5])) == 0.75


# ---- the page -----------------------------------------------------------------------------------------------

def test_the_page_shows_runs_and_reports_and_needs_nothing_else(reports, tmp_path):
    curve = [{"step": s, "loss": 9 - s, "mlm_loss": 7.25 - s, "adv_loss": 1.5, "discriminator_accuracy": 0.5, "chance": 0.2,
              "tokens_per_second": 1e5, "grad_norm": 1.0} for s in (1, 2, 3)]
    look = {"step": 3, "validation": {"mlm_loss": 5.5, "tiers": {"most text": 5.0, "least text": 6.0},
                                      "languages": {"sw": 5.125, "zh": 5.875}}}
    (tmp_path / "run<1>").mkdir()
    (tmp_path / "run<1>/metrics.jsonl").write_text("\n".join(map(json.dumps, [*curve, look])) + "\n")
    done = command("report", tmp_path / "run<1>", reports[0], "--out", tmp_path / "page.html")
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.html").read_text()
    assert "run&lt;1&gt;" in text and "run<1>" not in text
    assert "<script" not in text and "http" not in text.replace("http-equiv", "") and " src=" not in text
    assert all(part in text for part in ("Han", "5.125", "5.875", "6.25", "nli/atlas: accuracy", "Language probes"))
    assert ">nan<" not in text and text.count("<svg") == text.count("</svg>") >= 15
    value = json.loads(reports[0].read_text())
    del value["neutrality"]["retrieval/atlas"]["map"]                      # as in the reports of examples/
    (tmp_path / "compact.json").write_text(json.dumps(value))
    done = command("report", tmp_path / "compact.json", "--out", tmp_path / "page.html")
    assert done.exit_code == 0 and "Language probes" in (text := (tmp_path / "page.html").read_text()), done.output
    assert "principal components" not in text
    (tmp_path / "empty").mkdir()
    done = command("report", tmp_path / "empty", "--out", tmp_path / "no.html")
    assert done.exit_code == 2 and "no metrics.jsonl" in done.output and not (tmp_path / "no.html").exists()


def test_the_interval_on_the_page_is_that_of_a_mean():
    hits = np.repeat([0.0, 1.0], 200)
    low, high = page.interval({"task": "nli", "examples": [[[h] for h in hits]]})
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.012) and high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.012)
