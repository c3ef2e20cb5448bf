"""One model through the tasks -> a report: plain JSON with everything that a later comparison needs.

    {"format": "unibert-eval/1", "model": {path, sha256, parameters}, "data": {data set: sha256}, "versions": {...},
     "settings": {...}, "notes": [what was left out or cut], "seconds": s,
     "cells": [{"task": "nli", "data": "nli/xnli", "language": "sw", "split": "test", "n": 5010, "metric": "accuracy",
                "digests": 8 hexadecimal digits an example, "columns": [...], "examples": [seeds][n][columns],
                "scores": [seeds]}],
     "training": [{"task", "data", "source", "steps", "lr", "sweep", "seeds", "dev", "stopped" and more, see fine_tune}],
     "neutrality": {data set: see neutrality.measure}}

A cell is one language of one data set: its score can be computed again from `examples` (SCORES says how), so two
reports can be compared, example by example, years later. Cells that need no training have one "seed".
"""
import contextlib
import hashlib
import importlib
import itertools
import json
import platform
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from hub.vocabulary import load_vocabulary
from eval import finetune, metrics, neutrality, retrieval, sts, tasks
from files import write_atomically
from launch import default_dtype
from unibert import load_model

FORMAT = "unibert-eval/1"
RATES = (5e-5, 1e-4, 2e-4)                                 # swept on the dev set of the source language
DEV = 1000                                                 # examples of that dev set that are looked at during training
UNTRAINED = 0.15                                           # of a budget at most, for what needs no training
MODULES = {name: importlib.import_module(f"eval.{name}") for name in tasks.TASKS}
HEADS = {name: module.HEAD for name, module in MODULES.items() if hasattr(module, "HEAD")}
# Per task of the cells: the metric's name, its per-example columns, the function from columns to score.
SCORES = {name: (head.metric, head.column_names, head.score) for name, head in HEADS.items()} | {
    "sts-cosine": ("Spearman, untrained", ("cosine", "gold"), metrics.spearman),
    "retrieval": ("accuracy", retrieval.COLUMNS, retrieval.score)}
ALSO = {name: head.also for name, head in HEADS.items()} | {"sts-cosine": sts.Similarity.also}


