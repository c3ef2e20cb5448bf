"""The ablation ladder: does the adversary help, does distillation, do both, on the same budget?

    python -m eval ablate --config FILE.json --out DIR [--seeds 3] [--budget 2h]
    python train.py --ablate --out DIR                     # the same on the embedded atlas, in about 15 minutes

Four rungs (RUNGS), each pretrained with the seeds 0, 1, ...: with one seed all rungs have the same steps, tokens,
initial weights and data order, and with all seeds the same teacher. Seed s of a rung is then fine-tuned once a
task, on English, with seed s again. So both sources of variance vary together, and the rungs are paired by seed.

    DIR/ablation.json          what was asked for, and what of it was cut to fit the budget
    DIR/teacher/               trained once, if none was given
    DIR/<rung>/seed-<s>/       a run folder of train.py, with train.log, eval.log and report.json
    DIR/<rung>/report.json     the rung's seeds in one report, for `python -m eval compare`
    DIR/ablation.md            the table

What is finished is not done again, so the same command goes on after a stop.
"""
import copy
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from batches import Corpus
from eval import report, run, statistics, tasks
from files import write_atomically
from hub.reread import load_teacher
from launch import UserError
from options import ATLAS_RECIPE, WITHOUT_TEACHER, TrainConfig

# Name -> (title, train.py options over those of the whole recipe).
RUNGS = {"mlm": ("MLM", {"adv_weight": 0.0} | WITHOUT_TEACHER),
         "adversary": ("MLM + adversary", WITHOUT_TEACHER),
         "distillation": ("MLM + distillation", {"adv_weight": 0.0}),
         "all": ("all", {})}
FOLDERS = ("data", "eval_data", "teacher")
REPOSITORY = Path(__file__).resolve().parent.parent
# Another seed than any student's: a teacher of the student's size would be the student's own start, further on.
TEACHER_SEED = 1000
MEASURED_STEPS = 6
PRETRAINING = 0.55        # of the budget as planned; the rest is for fine-tuning and scoring
LATEST = 0.75             # of the budget: no further seed where the machine was slower than measured
ATLAS_TASKS = ("ner", "nli", "qa", "sts", "retrieval")
ATLAS_BUDGET = 15 * 60
# One rate for all tasks leaves time for more steps. On a tiny MLM model, entity F1 on English rises with the rate and
# falls on all else: at 2e-4, 1e-3 and 3e-3 0.62, 0.82 and 0.86 in English, but 0.44, 0.23 and 0.18 in German. So
# this rate was chosen with a look at zero-shot test scores (of another MLM model); it is the same for all rungs.
ATLAS_RATES = "2e-4"
ATLAS_CHANGES = {"eval_tokens": 1024}     # in all, validation would take a minute longer and is not in the table


# ---- the configuration --------------------------------------------------------------------------------------

