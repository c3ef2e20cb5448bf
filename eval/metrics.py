"""Scores of the evaluation tasks, in numpy.

entities, entity_counts   NER: micro F1 over entities, as seqeval by default and conlleval
mean                      NLI; any score that is a mean over examples
squad_normalise, mlqa_normalise, answer_scores    QA: exact match and F1 of the official scripts
pearson, spearman         STS
retrieval_hits            sentence retrieval by cosine

Scores are fractions (0..1) or correlations (-1..1), never percentages.

mean, f1_from_counts, pearson and spearman take the columns of a per-example table and `weights`, an array
[resamples, examples] that says how often each example counts; they return one score a resample. So the
bootstrap of statistics.py rescores thousands of resamples without a loop. With no weights they return one
float.
"""
import re
import string
import unicodedata
from collections import Counter

import numpy as np


# ---- means and ratios over examples -------------------------------------------------------------------------

def mean(values, weights=None):
    """Mean of `values` [n] over examples; [resamples] with `weights` [resamples, n]."""
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("no example to score")
    if weights is None:
        return float(values.mean())
    weights = np.asarray(weights, dtype=np.float64)
    return weights @ values / weights.sum(1)


def f1_from_counts(correct, predicted, gold, weights=None):
    """Micro F1 from per-sentence counts, each [n]; 0 where there is neither a prediction nor an entity."""
    correct, predicted, gold = (np.asarray(c, dtype=np.float64) for c in (correct, predicted, gold))
    if not correct.size:
        raise ValueError("no sentence to score")
    rows = np.ones((1, correct.size)) if weights is None else np.asarray(weights, dtype=np.float64)
    both = rows @ (predicted + gold)
    f1 = np.divide(2 * (rows @ correct), both, out=np.zeros_like(both), where=both > 0)
    return float(f1[0]) if weights is None else f1


# ---- entities -----------------------------------------------------------------------------------------------

def entities(tags):
    """The entities of one sentence as a set of (type, first word, word after the last).

    Reads IOB1, IOB2 and IOBES as conlleval does: B- and S- open an entity, and so does an I- or E- that
    follows O, the end of another entity, or another type. A tag without a type ("B") has the type "_".
    """
    found, start = set(), None
    before, type_before = "O", "_"
    for i, tag in enumerate([*tags, "O"]):
        kind, type_ = tag[0], tag[2:] or "_"
        opens = kind != "O" and (kind in "BS" or before in "OES" or type_ != type_before)
        if start is not None and (opens or kind == "O"):
            found.add((type_before, start, i))
            start = None
        if opens:
            start = i
        before, type_before = kind, type_
    return found


def entity_counts(predicted, gold):
    """Counts for entity F1: two lists of tag sequences -> int64 [sentences, 3] (correct, predicted, gold).

    `f1_from_counts(*counts.T)` is seqeval's f1_score(gold, predicted). Raises ValueError for unequal lengths:
    a model that truncates has to fill up with "O", so that no word is dropped.
    """
    if len(predicted) != len(gold):
        raise ValueError(f"{len(predicted)} predicted sentences for {len(gold)}")
    counts = np.zeros((len(gold), 3), dtype=np.int64)
    for i, (p, g) in enumerate(zip(predicted, gold)):
        if len(p) != len(g):
            raise ValueError(f"sentence {i}: {len(p)} predicted tags for {len(g)} words")
        p, g = entities(p), entities(g)
        counts[i] = len(p & g), len(p), len(g)
    return counts


# ---- question answering -------------------------------------------------------------------------------------

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SQUAD_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_normalise(text):
    """SQuAD 1.1, XQuAD, TyDiQA: lower case, no ASCII punctuation, no English article, single spaces."""
    return " ".join(_SQUAD_ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


MLQA_ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    # The official expression is `\sال^|ال`. Its first half can never match; its second deletes every "al",
    # inside words too. Published scores contain that, so it stays.
    "ar": "ال",
    "hi": None,
    "zh": None,
}


def mlqa_normalise(text, language):
    """MLQA: lower case, no Unicode punctuation, no article of `language`, single spaces; Chinese by character.

    As mlqa_evaluation_v1.py. Raises ValueError for a language that MLQA does not have.
    """
    if language not in MLQA_ARTICLES:
        raise ValueError(f"MLQA has no normalisation for {language!r}, only for {', '.join(MLQA_ARTICLES)}")
    text = "".join(c for c in text.lower()
                   if not unicodedata.category(c).startswith("P") and c not in string.punctuation)
    if MLQA_ARTICLES[language]:
        text = re.sub(MLQA_ARTICLES[language], " ", text)
    if language == "zh":
        text = re.sub("([\u4e00-\u9fa5])", r" \1 ", text)
    return " ".join(text.split())