def file_hash(*paths):
    """sha256 over the names and bytes of files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def folder_hash(folder):
    """sha256 over all files of a data set, by name."""
    return file_hash(*sorted(p for p in Path(folder).rglob("*") if p.is_file()))


def load(data, task, limit=None):
    """[(DataSet, {language: {split: [examples]}})] of one task, in the order of `drawn`; at most `limit` examples a split.

    A dev or test split of one example, which has no correlation and no spread, is left out with a warning.
    """
    found = []
    for dataset in tasks.find(data, task):
        by_language = MODULES[task].load(dataset.folder, dataset.splits or None)
        by_language = {code: {split: drawn(rows)[:limit] for split, rows in splits.items()} for code, splits in by_language.items()}
        for code, splits in by_language.items():
            for split in [s for s in ("dev", "test") if s in splits and len(splits[s]) < 2]:
                warnings.warn(f"{dataset.name} {code} {split}: 1 example: left out", stacklevel=2)
                del splits[split]
        found.append((dataset, by_language))
    return found


def drawn(examples):
    """The examples in an order that is drawn, but the same for all lists of one length: parallel languages stay parallel.

    Whatever cuts a split keeps its first examples, and public files are sorted by genre: STS-B's test begins with 625 captions.
    """
    return [examples[i] for i in np.random.default_rng(0).random(len(examples)).argsort()]


def scored_split(splits):
    """The split to score: test, else dev; None where there is only train."""
    return next((split for split in ("test", "dev") if split in splits), None)


def cell(task, name, language, split, examples, tables):
    """One cell of the report. tables: [seeds][n, columns]."""
    metric, columns, score = SCORES[task]
    # Rounded for the file, and scored as rounded, so that the file gives the same score again.
    tables = [np.round(np.asarray(table, dtype=np.float64), 6) for table in tables]
    return {"task": task, "data": name, "language": language, "split": split, "n": len(examples), "metric": metric,
            "digests": "".join(hashlib.sha256(repr(e).encode()).hexdigest()[:8] for e in examples),
            "columns": list(columns),
            "scores": [float(score(*table.T)) for table in tables],
            "examples": [[[int(x) if x == int(x) else float(x) for x in row] for row in table] for table in tables]}


class Report:
    """What accumulates during a run."""

    def __init__(self, model_folder, model, settings):
        folder = Path(model_folder)
        self.value = {
            "format": FORMAT,
            "model": {"path": str(model_folder), "parameters": sum(p.numel() for p in model.parameters()),
                      "sha256": file_hash(*(p for n in ("config.json", "model.safetensors", "tokenizer.model", "vocab.txt")
                                            if (p := folder / n).is_file()))},
            "data": {}, "settings": settings, "notes": [], "cells": [], "training": [], "neutrality": {}, "seconds": 0.0,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                         "sentencepiece": sentencepiece.__version__}}
        self.began = time.monotonic()

    def note(self, text, say):
        self.value["notes"].append(text)
        say(f"note: {text}")

    def write(self, path):
        """Whole or not at all."""
        self.value["seconds"] = round(time.monotonic() - self.began, 1)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, [json.dumps(self.value, ensure_ascii=False).encode() + b"\n"])


def run(model_folder, data, names, out, prefix="", seeds=3, limit=None, budget=None, like=None, dtype="auto",
        device="cpu", train_on="source", say=print, first_seed=0, to_the_end=False, rates=RATES, jobs=None):
    """Evaluate a model folder on `names` (of tasks.TASKS and "neutrality") and write the report to `out`.

    prefix: text before each sentence of STS and retrieval. limit: at most so many examples a split. budget:
    seconds for everything; see finetune.plan for what is cut. At least one step and 50 examples of each language are
    done, so that a very short one is overrun. like: the report of another model, whose steps, batches, learning rates,
    seeds and share of the test splits are used again, so that the two compare fairly. train_on: "source", "target" or
    "all", see `assign`. first_seed: of the fine-tuning seeds. to_the_end: the budget plans, but ends no run early; the
    ablation needs equal steps. rates: learning rates to try. jobs: trainings at the same time on a CPU; None: see
    finetune.pool. Raises ValueError, in one line, for bad input.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA device; use --device cpu")
    if like and like["settings"].get("order") != "drawn":
        raise ValueError("--like: that report scored the first rows of each split, before splits were drawn; evaluate its model again")
    if like and like["settings"].get("train_on", "source") != train_on:
        raise ValueError(f"--like: that report was made with --train-on {like['settings'].get('train_on', 'source')}")
    model = load_model(model_folder, device)
    tokenizer = load_vocabulary(Path(model_folder))
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"{model_folder}: the model has {model.config.vocab_size:,} token ids, its tokenizer.model "
                         f"{len(tokenizer):,} pieces: it is the tokenizer of another model")
    dtype = {"auto": default_dtype(device), "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    report = Report(model_folder, model, {
        "tasks": names, "prefix": prefix, "seeds": seeds, "limit": limit, "budget": budget, "device": device,
        "train_on": train_on, "like": like and like["model"]["sha256"], "dtype": str(dtype).removeprefix("torch."),
        "order": "drawn"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loaded = {name: load(data, name, limit) for name in names if name in MODULES}   # bad input ends it here
        if "neutrality" in names and "retrieval" not in loaded:
            loaded["neutrality"] = load(data, "retrieval", limit)
    # Languages of very few sentences cannot be measured; that is to be known before anything is computed.
    measured = [(dataset, found) for dataset, found in loaded.get("neutrality") or loaded.get("retrieval", ())
                if any(len(splits.get("test", ())) >= neutrality.LEAST for splits in found.values())]
    if "neutrality" in names and not measured:
        raise ValueError(f"{data}: neutrality needs retrieval data: {neutrality.LEAST} sentences of a language and their "
                         "translations")
    for warning in caught:
        report.note(str(warning.message), say)
    for sets in loaded.values():
        report.value["data"] |= {dataset.name: folder_hash(dataset.folder) for dataset, _ in sets}
    trainings = [t for name in names if name in HEADS for t in assign(name, loaded[name], report, say, train_on)]
    deadline = report.began + budget if budget else float("inf")
    if like or budget:
        cut_untrained(report, loaded, model, tokenizer, UNTRAINED * budget if budget else 0, dtype, like, say)
    # What needs no training first; the rest shares the time that is left.
    for name in sorted(names, key=lambda n: n not in ("retrieval", "sts", "neutrality")):
        if name == "retrieval":
            untrained(report, "retrieval", loaded[name], lambda pairs: retrieval.hits(
                model, tokenizer, pairs, prefix, dtype=dtype), say)
        elif name == "sts":
            untrained(report, "sts-cosine", loaded[name], lambda pairs: sts.cosines(
                model, tokenizer, pairs, prefix, dtype=dtype), say)
        elif name == "neutrality":
            for dataset, found in measured:
                report.value["neutrality"][dataset.name] = neutrality.measure(
                    model, tokenizer, {code: splits.get("test", ()) for code, splits in found.items()}, prefix, dtype, say)
        report.write(out)                                  # what is done stays if the rest fails
    pool, workers = finetune.pool(device, max(len(rates), seeds), jobs)
    with pool or contextlib.nullcontext():
        if budget and not like:                            # what a cheap one leaves of its share goes to the dearer ones
            trainings.sort(key=lambda t: tokens_wanted(t, tokenizer, model.config.max_length))
        for left, training in zip(range(len(trainings), 0, -1), trainings):
            now = time.monotonic()
            fine_tune(report, training, model, tokenizer, prefix, seeds, dtype,
                      now + (deadline - now) / left if budget else deadline, like, say, first_seed, to_the_end, rates,
                      pool, workers)
            report.write(out)
    for part in ("cells", "training"):                     # told in the order that was asked for
        report.value[part].sort(key=lambda row: names.index(row["task"]) if row["task"] in HEADS else -1)
    report.write(out)
    return report.value


def cut_untrained(report, loaded, model, tokenizer, seconds, dtype, like, say):
    """Shorten the retrieval and STS splits, alike, to what can be encoded in `seconds`, measured on a sample; or as
    the report `like` did."""
    splits = [(name, row, split) for name in ("retrieval", "sts", "neutrality")
              for _, found in loaded.get(name, ()) for row in found.values() if (split := scored_split(row))]
    fields = {"sts": ("sentence1", "sentence2")}
    texts = [getattr(example, side) for name, row, split in splits for example in row[split]
             for side in fields.get(name, ("sentence", "translation"))]
    if not texts:
        return
    if like:
        share = like["settings"].get("untrained_share", 1.0)
    else:
        sample = texts[::-(-len(texts) // 256)]
        finetune.vectors(model, tokenizer, sample[:8], dtype=dtype)                # warm up
        began = time.monotonic()
        finetune.vectors(model, tokenizer, sample, dtype=dtype)
        share = seconds / ((time.monotonic() - began) / len(sample) * len(texts))
    if share < 1:
        report.note(f"retrieval and cosine STS: {share:.0%} of each split (at least 50, drawn), to fit the budget", say)
        for name, row, split in splits:
            if name != "sts":                              # STS is cut below: its splits also serve fine-tuning
                row[split] = row[split][:max(50, int(share * len(row[split])))]
        report.value["settings"]["untrained_share"] = share


def untrained(report, task, sets, table, say):
    """Score every language of a task that needs no training."""
    for dataset, by_language in sets:
        for language, splits in by_language.items():
            if not (split := scored_split(splits)):
                continue
            share = report.value["settings"].get("untrained_share", 1.0) if task == "sts-cosine" else 1.0
            examples = splits[split][:max(50, int(share * len(splits[split])))]
            row = cell(task, dataset.name, language, split, examples, [table(examples)])
            report.value["cells"].append(row)
            say(f"{task:12}{dataset.name:24}{language:10}{row['n']:>7}  {row['scores'][0]:.3f}")


# ---- fine-tuning --------------------------------------------------------------------------------------------

@dataclass
class Training:
    """One fine-tuned model: trained on `source` of `data`, scored on targets (data set, language, split, examples)."""
    task: str
    data: str
    source: str
    how: str                  # where train and dev come from, in words
    train: list
    dev: list
    targets: list


def assign(task, sets, report, say, train_on="source"):
    """Which data trains what -> [Training].

    "source": a data set with training data in its source language (tasks.json, else English) trains a model of its
    own. If a task has none such, one is made: of the largest English dev split; else, of the largest training set in
    any language; else, of half of the largest English test split. Where dev or test is trained on, the data set's other
    languages are scored on what lies at the places that were kept, for the rest may be translations of what was learnt.
    Selection is on the source language alone: every other is zero-shot.
    "target": each language with training data trains a model of its own and is all that it is scored on.
    "all": a data set with training data in any language trains one model on those of all its languages, selected on
    all their dev splits.

    Dev, where there is none to spare, is every tenth example of train, or two of fewer than twenty (for QA every tenth
    article, so that no text is on both sides). Data sets without training data are targets of the task's largest training,
    but for "target".
    """
    trainings = {"source": train_on_source, "target": train_on_target, "all": train_on_all}[train_on](task, sets)
    if not trainings and train_on == "source":
        raise ValueError(f"{task}: no data set has train, dev or test in English, and tasks.json names no source")
    if not trainings:
        raise ValueError(f"{task}: no data set has a train split with something to score beside it, which --train-on "
                         f"{train_on} needs")
    largest = max(trainings, key=lambda t: len(t.train))
    for dataset, found in sets:
        if train_on == "target":
            scored = {code for t in trainings if t.data == dataset.name for _, code, *_ in t.targets}
            if set(found) - scored:
                report.note(f"{dataset.name}: no training data, so left out: {', '.join(sorted(set(found) - scored))}", say)
        elif dataset.name not in [t.data for t in trainings]:
            every = [example for splits in found.values() for rows in splits.values() for example in rows]
            if reason := HEADS[task].mismatch(largest.train, every):
                report.note(f"{dataset.name}: left out: {reason} (trained on {largest.data})", say)
                continue
            largest.targets += targets(dataset.name, found)
        else:
            own = [t for t in trainings if t.data == dataset.name]
            known = {t.source for t in own} | {code for t in own for name, code, *_ in t.targets if name == dataset.name}
            if lost := [code for code, row in found.items() if code not in known and scored_split(row)]:
                report.note(f"{dataset.name}: left out, because no split is sure to hold no translation of what was learnt: "
                            f"{', '.join(lost)}", say)
    for t in trainings:
        for name, code, split, examples in [(t.data, t.source, "dev", t.dev), *t.targets]:
            if reason := HEADS[task].mismatch(t.train, examples):
                raise ValueError(f"{name}: {code} {split} cannot be scored after training on {t.data} {t.source}: {reason}")
    for t in trainings:
        if not t.targets and any(other.targets for other in trainings):
            report.note(f"{t.data}: {t.source}: left out: nothing to score beside what it would be trained on", say)
    trainings = [t for t in trainings if t.targets]
    if not trainings:
        raise ValueError(f"{task}: nothing to score beside the training data; add a test split, or another language")
    return trainings


def train_on_source(task, sets):
    content = {dataset.name: found for dataset, found in sets}

    def present(leads):
        """Those of [(data set, language, split)] that exist."""
        return [(dataset, code, split) for dataset, code, split in leads if split in content[dataset.name].get(code, {})]

    def of_source(split):
        return present([(dataset, dataset.source or "en", split) for dataset, _ in sets])

    def size(lead):
        dataset, code, split = lead
        return len(content[dataset.name][code][split])

    leads = of_source("train")
    if not leads:
        any_train = present([(dataset, code, "train") for dataset, found in sets for code in found])
        instead = of_source("dev") or any_train or of_source("test")
        leads = [max(instead, key=size)] if instead else []
    trainings = []
    for dataset, source, split in leads:
        found = content[dataset.name]
        train, dev, rest, how = part(dataset.name, found[source], source, split)
        if split != "train":  # of the other languages only the places that `part` kept out of train
            every, side = (2, 0) if split == "test" else (10, 1)
            count, by_article = len(found[source][split]), hasattr(found[source][split][0], "article")
            for code, row in [(code, row) for code, row in found.items() if split in row]:
                # Of another length it is in another order: no place says what is a translation of what.
                kept = divide(row[split], every)[side] if by_article or len(row[split]) == count else []
                found = found | {code: {k: v for k, v in row.items() if k != split} | ({split: kept} if kept else {})}
        trainings.append(Training(task, dataset.name, source, how, train, dev,
                                  targets(dataset.name, {**found, source: rest})))
    return trainings


def train_on_target(task, sets):
    trainings = []
    for dataset, found in sets:
        for code, splits in found.items():
            if "train" in splits and {"dev", "test"} & set(splits):
                train, dev, rest, how = part(dataset.name, splits, code, "train")
                trainings.append(Training(task, dataset.name, code, how, train, dev, targets(dataset.name, {code: rest})))
    return trainings


def train_on_all(task, sets):
    trainings = []
    for dataset, found in sets:
        parts = {code: part(dataset.name, splits, code, "train") for code, splits in found.items() if "train" in splits}
        scored = targets(dataset.name, {**found, **{code: rest for code, (*_, rest, _) in parts.items()}})
        if parts and scored:
            # Dev takes turns between languages, because only its beginning is looked at.
            dev = [e for row in itertools.zip_longest(*(dev for _, dev, *_ in parts.values())) for e in row if e is not None]
            how = f"train of {len(parts)} languages, dev of each or part of its train"
            trainings.append(Training(task, dataset.name, "+".join(parts), how,
                                      [e for train, *_ in parts.values() for e in train], dev, scored))
    return trainings


def part(name, splits, code, split):
    """A language's splits, trained on `split` of them -> (train, dev, {split: examples} left to score, how, in words)."""
    rest, how = dict(splits), f"{code} {split}"
    train = rest.pop(split)
    if split == "test":
        rest["test"], train = divide(train, 2)
        how = f"half of {how}, of all languages the other half is scored"
    if split == "train" and "dev" in rest and "test" in rest:
        return train, rest.pop("dev"), rest, f"{how}, dev {code} dev"
    count = len(train)
    train, dev = divide(train, 10)
    if not dev:
        raise ValueError(f"{name} {code} {split}: {count} training examples are too few, or of one article, to keep some for "
                         "dev; add data, or raise --limit")
    return train, dev, rest, f"{how}, {len(dev)} of it dev"


def targets(name, found):
    """[(data set, language, split, examples)] of all languages that have something to score."""
    return [(name, code, split, row[split]) for code, row in found.items() if (split := scored_split(row)) and row[split]]


def divide(examples, every):
    """-> (rest, each `every`-th, of fewer than 2 * every each second or so; none of one). Examples that have an `article`
    stay together with the others of it."""
    keys = [getattr(example, "article", i) for i, example in enumerate(examples)]
    groups = {key: n for n, key in enumerate(sorted(set(keys)))}     # as in the file, not as drawn
    every = min(every, max(2, len(groups) // 2))
    chosen = [groups[key] % every == every - 1 for key in keys]
    return [e for e, c in zip(examples, chosen) if not c], [e for e, c in zip(examples, chosen) if c]


def tokens_wanted(training, tokenizer, max_length):
    """Tokens that a whole run of the training reads, as a sample tells."""
    sample = training.train[::-(-len(training.train) // 64)]
    items = HEADS[training.task](tokenizer, max_length, training.train).items(sample, learn=True)
    return HEADS[training.task].epochs * len(training.train) / len(sample) * sum(len(item.ids) for item in items)


def fine_tune(report, training, model, tokenizer, prefix, seeds, dtype, deadline, like, say, first_seed=0, to_the_end=False,
              rates=RATES, pool=None, workers=1):
    """Train, then score every target with every seed."""
    began = time.monotonic()
    name = training.task
    task = HEADS[name](tokenizer, model.config.max_length, training.train, prefix)
    train = training.train, task.items(training.train, learn=True)          # (examples, items)
    dev = training.dev[:DEV], task.items(training.dev[:DEV])
    scored = [(*target, task.items(target[3])) for target in training.targets]
    encoder, rest = finetune.compact(model, [train[1], dev[1]], [items for *_, items in scored])
    steps = max(1, task.epochs * len(training.train) // finetune.BATCH)
    plan = wanted = finetune.Plan(steps, rates, seeds)
    step_time = None
    this = name, training.data, training.source
    before = next((t for t in like["training"] if (t["task"], t["data"], t["source"]) == this), None) if like else None
    if before:
        plan = finetune.Plan(before["steps"], tuple(map(float, before["sweep"])), len(before["seeds"]),
                             before["share_of_test"], before["batch"])
        dev = shorten(dev, before["dev_examples"])
    elif deadline < float("inf"):
        arguments = (encoder, task, train, dev, 8192, dtype)
        step_time, look, each = pool.submit(finetune.timings, *arguments).result() if pool else finetune.timings(*arguments)
        # All looks at dev together get a tenth of the time.
        share = min(1.0, 0.1 * (deadline - time.monotonic()) / (finetune.CHECKS * look))
        dev, look = shorten(dev, max(50, int(share * len(dev[0])))), share * look
        test = each * sum(len(item.ids) for *_, items in scored for item in items)
        slower = max(1.0, workers / finetune.cores())
        plan = finetune.plan(wanted, deadline - time.monotonic(), {n: slower * s for n, s in step_time.items()}, slower * look,
                             test, workers)
        if plan != wanted:
            report.note(f"{name} on {training.data}: cut to fit the budget: {plan.steps} of {wanted.steps} steps"
                        + f" of {plan.batch} instead of {wanted.batch} examples" * (plan.batch != wanted.batch) + ", "
                        f"{len(plan.rates)} of {len(rates)} learning rates, {plan.seeds} of {seeds} seeds, "
                        f"{plan.share:.0%} of each test split, drawn", say)
        deadline -= plan.seeds * plan.share * test
    if plan.share < 1:
        scored = [(*where, *shorten((examples, items), max(50, int(plan.share * len(examples)))))
                  for *where, examples, items in scored]
    whole = {training.data: list(training.train)}      # of each data set, before a budget cuts it
    for data, _, _, examples in training.targets:
        whole.setdefault(data, []).extend(examples)
    say(f"{name}: training on {training.data} {training.source} ({len(training.train):,} examples; {training.how})")
    tables, done, tasks_as_scored = [[] for _ in scored], [], []
    for data, language, *_ in scored:
        as_scored, note = task.target(data, language, whole[data])
        tasks_as_scored.append(as_scored)
        if note:
            report.note(f"{data} {language}: {note}", say)
    for run, sweep in finetune.runs(encoder, task, train, dev, plan, dtype=dtype, first_seed=first_seed,
                                    deadline=float("inf") if to_the_end else deadline, pool=pool, workers=workers):
        done.append(run)
        finetune.extend(run.net, rest)
        say(f"  seed {run.seed}: lr {run.lr:g}, {run.steps} steps in {run.seconds:.0f} s, dev {run.dev:.3f}")
        for table, as_scored, (*_, examples, items) in zip(tables, tasks_as_scored, scored):
            table.append(finetune.evaluate(run.net, as_scored, examples, items, dtype=dtype)[1])
        run.net = None
    if any(run.stopped == "budget" for run in done):
        report.note(f"{name} on {training.data}: the budget ended runs early, after "
                    f"{', '.join(str(run.steps) for run in done)} of {plan.steps} steps", say)
    for table, (data, language, split, examples, _) in zip(tables, scored):
        row = cell(name, data, language, split, examples, table)
        report.value["cells"].append(row)
        scores = row["scores"]
        say(f"{name:12}{data:24}{language:10}{row['n']:>7}  {np.mean(scores):.3f}"
            + (f"  (seeds {min(scores):.3f} to {max(scores):.3f})" if len(scores) > 1 else ""))
    report.value["training"].append({
        "task": name, "data": training.data, "source": training.source, "how": training.how,
        "examples": len(training.train), "dev_examples": len(dev[0]), "batch": plan.batch,
        "steps": plan.steps, "steps_wanted": wanted.steps, "sweep": {f"{lr:g}": score for lr, score in sweep.items()},
        "lr": done[0].lr, "seeds": [run.seed for run in done], "dev": [run.dev for run in done],
        "steps_done": [run.steps for run in done], "stopped": [run.stopped for run in done],
        "share_of_test": plan.share, "seconds_a_step": step_time and step_time[plan.batch],
        "seconds": round(time.monotonic() - began, 1)})


def shorten(split, count):
    """(examples, items) -> those of the first `count` examples."""
    examples, items = split
    return examples[:count], [item for item in items if item.example < count]
