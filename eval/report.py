"""Reports to read: one model's scores, and two models compared.

    load(path)                         a report of run.py, checked
    table(report)                      scores by task and language, as lines of Markdown
    compare(baseline, candidate)       relative improvement, interval and tests, as lines of Markdown
"""
import dataclasses

import numpy as np

from eval import neutrality, statistics, tasks
from eval.run import ALSO, FORMAT, HEADS, SCORES
from eval.tasks import language_code

# The paper's four; others (untrained) are compared too, but stay out of its number.
FINE_TUNED = tuple(HEADS)
SMALLEST = 0.1            # of a baseline score that a percentage is made of
RESAMPLES = 2000
TRAINED = {"source": "the source language (others are zero-shot)", "target": "each language by itself",
           "all": "all languages with training data"}


def load(path):
    """The report in a file. Raises ValueError with the file for anything else, for one that lacks a part or has
    another kind of value there, and for cells that do not give the score that is written beside them."""
    value = tasks.read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"{path}: not a report of `python -m eval run` ({FORMAT})")
    try:
        for cell in value["cells"]:
            score, examples = SCORES[cell["task"]][2], np.array(cell["examples"], dtype=np.float64)
            where = f"{cell['data']} {cell['language']}"
            if examples.shape != (len(cell["scores"]), cell["n"], len(SCORES[cell["task"]][1])):
                raise ValueError(f"{where}: examples of shape {examples.shape}")
            if len(cell["digests"]) != 8 * cell["n"] or cell["metric"] != SCORES[cell["task"]][0]:
                raise ValueError(f"{where}: other digests or another metric")
            again = [float(score(*seed.T)) for seed in examples]
            if not np.allclose(again, cell["scores"], atol=1e-9):
                raise ValueError(f"{where}: its examples give {again}, not the scores {cell['scores']}")
        number = (int, float)
        measured = value.get("neutrality", {}).values()
        needed = [(value, {"data": dict, "notes": list, "seconds": number}),
                  (value["model"], {"path": str, "parameters": number, "sha256": str}),
                  (value["settings"], dict.fromkeys(("dtype", "device"), str)),
                  *((cell, dict.fromkeys(("data", "language"), str)) for cell in value["cells"]),
                  *((t, dict.fromkeys(("task", "data", "source", "how"), str)
                     | dict.fromkeys(("examples", "dev_examples", "steps", "batch", "share_of_test"), number)
                     | {"steps_done": list, "stopped": list, "seeds": list, "sweep": dict}) for t in value["training"]),
                  *((found, {"layers": list, "languages": list, "prior": number}) for found in measured),
                  *((layer, dict.fromkeys((*neutrality.MEASURES, "between_chance", *layer), number))
                    for found in measured for layer in found["layers"])]
        for part, kinds in needed:
            for key, kind in kinds.items():
                if not isinstance(part[key], kind):
                    raise ValueError(f"{key} is {part[key]!r:.60}")
        if not all(isinstance(note, str) for note in value["notes"]):
            raise ValueError("a note that is no text")
        TRAINED[value["settings"].get("train_on", "source")]                          # noqa: B018
        if not all(found["layers"] for found in value.get("neutrality", {}).values()):
            raise ValueError("a neutrality without layers")
    except KeyError as error:
        raise ValueError(f"{path}: damaged report: no {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged report: {error}") from None
    return value


# ---- one model ----------------------------------------------------------------------------------------------