def answer_scores(prediction, answers, normalise=squad_normalise):
    """(exact match, F1) of a predicted string, each the best over the gold `answers` (strings, at least one).

    `normalise` maps text to text: squad_normalise, or lambda t: mlqa_normalise(t, "de"). As in SQuAD 1.1, two
    empty strings match exactly but have F1 0.
    """
    if not answers:
        raise ValueError("a question without gold answers cannot be scored")
    prediction = normalise(prediction)
    words = prediction.split()
    best_match, best_f1 = 0.0, 0.0
    for answer in map(normalise, answers):
        gold = answer.split()
        common = sum((Counter(words) & Counter(gold)).values())
        best_match = max(best_match, float(prediction == answer))
        if common:
            best_f1 = max(best_f1, 2 * common / (len(words) + len(gold)))
    return best_match, best_f1


# ---- correlation --------------------------------------------------------------------------------------------

def _columns(x, y, weights):
    """Check two columns [n]; return them as float64 with weights [resamples, n]."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise ValueError(f"a correlation needs two columns of one length >= 2, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a correlation needs finite numbers")
    return x, y, np.ones((1, x.size)) if weights is None else np.asarray(weights, dtype=np.float64)


def _correlation(x, y, weights):
    """Weighted Pearson of x and y, [n] or [resamples, n], already centred roughly -> [resamples]."""
    total = weights.sum(1)
    mean_x, mean_y = (weights * x).sum(1) / total, (weights * y).sum(1) / total
    covariance = (weights * x * y).sum(1) / total - mean_x * mean_y
    variance_x = (weights * x * x).sum(1) / total - mean_x ** 2
    variance_y = (weights * y * y).sum(1) / total - mean_y ** 2
    spread = np.sqrt(np.maximum(variance_x, 0) * np.maximum(variance_y, 0))
    # Columns have a largest deviation near 1, so below 1e-13 there is only rounding left.
    result = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 1e-13)
    return np.clip(result, -1, 1)


def _centred(x):
    """x minus its mean, over its largest deviation; zeros where x is constant up to rounding."""
    deviation = x - x.mean()
    largest = np.abs(deviation).max()
    return deviation / largest if largest > 1e-13 * np.abs(x).max() else np.zeros_like(x)


def pearson(x, y, weights=None):
    """Pearson's correlation of two columns [n].

    A constant column gives 0, where scipy gives nan: a collapsed model has learnt nothing, and scores so.
    Raises ValueError for unequal lengths, fewer than 2 examples, or numbers that are not finite.
    """
    x, y, rows = _columns(x, y, weights)
    result = _correlation(_centred(x), _centred(y), rows)
    return float(result[0]) if weights is None else result


def _midranks(values, weights):
    """Ranks 1..N of values [n] in samples where example i occurs weights[b, i] times; ties: the mean rank."""
    order = np.argsort(values, kind="stable")
    new = np.diff(values[order], prepend=-np.inf) != 0
    in_group = np.add.reduceat(weights[:, order], np.flatnonzero(new), axis=1)
    ranks = in_group.cumsum(1) - (in_group - 1) / 2
    group = np.empty(values.size, dtype=np.int64)
    group[order] = new.cumsum() - 1
    return ranks[:, group]


def spearman(x, y, weights=None):
    """Spearman's rank correlation of two columns [n], ties with their mean rank. Otherwise as `pearson`."""
    x, y, rows = _columns(x, y, weights)
    half = (rows.sum(1, keepdims=True) + 1) / 2            # the mean rank, exactly
    ranks = [(_midranks(column, rows) - half) / half for column in (x, y)]
    result = _correlation(*ranks, rows)
    return float(result[0]) if weights is None else result


# ---- retrieval ----------------------------------------------------------------------------------------------

def retrieval_hits(x, y, centre=False):
    """Is the nearest neighbour by cosine the right one? x, y [N, D]: row i of one translates row i of the other.

    Returns bool [2, N]: x -> y, then y -> x. `centre` subtracts each side's (each language's) own mean first.
    Equal cosines go to the lowest index, so a model that maps all sentences to one point is right once in N.
    Raises ValueError for unequal shapes or vectors that are not finite.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape or not len(x):
        raise ValueError(f"retrieval needs two matrices [N, D] of one shape, not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("retrieval needs finite vectors")
    if centre:
        x, y = x - x.mean(0), y - y.mean(0)
    x, y = (m / np.maximum(np.linalg.norm(m, axis=1, keepdims=True), 1e-30) for m in (x, y))
    hits = np.empty((2, len(x)), dtype=bool)
    for row, (queries, index) in enumerate([(x, y), (y, x)]):
        for start in range(0, len(x), 1024):               # never all N x N cosines at once
            nearest = (queries[start:start + 1024] @ index.T).argmax(1)
            hits[row, start:start + 1024] = nearest == np.arange(start, start + len(nearest))
    return hits
