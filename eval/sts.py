"""Semantic textual similarity: two sentences and a score from 0 to 5. CSV, TSV or JSONL.

Reads the multilingual STS benchmark (s1, s2, score without a header, quoted fields) and any table with a
header of sentence1, sentence2, score. Scored by Spearman's correlation (`show` has Pearson's too) between the cosine of
the two sentence vectors and the gold score: without any training (`cosines`), or after training that cosine
(`Similarity`).
"""
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from data import encode_text
from eval import finetune, metrics, tasks

NAMES = {"sentence1": "sentence1", "s1": "sentence1", "text1": "sentence1",
         "sentence2": "sentence2", "s2": "sentence2", "text2": "sentence2",
         "score": "score", "similarity": "score", "similarity_score": "score", "label": "score",
         "language": "language", "lang": "language"}


@dataclass(frozen=True)
class Pair:
    """score: 0 (unrelated) to 5 (the same)."""
    sentence1: str
    sentence2: str
    score: float


def load(folder, splits=None):
    """One data set -> {language: {split: [Pair]}}.

    Raises ValueError with file and line for a score that is missing, no number or not in 0..5, a missing
    sentence or field, or an empty file, and with the file where all scores are equal (a hidden test set).
    """
    return tasks.collect(folder, (".csv", ".tsv", ".jsonl"), read, splits)


def read(path, language):
    """(language, Pair) of one file; a language column overrides the file name."""
    pairs = []
    for line, row in tasks.read_table(path, ("sentence1", "sentence2", "score"), NAMES):
        if not (row["score"] or "").strip():
            raise ValueError(f"{path}:{line}: no score: a hidden test set cannot be scored")
        try:
            score = float(row["score"])
        except ValueError:
            raise ValueError(f"{path}:{line}: the score {row['score']!r} is not a number") from None
        if not 0 <= score <= 5:                            # nan is not either
            raise ValueError(f"{path}:{line}: the score {row['score']} is not between 0 and 5")
        for column in ("sentence1", "sentence2"):
            if not (row[column] or "").strip():
                raise ValueError(f"{path}:{line}: no {column}")
        pair = Pair(row["sentence1"].strip(), row["sentence2"].strip(), score)
        pairs.append((tasks.spoken(row) or language, pair))
    if len(pairs) >= 2 and len({pair.score for _, pair in pairs}) == 1:
        raise ValueError(f"{path}: all {len(pairs)} scores are {pairs[0][1].score:g}: nothing to correlate with")
    yield from pairs


# ---- scores -------------------------------------------------------------------------------------------------

def cosine(x, y):
    """Row-wise cosine of x, y [n, H] -> float64 [n]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(1) / np.maximum(norm, 1e-30)


def cosines(model, tokenizer, pairs, prefix="", **options):
    """[Pair] -> float64 [n, 2]: cosine of the untrained sentence vectors, gold score. Options: finetune.vectors."""
    found = finetune.vectors(model, tokenizer, [prefix + p.sentence1 for p in pairs]
                             + [prefix + p.sentence2 for p in pairs], **options)
    return np.stack([cosine(found[:len(pairs)], found[len(pairs):]), [p.score for p in pairs]], axis=1)


class Similarity(finetune.Task):
    """Fine-tuning: the cosine of two mean-pooled sentences is fitted to score / 5 by squared error.

    Two encoders and no new weights, not a regression head on the joined pair: it starts from the geometry
    that the model already has, so that few steps suffice, and the vectors stay usable for search.
    """
    epochs = 10
    metric, column_names, score = "Spearman", ("predicted", "gold"), staticmethod(metrics.spearman)
    also = (("Pearson", metrics.pearson),)

    def items(self, pairs, learn=False):
        return [finetune.Item(finetune.sequence(encode_text(self.tokenizer, self.prefix + text), self.limit), i,
                              targets=(pair.score / 5,) if side == 0 else ())
                for i, pair in enumerate(pairs) for side, text in enumerate((pair.sentence1, pair.sentence2))]

    def loss(self, outputs, batch):
        loss = (F.cosine_similarity(outputs[::2], outputs[1::2]) - batch.targets).square().sum()
        return loss, len(batch.targets)

    def columns(self, pairs, items, outputs):
        found = np.concatenate(outputs)
        return np.stack([cosine(found[::2], found[1::2]), [p.score for p in pairs]], axis=1)


HEAD = Similarity