def table(report):
    """Lines of Markdown: what was run, then a table a task, then what was left out."""
    model = report["model"]
    yield f"# {model['path']}"
    yield ""
    yield (f"{model['parameters'] / 1e6:.1f} M parameters, sha256 {model['sha256'][:12]}; {report['settings']['dtype']} "
           f"on {report['settings']['device']}; {report['seconds']:.0f} s")
    if report["training"]:
        yield f"Fine-tuned on {TRAINED[report['settings'].get('train_on', 'source')]}:"
        yield ""
        yield from trainings(report)
    for task in dict.fromkeys(cell["task"] for cell in report["cells"]):
        cells = [cell for cell in report["cells"] if cell["task"] == task]
        also = ALSO.get(task, ())
        header = ["data", "language", "examples", "seeds", "mean", "spread", *(name for name, _ in also)]
        yield from ("", f"## {task}: {cells[0]['metric']}", "", f"| {' | '.join(header)} |",
                    "|---|---|" + "---:|" * (len(header) - 2))
        for cell in cells:
            scores = cell["scores"]
            spread = f"{np.std(scores, ddof=1):.3f}" if len(scores) > 1 else ""
            tables = [np.array(table, float).T for table in cell["examples"]]
            more = "".join(f" {np.mean([score(*columns) for columns in tables]):.3f} |" for _, score in also)
            yield (f"| {cell['data']} | {cell['language']} | {cell['n']} | {len(scores)} | {np.mean(scores):.3f} | "
                   f"{spread} |{more}")
        yield (f"| mean | {len(cells)} cells | | | {np.mean([np.mean(cell['scores']) for cell in cells]):.3f} | |"
               + " |" * len(also))
    for name, found in report.get("neutrality", {}).items():
        keys = list(found["layers"][0])
        yield from ("", f"## neutrality: {name}, {len(found['languages'])} languages, prior {found['prior']:.3f}", "",
                    "| layer | " + " | ".join(keys) + " |", "|---|" + "---:|" * len(keys))
        for i, layer in enumerate(found["layers"]):
            yield f"| {i} | " + " | ".join(f"{layer[key]:.3f}" for key in keys) + " |"
    yield from listed(report["notes"])


def trainings(report):
    """What was fine-tuned on what, a line each."""
    for t in report["training"]:
        yield f"- {t['task']}: {t['data']}, {t['how']} ({t['examples']:,} examples, {t['steps']:,} steps of {t['batch']})"


def listed(notes):
    """Notes on what the numbers do not cover, cuts and omissions, as a list."""
    if notes:
        yield from ("", "Notes:", "")
        yield from (f"- {note}" for note in notes)


# ---- two models ---------------------------------------------------------------------------------------------

def pairs(baseline, candidate):
    """{task: {"data language": statistics.Cell}} of the cells with the same examples in both; and notes."""
    ours = {(c["task"], c["data"], c["language"]): c for c in candidate["cells"]}
    found, cut = {}, {}       # cut: (task, data, what) -> languages
    alone = len(ours) + len(baseline["cells"])           # cells that only one report has
    for b in baseline["cells"]:
        name = (b["task"], b["data"], b["language"])
        c = ours.get(name)
        if c is None:
            continue
        alone -= 2
        # A budget or a limit may have cut one side: the first examples are then the same.
        n = min(b["n"], c["n"])
        whole = b["task"] == "retrieval"                 # there the number of candidates is part of the task
        if b["digests"][:8 * n] != c["digests"][:8 * n] or whole and b["n"] != c["n"]:
            cut.setdefault((*name[:2], "other examples in the two reports; left out"), []).append(b["language"])
            continue
        if b["n"] != c["n"]:
            cut.setdefault((*name[:2], f"only the first {n} examples are in both"), []).append(b["language"])
        seeds = min(len(b["examples"]), len(c["examples"]))
        tables = [np.array(side["examples"][:seeds], dtype=np.float64)[:, :n] for side in (c, b)]
        # Languages with equally many examples may have the same ones, translated: taken as such. Others lose nothing by it.
        found.setdefault(b["task"], {})[f"{b['data']} {b['language']}"] = statistics.Cell(
            SCORES[b["task"]][2], *tables, parallel=b["data"])
    notes = [f"{task}: {data}: {what}: {', '.join(codes)}" for (task, data, what), codes in cut.items()]
    for task, row in found.items():                      # a budget may have cut one of a task's data sets to fewer
        seeds = {len(cell.system) for cell in row.values()}
        if len(seeds) > 1:
            notes.append(f"{task}: only the first {min(seeds)} of {max(seeds)} seeds, which all its data sets have")
            found[task] = {name: dataclasses.replace(cell, system=cell.system[:min(seeds)], baseline=cell.baseline[:min(seeds)])
                           for name, cell in row.items()}
    if alone:
        notes.append(f"{alone} cells that only one report has; left out")
    return found, notes


