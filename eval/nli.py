"""Natural-language inference and paraphrase: two sentences, one label. TSV, CSV or JSONL.

Reads XNLI (language, gold_label, sentence1, sentence2 among other columns), PAWS-X (label 0 or 1), and
premise, hypothesis, label with or without a header. Scored by accuracy (`Classification`).
"""
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from data import BOS, EOS, encode_text
from eval import finetune, metrics, tasks

NAMES = {"premise": "premise", "sentence1": "premise", "premise_text": "premise",
         "hypothesis": "hypothesis", "hypo": "hypothesis", "sentence2": "hypothesis",
         "label": "label", "gold_label": "label", "language": "language", "lang": "language"}
HIDDEN = {"", "-", "?", "-1", "hidden", "unknown", "none", "null"}
SPELLINGS = {"contradictory": "contradiction", "e": "entailment", "n": "neutral", "c": "contradiction"}


@dataclass(frozen=True)
class Pair:
    """label: "entailment", "neutral", "contradiction"; data sets with numbers keep them ("0", "1")."""
    premise: str
    hypothesis: str
    label: str


def load(folder, splits=None):
    """One data set -> {language: {split: [Pair]}}.

    Raises ValueError with file and line for a missing or hidden label, a missing sentence or field or an
    empty file, with the file for one with a single label, and for labels that differ between the files.
    """
    data = tasks.collect(folder, (".tsv", ".csv", ".jsonl"), read, splits)
    check_labels(data, folder)
    return data


def read(path, language):
    """(language, Pair) of one file; a language column overrides the file name."""
    pairs = []
    for line, row in tasks.read_table(path, ("premise", "hypothesis", "label"), NAMES):
        if row["label"] is None or row["label"].strip().lower() in HIDDEN:
            raise ValueError(f"{path}:{line}: no label: a hidden test set cannot be scored")
        for column in ("premise", "hypothesis"):
            if not (row[column] or "").strip():
                raise ValueError(f"{path}:{line}: no {column}")
        label = row["label"].strip().lower()
        pairs.append((tasks.spoken(row) or language,
                      Pair(row["premise"].strip(), row["hypothesis"].strip(), SPELLINGS.get(label, label))))
    if len(pairs) >= 10 and len({pair.label for _, pair in pairs}) == 1:
        raise ValueError(f"{path}: all {len(pairs)} labels are {pairs[0][1].label!r}: "
                         "a hidden test set cannot be scored")
    yield from pairs


def labels(pairs):
    """The labels in use, sorted: the order of the classes."""
    return sorted({pair.label for pair in pairs})


def check_labels(data, where):
    """Raise ValueError for more than three labels, or for a file to score with a label that train lacks."""
    known = set(labels(pair for row in data.values() for pair in row.get("train", [])))
    every = set()
    for language, row in data.items():
        for split, pairs in row.items():
            found = set(labels(pairs))
            if known and found - known:
                raise ValueError(f"{where}: {language} {split} has labels that train lacks: "
                                 f"{', '.join(sorted(found - known))} (train: {', '.join(sorted(known))})")
            every |= found
    if len(every) > 3:
        raise ValueError(f"{where}: more than three labels: {', '.join(sorted(every))}")


# ---- fine-tuning --------------------------------------------------------------------------------------------

class Classification(finetune.Task):
    """<s> premise </s> hypothesis </s> as one sequence; a linear layer on the mean of all its states.

    The mean and not the state of <s>: nothing in pre-training asks <s> for a summary, so that a head on it
    would first have to learn to make one, from few examples.
    """
    epochs = 5
    metric, column_names, score = "accuracy", ("correct",), staticmethod(metrics.mean)

    def __init__(self, tokenizer, max_length, train, prefix=""):
        super().__init__(tokenizer, max_length, train, prefix)
        self.labels = labels(train)
        self.outputs = len(self.labels)

    @staticmethod
    def mismatch(train, pairs):
        here, known = labels(pairs), labels(train)
        return None if set(here) <= set(known) else f"its labels are {', '.join(here)}, not {', '.join(known)}"

    def items(self, pairs, learn=False):
        items = []
        for i, pair in enumerate(pairs):
            a, b = (encode_text(self.tokenizer, text) for text in (pair.premise, pair.hypothesis))
            a, b = cut(a, b, self.limit - 3)
            items.append(finetune.Item(np.array([BOS, *a, EOS, *b, EOS], dtype=np.int64), i,
                                       targets=(self.labels.index(pair.label),)))
        return items

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch.targets, reduction="sum"), len(batch.targets)

    def columns(self, pairs, items, outputs):
        return np.array([[self.labels[int(out[0].argmax())] == pair.label] for pair, out in zip(pairs, outputs)],
                        dtype=np.float64)


def cut(a, b, limit):
    """Two lists -> with `limit` elements together; what is too long is taken off the longer one."""
    keep = max(limit - len(b), limit // 2)
    a = a[:keep]
    return a, b[:limit - len(a)]


HEAD = Classification