def read_config(path):
    """A JSON file of train.py options ({"preset": "xsmall", "steps": 300}) with "data", "eval_data" and "teacher".

    Raises ValueError with the file for what is no such object.
    """
    value = tasks.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object of train.py options")
    try:
        return checked({key.replace("-", "_"): v for key, v in value.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def checked(config):
    """The options, folders made absolute. Raises ValueError for unknown ones and values that cannot be."""
    fields = {f.name: f for f in dataclasses.fields(TrainConfig) if f.name != "seed"}
    for name, value in config.items():
        if name == "seed":
            raise ValueError("seed: the ladder has several; say how many with --seeds")
        if name not in fields and name not in FOLDERS:
            raise ValueError(f"no option {name!r} of train.py; folders are {', '.join(FOLDERS)}")
        kind = str if name in FOLDERS else type(fields[name].default)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{name} is {value!r}; it takes a {kind.__name__}")
        if name in fields and fields[name].metadata["choices"] and value not in fields[name].metadata["choices"]:
            raise ValueError(f"{name} is {value!r}; choose from {', '.join(fields[name].metadata['choices'])}")
        if name in FOLDERS and not Path(value).is_dir():
            raise ValueError(f"{name}: no folder {value}")
    recipe = TrainConfig(**{k: v for k, v in config.items() if k in fields})
    if ("data" in config) != ("eval_data" in config):
        raise ValueError("data and eval_data go together; without both it is the atlas")
    if "data" in config and not ("teacher" in config or recipe.teacher_steps):
        raise ValueError("no teacher: give one, or teacher_steps to train one")
    if not recipe.adv_weight or not recipe.distils or not recipe.mlm_weight:
        raise ValueError("a ladder needs mlm_weight, adv_weight and a distillation weight above 0")
    if recipe.init_from_teacher:
        raise ValueError("init_from_teacher: MLM alone would then have a teacher's help; the rungs start at random")
    if "teacher" in config and "data" in config:         # two rungs do without: it would be found out after both
        try:
            load_teacher(config["teacher"], Corpus(config["data"]), recipe)
        except UserError as error:
            raise ValueError(error.message) from None
    return {k: str(Path(v).resolve()) if k in FOLDERS else v for k, v in config.items()}


# ---- the ladder ---------------------------------------------------------------------------------------------

def ablate(config, out, names=None, seeds=3, budget=None, limit=None, say=print):
    """Train and evaluate the ladder in the folder `out`, or go on with it -> the table, Markdown.

    config: see `checked`; without "data" it is the atlas, with a budget of ATLAS_BUDGET unless another is given.
    names: tasks; None: all that the data have. budget: seconds of wall time; steps, seeds, learning rates and test
    examples are cut to fit, alike for all rungs. limit: at most so many examples of each split. Raises ValueError, in one
    line, for bad input.
    """
    from train import atlas_corpus
    out, on_atlas = Path(out).resolve(), "data" not in config
    config = checked(ATLAS_RECIPE | ATLAS_CHANGES | config if on_atlas else config)
    names = list(names or (ATLAS_TASKS if on_atlas else tasks.present(config["eval_data"])))
    asked = {"config": config, "tasks": names, "seeds": seeds, "limit": limit,
             "budget": budget or (ATLAS_BUDGET if on_atlas else None)}
    ladder = Ladder(out, asked, say)
    if on_atlas:
        atlas_corpus(out / "data")
        ladder.config = config | {"data": str(out / "data"), "eval_data": str(out / "atlas" / "eval")}
    for name in names:
        tasks.find(ladder.config["eval_data"], name)                # bad input ends it here, not after an hour
    ladder.climb()
    lines = list(table({name: report.load(out / name / "report.json") for name in RUNGS}, ladder.described()))
    write_atomically(out / "ablation.md", ["\n".join(lines).encode() + b"\n"])
    return "\n".join(lines)


class Ladder:
    """One run of the ladder. `state` is ablation.json: what was asked for, the plan, notes on what was cut."""

    def __init__(self, out, asked, say):
        self.out, self.say, self.config = out, say, asked["config"]
        self.began, self.budget = time.monotonic(), asked["budget"]
        path = out / "ablation.json"
        self.state = read_state(path, asked) if path.is_file() else {"asked": asked, "plan": None, "notes": []}
        changed = [key for key in asked if self.state["asked"][key] != asked[key]]
        if changed:
            raise ValueError(f"{out} holds a ladder with another {', '.join(changed)}; choose another --out")
        out.mkdir(parents=True, exist_ok=True)

    def climb(self):
        """Everything that is not done yet: all pretraining, then all evaluation, a seed on every rung at a time."""
        if not self.state["plan"]:
            self.state["plan"] = self.plan()
            self.save()
        self.teacher()
        self.pretrain()
        self.evaluate()
        for rung in RUNGS:
            seeds = range(self.state["plan"]["seeds"])
            merged = merge([report.load(self.folder(rung, seed) / "report.json") for seed in seeds], self.out / rung)
            write_atomically(self.out / rung / "report.json", [json.dumps(merged, ensure_ascii=False).encode() + b"\n"])

    def plan(self):
        """{"steps", "teacher_steps", "seeds"}: what was asked for, or what of it fits into PRETRAINING of the budget.

        Measured with MEASURED_STEPS steps of the dearest rung. In this order: fewer steps, down to half; fewer
        seeds; fewer steps still.
        """
        recipe = TrainConfig(**{k: v for k, v in self.config.items() if k not in FOLDERS})
        teacher_steps = 0 if "teacher" in self.config else recipe.teacher_steps
        seeds = self.state["asked"]["seeds"]
        if not self.budget:
            return {"steps": recipe.steps, "teacher_steps": teacher_steps, "seeds": seeds}
        folder = self.out / "speed"
        self.say("measuring the speed")
        began = time.monotonic()
        self.train(folder, self.config | {"steps": MEASURED_STEPS, "log_every": MEASURED_STEPS // 2}
                   | ({"teacher_steps": MEASURED_STEPS} if teacher_steps else {}))
        # Everything but steps: starting Python, loading, validation, saving. With a teacher that was trained, twice.
        fixed = (time.monotonic() - began) / (2 if teacher_steps else 1)
        step = seconds_a_step(folder)
        teacher = teacher_steps * seconds_a_step(folder / "teacher") if teacher_steps else 0.0
        available = PRETRAINING * self.budget - self.spent()
        for count in range(seeds, 0, -1):
            runs = len(RUNGS) * count
            share = (available - fixed * (runs + (teacher > 0))) / (teacher + runs * recipe.steps * step)
            if share >= 0.5:
                break
        share = min(1.0, max(share, 1 / recipe.steps))
        plan = {"steps": int(share * recipe.steps), "teacher_steps": math.ceil(share * teacher_steps), "seeds": count}
        if share < 1 or count < seeds:
            self.note(f"cut to fit the budget of {self.budget:.0f} s: {plan['steps']} of {recipe.steps} steps, {count} of "
                      f"{seeds} seeds" + (f", {plan['teacher_steps']} of {teacher_steps} steps of the teacher"
                                          if teacher_steps else ""))
        return plan

    # ---- pretraining

    def teacher(self):
        """Train it, unless one was given."""
        if "teacher" in self.config:
            return
        folder = self.out / "teacher"
        self.config = self.config | {"teacher": str(folder / "final")}
        if not trained(folder):
            self.say("teacher: pretraining")
            self.train(folder, self.config | RUNGS["mlm"][1] | {"preset": self.config["teacher_preset"], "seed": TEACHER_SEED,
                                                                "steps": self.state["plan"]["teacher_steps"]})

    def pretrain(self):
        plan, seconds = self.state["plan"], []
        for seed in range(plan["seeds"]):
            todo = [rung for rung in RUNGS if not trained(self.folder(rung, seed))]
            expected = len(todo) * float(np.mean(seconds or 0))
            if seed and self.budget and self.spent() + expected > LATEST * self.budget:
                self.note(f"{seed} of {plan['seeds']} seeds: pretraining took longer than planned")
                plan["seeds"] = seed
                self.save()
                return
            for rung in todo:
                left = (len(todo) - todo.index(rung) + len(RUNGS) * (plan["seeds"] - seed - 1)) * np.mean(seconds or 0)
                self.say(f"{RUNGS[rung][0]}, seed {seed}: pretraining"
                         + (f" (about {left / 60:.1f} minutes of pretraining left)" if seconds else ""))
                began = time.monotonic()
                self.train(self.folder(rung, seed), self.config | RUNGS[rung][1] | {"steps": plan["steps"], "seed": seed})
                seconds.append(time.monotonic() - began)

    def train(self, folder, options):
        """train.py in a process of its own: it takes every GPU, and the command can be repeated by hand."""
        command = ["train.py", "--out", str(folder)]
        for name, value in options.items():
            if name != "eval_data" and value is not False:
                command += ["--" + name.replace("_", "-")] + ([] if value is True else [str(value)])
        if (folder / "run.json").is_file():
            command.append("--resume")
        folder.mkdir(parents=True, exist_ok=True)
        python(command, folder / "train.log")
        if not trained(folder):
            raise ValueError(f"{folder}: the run was stopped; the same command goes on with it")

    # ---- evaluation

    def evaluate(self):
        """Fine-tune and score every model, several at a time on a CPU.

        The first model decides, within what is left of the budget, on steps, learning rates and the share of the
        tests; all others do the same. Each rung chooses its learning rate with its first seed.
        """
        todo = [(rung, seed) for seed in range(self.state["plan"]["seeds"]) for rung in RUNGS
                if not (self.folder(rung, seed) / "report.json").is_file()]
        first, others = ("mlm", 0), [job for job in todo if job != ("mlm", 0)]
        stages = [[job for job in todo if job == first], [job for job in others if not job[1]], [job for job in others if job[1]]]
        workers = at_once(self.config.get("device", "auto"))
        rounds = sum(-(-len(stage) // workers) for stage in stages)
        # Where pretraining overran, too long is better than a table of models that were hardly fine-tuned.
        budget = max(self.budget - self.spent(), (1 - LATEST) * self.budget) / max(1, rounds) if self.budget else None
        began, done = time.monotonic(), 0
        for stage in stages:
            with ThreadPoolExecutor(workers) as pool:
                for rung, seed in pool.map(lambda job: self.score(*job, budget, workers), stage):
                    done += 1
                    left = (time.monotonic() - began) / done * (len(todo) - done)
                    self.say(f"{RUNGS[rung][0]}, seed {seed}: fine-tuned and scored (about {left / 60:.1f} minutes left)")

    def score(self, rung, seed, budget, workers):
        """One model, by `python -m eval run` -> (rung, seed)."""
        asked, folder, first = self.state["asked"], self.folder(rung, seed), self.folder("mlm", 0) / "report.json"
        unfinished = folder / "unfinished.json"                     # it writes what it has after each task
        command = ["-m", "eval", "run", "--model", str(folder / "final"), "--data", self.config["eval_data"], "--out",
                   str(unfinished), "--tasks", ",".join(asked["tasks"]), "--seeds", "1", "--first-seed", str(seed),
                   "--dtype", self.config.get("dtype", "auto"), "--device", evaluation_device(self.config.get("device", "auto"))]
        if asked["limit"]:
            command += ["--limit", str(asked["limit"])]
        if (rung, seed) != ("mlm", 0):
            like = report.load(self.folder(rung, 0) / "report.json" if seed else first)
            write_atomically(folder / "like.json", [json.dumps(as_example(like, one_rate=seed > 0)).encode()])
            command += ["--like", str(folder / "like.json")]
        else:
            command += ["--rates", ATLAS_RATES] if "data" not in asked["config"] else []
            command += ["--budget", f"{budget:.1f}s", "--to-the-end"] if budget else []
        threads = max(1, len(os.sched_getaffinity(0)) // workers)
        python([*command, "--jobs", str(threads)], folder / "eval.log", threads)
        unfinished.rename(folder / "report.json")
        return rung, seed

    # ---- small things

    def folder(self, rung, seed):
        return self.out / rung / f"seed-{seed}"

    def spent(self):
        return time.monotonic() - self.began

    def note(self, text):
        self.state["notes"].append(text)
        self.say(f"note: {text}")

    def save(self):
        write_atomically(self.out / "ablation.json", [json.dumps(self.state, indent=1).encode()])

    def described(self):
        """Lines about the run for the head of the table."""
        plan, config = self.state["plan"], self.config
        teacher = f"{plan['teacher_steps']} steps by MLM" if plan["teacher_steps"] else f"`{config['teacher']}`"
        yield (f"{plan['seeds']} seed(s). Seed s: pretraining with seed s ({plan['steps']} steps of "
               f"{config.get('tokens_per_batch', 65536):,} tokens on every rung, the same initial weights and data order), "
               f"then one fine-tuning run a task with seed s. One teacher for all ({teacher}; its cost is not counted).")
        yield from ("", *(f"- {note}" for note in self.state["notes"])) if self.state["notes"] else ()


def read_state(path, asked):
    """ablation.json of a ladder to go on with. Raises ValueError with the file for anything else."""
    state = tasks.read_json(path)
    try:
        plan = state["plan"]
        counts = [plan[key] for key in ("steps", "teacher_steps", "seeds")] if plan else []
        whole = set(state["asked"]) >= set(asked) and isinstance(state["notes"], list) and all(type(n) is int for n in counts)
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not what a ladder wrote there; choose another --out")
    return state


def python(arguments, log, threads=None):
    """Run python with arguments in the repository, its output appended to `log`. Raises ValueError with its last line."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    with open(log, "a") as file:
        code = subprocess.run([sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY,
                              env=environment).returncode
    if code:
        last = (log.read_text().strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{' '.join(arguments[:3])} ended with code {code}, see {log}: {last}")


def trained(folder):
    return (folder / "final" / "config.json").is_file()             # written last


def seconds_a_step(folder):
    """Of a run of MEASURED_STEPS steps, the first half of which warmed up."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    warm, last = [row for row in rows if "tokens_per_second" in row][-2:]
    return (last["tokens_seen"] - warm["tokens_seen"]) / last["tokens_per_second"] / (last["step"] - warm["step"])


def evaluation_device(device):
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def at_once(device):
    """How many models to evaluate at the same time. On a CPU small models use one core better than several."""
    return 1 if evaluation_device(device) == "cuda" else min(len(RUNGS), len(os.sched_getaffinity(0)))


# ---- reports ------------------------------------------------------------------------------------------------

def as_example(value, one_rate):
    """A report without its scores, for `--like`; with one_rate the learning rate that it chose is the only one."""
    training = [t | {"sweep": {f"{t['lr']:g}": None}} for t in value["training"]] if one_rate else value["training"]
    return value | {"cells": [], "training": training}


def merge(reports, path):
    """The reports of one rung's seeds -> one, whose examples and scores have a row a seed.

    Raises ValueError where the seeds were not scored on the same examples.
    """
    value = copy.deepcopy(reports[0])
    hashes = [r["model"]["sha256"] for r in reports]
    value["model"] |= {"path": str(path), "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(), "seeds": hashes}
    value["settings"]["seeds"] = len(reports)
    for other in reports[1:]:
        if [c["digests"] for c in other["cells"]] != [c["digests"] for c in value["cells"]]:
            raise ValueError(f"{path}: its seeds were scored on different examples; choose another --out")
        for cell, more in zip(value["cells"], other["cells"]):
            cell["scores"] += more["scores"]
            cell["examples"] += more["examples"]
        for training, more in zip(value["training"], other["training"]):
            for key in ("seeds", "dev", "steps_done", "stopped"):
                training[key] += more[key]
            training["seconds"] += more["seconds"]
        value["notes"] += [note for note in other["notes"] if note not in value["notes"]]
        value["seconds"] += other["seconds"]
    return value


def table(reports, head=()):
    """{rung: merged report} -> lines of Markdown: scores by rung and task, then each rung against MLM alone."""
    yield from ("# Ablation", "", *head)
    names = list(dict.fromkeys(cell["task"] for cell in reports["mlm"]["cells"]))
    source = {t["task"]: t["source"] for t in reports["mlm"]["training"]}
    yield from ("", "## Scores: mean over data sets and languages, ± standard deviation over seeds (in the source language alone)", "",
                "| | " + " | ".join(f"{name}, {run.SCORES[name][0]}" for name in names) + " |", "|---|" + "---:|" * len(names))
    for rung, value in reports.items():
        row = []
        for name in names:
            cells = [cell for cell in value["cells"] if cell["task"] == name]
            by_seed = np.mean(list(zip(*(cell["scores"] for cell in cells))), axis=1)     # those that all cells have
            text = f"{by_seed.mean():.3f}" + (f" ±{by_seed.std(ddof=1):.3f}" if len(by_seed) > 1 else "")
            own = [cell["scores"] for cell in cells if cell["language"] == source.get(name)]
            row.append(text + (f" ({np.mean(own):.3f})" if own else ""))
        yield f"| {RUNGS[rung][0]} | " + " | ".join(row) + " |"
    if reports["mlm"]["training"]:
        yield from ("", "Fine-tuned on:", "", *report.trainings(reports["mlm"]))
    results = {rung: against(reports["mlm"], value) for rung, value in reports.items() if rung != "mlm"}
    results = {rung: result for rung, result in results.items() if result}
    if results:
        used, strong = (", ".join(dict.fromkeys(name for r in results.values() for name in r[which])) for which in ("tasks", "strong"))
        yield from ("", "## Against MLM alone", "",
                    f"Points and p: mean over {used}." + f" Relative improvement: over {strong}." * bool(strong), "",
                    "| | relative improvement | 95% interval | difference, points | 95% interval | p | p, Holm |",
                    "|---|---:|---:|---:|---:|---:|---:|")
        for (rung, r), p in zip(results.items(), statistics.holm([r["p"] for r in results.values()])):
            relative, points = r["relative"], r["points"]
            yield (f"| {RUNGS[rung][0]} | " + (f"{r['gain']:+.2f}% | " if r["gain"] is not None else "- | ")
                   + (f"{relative.low:+.2f} to {relative.high:+.2f} | " if relative else "- | ")
                   + f"{100 * points.estimate:+.2f} | {100 * points.low:+.2f} to {100 * points.high:+.2f} | "
                   f"{r['p']:.4g} | {p:.4g} |")
        other = ("other seeds are in the intervals, not in p" if "seeds" in reports["mlm"]["model"] else
                 "seeds of fine-tuning are in the intervals, not in p; that of the one pretraining each is in neither")
        yield from ("", "Intervals: paired bootstrap over languages, examples (those of parallel data drawn alike) and seeds, these tasks. p: paired "
                        f"permutation of the languages' mean differences in points, these models ({other}), too small where languages share "
                        "examples; Holm: corrected for the three comparisons.")
    notes = dict.fromkeys(note for r in (*reports.values(), *results.values()) for note in r["notes"])
    if notes:
        yield from ("", "Notes:", "", *(f"- {note}" for note in notes))
    yield from ("", "Task by task and language by language: `python -m eval compare "
                    f"{reports['mlm']['model']['path']}/report.json {reports['all']['model']['path']}/report.json`")


def against(baseline, candidate):
    """The figures of `report.compare` over the fine-tuned tasks -> {gain, relative, points, p, tasks, strong, notes}.

    gain: per cent over the tasks `strong`, None where no baseline score is large enough; relative, points: statistics.Interval,
    the former None where a percentage means nothing in some resample. points, p: over `tasks`. None if no fine-tuned task is shared.
    """
    cells, notes = report.pairs(baseline, candidate)
    cells = {name: row for name, row in cells.items() if name in report.FINE_TUNED}
    if not cells:
        return None
    scores = report.mean_scores(cells)
    strong = report.with_percentage(cells, notes)
    gain = relative = None
    if strong:
        gain = report.improvement(strong, scores).mean
        try:
            relative = report.interval(strong, True)
        except ValueError as error:
            notes.append(f"no interval of the relative improvement: {error}")
    p = statistics.permutation_test(report.language_differences(scores))
    return {"gain": gain, "relative": relative, "points": report.interval(cells, False), "p": p, "tasks": list(cells),
            "strong": list(strong), "notes": notes}