def compare(baseline, candidate, seed=0):
    """Two reports -> lines of Markdown. Raises ValueError if they share no cell."""
    cells, notes = pairs(baseline, candidate)
    if not cells:
        raise ValueError("the two reports share no cell: other tasks, data or examples")
    notes += settings_that_differ(baseline, candidate)
    scores = mean_scores(cells)
    yield f"# {candidate['model']['path']} against {baseline['model']['path']}"
    for task, row in scores.items():
        yield from ("", f"## {task}: {SCORES[task][0]}", "",
                    "| data and language | baseline | candidate | difference | relative |", "|---|---:|---:|---:|---:|")
        for name, (new, old) in row.items():
            percent = f"{100 * (new - old) / old:+.1f}%" if old >= SMALLEST else "-"
            yield f"| {name} | {old:.3f} | {new:.3f} | {new - old:+.3f} | {percent} |"
    yield from verdicts(cells, scores, notes, seed)                   # which may add notes
    yield from listed(notes)


def mean_scores(cells):
    """{task: {name: Cell}} -> {task: {name: (candidate, baseline)}}, means over seeds."""
    return {task: {name: tuple(float(np.mean([c.score(*table.T) for table in tables])) for tables in (c.system, c.baseline))
                   for name, c in row.items()} for task, row in cells.items()}


def with_percentage(cells, notes):
    """The cells whose baseline is large enough, with every seed, to be 100%; notes name the others.

    A task that keeps less than half of its cells is left out: the mean over tasks would hang on what a few of them do.
    """
    kept = {task: {name: c for name, c in row.items() if min(c.score(*table.T) for table in c.baseline) >= SMALLEST}
            for task, row in cells.items()}
    for task, row in kept.items():
        if len(row) < len(cells[task]):
            named = ", ".join(name.removeprefix(f"{task}/") for name in cells[task] if name not in row)
            notes.append(f"{task}: no percentage of a baseline below {SMALLEST} with any seed: {named}; these cells count "
                         "in the differences only")
        if 0 < 2 * len(row) < len(cells[task]):
            notes.append(f"{task}: only {len(row)} of {len(cells[task])} cells have a percentage: the task counts in the "
                         "differences only")
    return {task: row for task, row in kept.items() if 2 * len(row) >= len(cells[task])}


def improvement(cells, scores):
    """statistics.Improvement over the names in `cells`."""
    return statistics.relative_improvement(*({t: {n: scores[t][n][side] for n in row} for t, row in cells.items()}
                                             for side in (0, 1)))


def interval(cells, relative, levels=("language", "example", "seed"), seed=0):
    """The 95% bootstrap interval that is printed: without the level "task", about these tasks."""
    return statistics.bootstrap(cells, RESAMPLES, seed=seed, relative=relative, levels=levels)


def language_differences(scores):
    """candidate - baseline, one mean a language: over its tasks, a task being the mean over its data sets -> [float]."""
    found = {}                # language -> task -> differences
    for task, row in scores.items():
        for name, (new, old) in row.items():
            found.setdefault(language_code(name.rpartition(" ")[2]), {}).setdefault(task, []).append(new - old)
    # Rounded, so that equal means of other numbers are no difference to the tests.
    return [round(float(np.mean([np.mean(values) for values in by_task.values()])), 12) for by_task in found.values()]


def verdicts(cells, scores, notes, seed=0):
    """Lines of Markdown: `verdict` on the fine-tuned tasks, and on those that need no training."""
    fine_tuned = [task for task in cells if task in FINE_TUNED]
    rest = [task for task in cells if task not in FINE_TUNED]
    for title, names in (("Fine-tuned tasks", fine_tuned), ("Without training", rest)):
        if names:
            yield from ("", f"## {title}: {', '.join(names)}", "")
            yield from verdict({t: cells[t] for t in names}, {t: scores[t] for t in names}, notes, seed)


