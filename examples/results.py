"""The reports of distil_e5.sh, and tried.md, as one page: OUT/reports/*.json -> OUT/RESULTS.md; compact reports to commit.

    python examples/results.py OUT --lines OUT/lines --options '--minutes 30'
    python -m eval compare examples/reports/mlm.json examples/reports/all.json        # from the committed ones
"""
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import ablate, neutrality, report, run  # noqa: E402
from inference import embed, load  # noqa: E402
from files import write_atomically  # noqa: E402

NAMES = ("mlm", "adversary", "distillation", "all")


def students(folder):
    """{name: heading} of the students that have a report: those of the ladder, and the one of --long, if there is one."""
    ladder = {name: ablate.RUNGS[name][0] for name in NAMES}
    return ladder | ({"long": "long"} if (folder / "long.json").exists() else {})


def sizes(folder):
    """{layers, parameters of the encoder's layers, of all, of the embeddings, pieces, MB on disk} of a model folder."""
    model, _ = load(folder)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return {"layers": len(model.blocks), "in the layers": count(model.blocks), "all": count(model),
            "embeddings": model.embedding.weight.numel(), "pieces": model.config.vocab_size,
            "MB": (Path(folder) / "model.safetensors").stat().st_size / 1e6}


def speed(folders, lines, sentences=300, rounds=5):
    """Sentences a second of each model on the same sentences, tokenising included; rounds alternate, medians."""
    files = sorted(Path(lines).glob("*.txt"))
    each = -(-sentences // len(files))
    text = [line for f in files
            for line in [t for t in f.read_text(errors="replace").split("\n") if 20 < len(t) < 200][:each]]
    loaded = {name: load(folder) for name, folder in folders.items()}
    seconds = {name: [] for name in loaded}
    for _ in range(rounds + 1):
        for name, (model, tokenizer) in loaded.items():
            began = time.perf_counter()
            embed(model, tokenizer, text)
            seconds[name].append(time.perf_counter() - began)
    rate = {name: len(text) / statistics.median(s[1:]) for name, s in seconds.items()}
    ratio = statistics.median(t / s for t, s in zip(seconds["teacher"][1:], seconds["student"][1:]))
    return {"sentences": len(text), "threads": torch.get_num_threads(), "rate": rate, "ratio": ratio}


def trained(folder):
    """Steps, tokens and seconds of a run, the seconds without validation and saving."""
    rows = [row for line in (folder / "metrics.jsonl").read_text().splitlines() if "tokens_seen" in (row := json.loads(line))]
    seconds = sum((b["tokens_seen"] - a["tokens_seen"]) / b["tokens_per_second"] for a, b in zip([{"tokens_seen": 0}, *rows], rows))
    return {"steps": rows[-1]["step"], "tokens": rows[-1]["tokens_seen"], "seconds": seconds}


def kept(teacher, student):
    """{task: (student's mean, teacher's, cells)} over the cells that both have."""
    theirs = {(c["task"], c["data"], c["language"]): np.mean(c["scores"]) for c in teacher["cells"]}
    rows = {}
    for c in student["cells"]:
        if (key := (c["task"], c["data"], c["language"])) in theirs:
            rows.setdefault(c["task"], []).append((np.mean(c["scores"]), theirs[key]))
    return {task: (*np.mean(pairs, 0), len(pairs)) for task, pairs in rows.items()}


def page(folder, facts):
    """Lines of RESULTS.md. folder: where the reports are; facts: as `main` measures them."""
    names = students(folder)
    reports = {name: report.load(folder / f"{name}.json") for name in (*names, "teacher")}
    for name, value in reports.items():
        value["model"]["path"] = f"examples/reports/{name}"
    student, teacher = facts["sizes"]["student"], facts["sizes"]["teacher"]
    yield from ("# A student of multilingual-e5-small", "",
                f"Made by `bash examples/distil_e5.sh {facts['options']}` on {facts['machine']}, {facts['date']}: "
                f"{facts['steps']} steps of 4,096 tokens a student ({facts['tokens'] / 1e6:.2f} M tokens), "
                f"{facts['seconds'] / 60:.0f} minutes of training in all. {facts['load']}", "", "| | teacher | student | |", "|---|---:|---:|---:|")
    for what in ("layers", "in the layers", "embeddings", "pieces", "all", "MB"):
        label = {"in the layers": "parameters in the layers", "all": "all parameters", "MB": "MB on disk (fp32)"}.get(what, what)
        yield f"| {label} | {teacher[what]:,.0f} | {student[what]:,.0f} | {student[what] / teacher[what]:.1%} |"
    s = facts["speed"]
    yield (f"| sentences/s, {s['threads']} thread(s) | {s['rate']['teacher']:.0f} | {s['rate']['student']:.0f} | "
           f"{s['ratio']:.2f} x |")
    if "long" in names:
        longest = facts["long"]
        yield from ("", "**long** is the whole recipe once more, from a healed start and with options of its own (examples/distil_e5.sh): "
                    f"{longest['steps']:,} steps, {longest['tokens'] / 1e6:.1f} M tokens, {longest['seconds'] / 60:.0f} minutes. "
                    "It answers how near to the teacher the recipe comes, not what an objective is worth: no other student had its time.")
    yield from ("", "## Share of the teacher's score kept", "",
                "| | teacher | " + " | ".join(names.values()) + " |", "|---|---:|" + "---:|" * len(names))
    shares = {name: kept(reports["teacher"], reports[name]) for name in names}
    for task, (_, theirs, n) in shares["mlm"].items():
        yield f"| {task} ({n} data sets and languages) | {theirs:.3f} | " + " | ".join(
            f"{shares[name][task][0]:.3f} ({shares[name][task][0] / theirs:.0%})" for name in names) + " |"
    prior = max(value["prior"] for value in reports["teacher"]["neutrality"].values())
    yield from ("", "## Neutrality of the last layer", "",
                f"linear, mlp: how often a probe names the language (a guess: {prior:.1%}); centred: with each language's mean subtracted. between: share "
                "of the variance between languages. cka, cka_chance: of translations, and of shuffled ones. retrieval: among fewer candidates than "
                "above. mean_cosine: near 1, the vectors have collapsed (eval/neutrality.py).", "",
                "| | " + " | ".join(("data", *neutrality.MEASURES)) + " |", "|---|---|" + "---:|" * len(neutrality.MEASURES))
    for name in ("teacher", *names):
        for data, value in reports[name]["neutrality"].items():
            last = value["layers"][-1]
            yield f"| {name} | {data} | " + " | ".join(f"{last[key]:.3f}" for key in neutrality.MEASURES) + " |"
    yield from ("", *(("#" + line if line.startswith("#") else line).replace("Ablation", "The ladder").replace("/report.json", ".json")
                      for line in ablate.table({name: reports[name] for name in NAMES}, [
                          "All four start from the same pruned layers and the same embeddings of the teacher and read the same "
                          "batches, so the ladder measures the objectives and not the start."])))
    cells, notes = report.pairs(reports["distillation"], reports["all"])
    yield from ("", "## The adversary beside distillation", "", "all against MLM + distillation: one pretraining of each. Its seed is in no interval.")
    for line in report.verdicts(cells, report.mean_scores(cells), notes):
        yield "#" + line if line.startswith("#") else line and f"- {line.strip()}"
    yield from ("", "## Every language", "", "| task, data, language | n | " + " | ".join((*names, "teacher")) + " |",
                "|---|---:|" + "---:|" * (len(names) + 1))
    cells = {name: {(c["task"], c["data"], c["language"]): c for c in value["cells"]} for name, value in reports.items()}
    for key, c in cells["mlm"].items():
        found = (f"{np.mean(cells[name][key]['scores']):.3f}" if key in cells[name] else "" for name in (*names, "teacher"))
        yield f"| {key[0]} {key[1].rpartition('/')[2]} {key[2]} | {c['n']} | " + " | ".join(found) + " |"
    yield from ("", (Path(__file__).parent / "tried.md").read_text().rstrip())
    yield from ("", "The reports in examples/reports hold of each cell that needed no training its first 100 examples; this page was made from all of them.")
    yield from ("", "## Data", "", *(f"- {name}: sha256 {value[:16]}..." for name, value in reports["mlm"]["data"].items()),
                f"- text: manifest of the prepared folder, sha256 {facts['text'][:16]}...", "")


def compact(value, most=100):
    """A report to commit: of what needs no training, which has most languages, at most `most` examples a cell, and their
    scores; of the fine-tuned tasks everything, so that `compare` prints what the page says."""
    for cell in [c for c in value["cells"] if c["task"] not in report.FINE_TUNED]:
        cell["examples"] = [table[:most] for table in cell["examples"]]
        cell["n"], cell["digests"] = len(cell["examples"][0]), cell["digests"][:8 * most]
        score = run.SCORES[cell["task"]][2]
        cell["scores"] = [float(score(*np.array(table, float).T)) for table in cell["examples"]]
    for measured in value["neutrality"].values():
        measured.pop("map", None)
    value["notes"].append(f"compacted: the first {most} examples of each cell that needed no training")
    return value


@click.command()
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--lines", required=True, type=click.Path(exists=True, file_okay=False), help="<code>.txt files for the speed.")
@click.option("--options", required=True, help="What distil_e5.sh was given; for the head of the page.")
@click.option("--note", default="", help="A sentence for the head of the page: what was special about this run.")
def main(out, lines, options, note):
    """Measure sizes and speed, then write OUT/RESULTS.md and OUT/compact/*.json and print the page."""
    folders = {"teacher": out / "teacher", "student": out / ("long" if "long" in students(out / "reports") else "all") / "final"}
    runs = {name: trained(out / name) for name in students(out / "reports")}
    facts = {"sizes": {name: sizes(folder) for name, folder in folders.items()}, "speed": speed(folders, lines),
             "steps": runs["mlm"]["steps"], "tokens": runs["mlm"]["tokens"], "seconds": sum(runs[name]["seconds"] for name in NAMES),
             "long": runs.get("long"), "options": options,
             "date": time.strftime("%Y-%m-%d"), "machine": f"{os.cpu_count()} cores of {platform.machine()}, torch {torch.__version__}",
             "load": f"Load average at the end {os.getloadavg()[1]:.1f}. {note}".strip(),
             "text": json.loads((out / "data" / "manifest.json").read_text())["sha256"]}
    write_atomically(out / "reports" / "facts.txt", [json.dumps(facts, indent=1).encode()])
    text = "\n".join(page(out / "reports", facts))
    write_atomically(out / "RESULTS.md", [text.encode() + b"\n"])
    (out / "compact").mkdir(exist_ok=True)
    for name in (*students(out / "reports"), "teacher"):
        value = compact(report.load(out / "reports" / f"{name}.json"))
        value["model"]["path"] = name
        write_atomically(out / "compact" / f"{name}.json", [json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"])
    click.echo(text)


if __name__ == "__main__":
    main()