def verdict(cells, scores, notes, seed):
    """Lines: relative improvement with interval, then the paired tests over per-language means."""
    kept = with_percentage(cells, notes)
    if kept:
        gain = improvement(kept, scores)
        by_task = ", ".join(f"{task} {percent:+.2f}%" for task, percent in gain.tasks.items())
        yield f"Relative improvement, mean over {len(gain.tasks)} task(s): **{gain.mean:+.2f}%** ({by_task})"
        yield from intervals(kept, True, seed, notes)
    difference = np.mean([np.mean([new - old for new, old in row.values()]) for row in scores.values()])
    yield f"Difference, mean over {len(scores)} task(s): **{100 * difference:+.2f} points**"
    yield from intervals(cells, False, seed, notes)
    differences = language_differences(scores)
    better = sum(d > 0 for d in differences)
    p_wilcoxon = statistics.wilcoxon(differences)[1]
    yield (f"Per-language means, {len(differences)} languages, better in {better}: Wilcoxon p = {p_wilcoxon:.4g}, "
           f"paired permutation p = {statistics.permutation_test(differences, seed=seed):.4g}")
    if len(scores) > 1:
        by_task = [statistics.wilcoxon(language_differences({task: row}))[1] for task, row in scores.items()]
        yield ("Each task by itself, Wilcoxon with Holm's correction: "
               + ", ".join(f"{task} p = {p:.4g}" for task, p in zip(scores, statistics.holm(by_task))))
    if len(differences) < 6:
        yield "With fewer than 6 languages neither test can reach 0.05."
    shared = {c.system.shape[0] for row in cells.values() for c in row.values()}
    if len(shared) == 1 and min(shared) > 1 and sum(map(len, cells.values())) > 1:
        per_seed = [[float(c.score(*c.system[s].T)) - float(c.score(*c.baseline[s].T))
                     for row in cells.values() for c in row.values()] for s in range(min(shared))]
        effect, sd_language, sd_seed, sd_run = statistics.effect_spread(per_seed)
        if effect:
            needed = statistics.languages_needed(abs(effect), sd_language, sd_seed, min(shared), sd_run=sd_run, simulations=1000)
            yield (f"Spread of the difference: {sd_language:.3f} between cells, {sd_seed:.3f} between seeds, {sd_run:.3f} between "
                   f"seeds for all cells alike; to find "
                   f"{abs(effect):.3f} in 4 of 5 studies with {min(shared)} seeds takes "
                   f"{f'{needed} cells' if needed else 'more than 300 cells'}.")


def intervals(cells, relative, seed, notes):
    """One or two lines of bootstrap intervals; a note where a percentage means nothing in some resample."""
    unit, scale = ("%", 1) if relative else (" points", 100)
    for what, levels in (("these tasks", ("language", "example", "seed")), ("tasks like these", statistics.LEVELS)):
        if "task" in levels and len(cells) < 2:
            continue
        try:
            found = interval(cells, relative, levels, seed)
        except ValueError as error:
            notes.append(f"no interval of the relative improvement: {error}")
            return
        yield f"  95% interval for {what}: {scale * found.low:+.2f} to {scale * found.high:+.2f}{unit}"


def settings_that_differ(baseline, candidate):
    """Notes on what makes the comparison less than fair."""
    b, c = ({"train_on": "source", **side["settings"]} for side in (baseline, candidate))
    notes = [f"{key}: {b.get(key)!r} in the baseline, {c.get(key)!r} in the candidate"
             for key in ("prefix", "limit", "dtype", "train_on") if b.get(key) != c.get(key)]
    trained = {(t["task"], t["data"], t["source"]): t for t in candidate["training"]}
    for t in baseline["training"]:
        other = trained.get((t["task"], t["data"], t["source"]))
        for key in ("steps", "batch", "seeds", "share_of_test"):
            if other and other[key] != t[key]:
                notes.append(f"{t['task']} on {t['data']}: {key} {t[key]} in the baseline, {other[key]} in the candidate")
        if other and "budget" in t["stopped"] + other["stopped"]:
            notes.append(f"{t['task']} on {t['data']}: a budget ended runs early: {t['steps_done']} steps done in the baseline, "
                         f"{other['steps_done']} in the candidate")
    for name in sorted(set(baseline["data"]) & set(candidate["data"])):
        if baseline["data"][name] != candidate["data"][name]:
            notes.append(f"{name}: the files differ between the two reports")
    return notes
