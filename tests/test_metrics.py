"""eval/metrics.py against seeded random cases of the reference implementations, and against stored cases."""
import random
import re
import string
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest

from eval import metrics


# ---- entities: seqeval --------------------------------------------------------------------------------------

@pytest.mark.parametrize("tags, expected", [
    ("O O O", set()),
    ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
    ("I-PER I-PER O", {("PER", 0, 2)}),                                   # an I- after O opens an entity
    ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),                # and so does one of another type
    ("B-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
    ("S-ORG E-ORG I-ORG", {("ORG", 0, 1), ("ORG", 1, 2), ("ORG", 2, 3)}),
    ("B-a-b I-a-b", {("a-b", 0, 2)}),
])
def test_entities_stored(tags, expected):
    assert metrics.entities(tags.split()) == expected


def test_entity_f1_stored():
    # The example of seqeval's documentation: 2 of 3 gold entities are found, with 3 predictions.
    gold = ["O O B-MISC I-MISC B-MISC O O".split(), "B-PER I-PER O".split()]
    predicted = ["O O B-MISC I-MISC B-MISC I-MISC O".split(), "B-PER I-PER O".split()]
    counts = metrics.entity_counts(predicted, gold)
    assert counts.tolist() == [[1, 2, 2], [1, 1, 1]]
    assert metrics.f1_from_counts(*counts.T) == pytest.approx(2 / 3, abs=1e-15)
    assert metrics.f1_from_counts(*metrics.entity_counts([["O"]], [["O"]]).T) == 0


@pytest.mark.filterwarnings("ignore")
def test_entity_f1_equals_seqeval():
    reference = pytest.importorskip("seqeval.metrics", reason="waits for seqeval to compare with")
    from seqeval.metrics.sequence_labeling import get_entities
    rng = random.Random(0)
    iob = ["O"] + [f"{k}-{t}" for k in "BI" for t in ("PER", "LOC")]
    wild = iob + [f"{k}-{t}" for k in "ES" for t in ("PER", "x-y")] + ["B", "I"]
    for case in range(3000):
        labels = wild if case % 3 == 0 else iob
        sentences = [[rng.choice(labels) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 4))]
        guesses = [[t if rng.random() < 0.7 else rng.choice(labels) for t in s] for s in sentences]
        for s in sentences:
            assert metrics.entities(s) == {(t, a, b + 1) for t, a, b in get_entities(s)}, s
        if case % 2 == 0:
            counts = metrics.entity_counts(guesses, sentences)
            ours = metrics.f1_from_counts(*counts.T)
            assert ours == pytest.approx(reference.f1_score(sentences, guesses), abs=1e-12), (sentences, guesses)


def test_entity_counts_refuse_dropped_words():
    with pytest.raises(ValueError, match="sentence 0: 1 predicted tags for 2 words"):
        metrics.entity_counts([["O"]], [["O", "O"]])
    with pytest.raises(ValueError, match="1 predicted sentences for 2"):
        metrics.entity_counts([["O"]], [["O"], ["O"]])


def test_the_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no example"):
        metrics.mean([])
    with pytest.raises(ValueError, match="no sentence"):
        metrics.f1_from_counts([], [], [])


# ---- question answering: the official scripts, written once more from their description ----------------------

def reference_squad(text):
    kept = "".join(" " if c.isspace() else c for c in text.lower() if c not in set(string.punctuation))
    kept = re.sub(r"\b(a|an|the)\b", " ", kept)
    return " ".join(w for w in kept.split(" ") if w)


PUNCTUATION = {chr(i) for i in range(sys.maxunicode) if unicodedata.category(chr(i))[0] == "P"}
PUNCTUATION |= set(string.punctuation)
MLQA_WORDS = {"en": "a an the", "es": "un una unos unas el la los las", "vi": "của là cái chiếc những",
              "de": "ein eine einen einem eines einer der die das den dem des", "hi": "", "zh": ""}


def reference_mlqa(text, language):
    """Word by word, without the expressions that metrics.py shares with the official script."""
    text = "".join(c for c in text.lower() if c not in PUNCTUATION)
    if language == "ar":
        text = text.replace("ال", " ")
    else:
        # \b splits at word characters, so an article counts when no letter, digit or underscore touches it.
        runs = re.findall(r"\w+|\W+", text)
        text = "".join(" " if r in MLQA_WORDS[language].split() else r for r in runs)
    if language != "zh":
        return " ".join(text.split())
    out, word = [], ""
    for c in text:
        if "\u4e00" <= c <= "\u9fa5":
            out += word.split() + [c]
            word = ""
        else:
            word += c
    return " ".join(out + word.split())


def reference_f1(prediction, gold):
    p, g = prediction.split(), gold.split()
    same = sum(min(n, g.count(w)) for w, n in Counter(p).items())
    if same == 0:
        return 0.0
    precision, recall = same / len(p), same / len(g)
    return 2 * precision * recall / (precision + recall)


PIECES = ("the a an The A theatre an. (a) 'the' 1,000 50% U.S. naïve Élan co-op $5 … — “quoted” « der die Dem el las "
          "unos là của những ال البيت والكتاب مال، کتاب 中国 北京市 in the 中 x中y 。 ？ हिन्दी का। é e\u0301 _ a_b \u00a0 "
          "\t ½ № İstanbul ß ﷺ ـ").split(" ")


def random_text(rng):
    pieces = [rng.choice(PIECES) for _ in range(rng.randint(0, 6))]
    return rng.choice(["", " "]).join(pieces) + rng.choice(["", " ", "."])


def test_squad_scores_equal_the_official_semantics():
    rng = random.Random(1)
    for _ in range(4000):
        prediction, answers = random_text(rng), [random_text(rng) for _ in range(rng.randint(1, 3))]
        assert metrics.squad_normalise(prediction) == reference_squad(prediction)
        match, f1 = metrics.answer_scores(prediction, answers)
        p = reference_squad(prediction)
        assert match == max(p == reference_squad(a) for a in answers)
        assert f1 == pytest.approx(max(reference_f1(p, reference_squad(a)) for a in answers), abs=1e-12)


@pytest.mark.parametrize("language", ["en", "es", "hi", "vi", "de", "ar", "zh"])
def test_mlqa_scores_equal_the_official_semantics(language):
    rng = random.Random(language)
    for _ in range(1500):
        prediction, answers = random_text(rng), [random_text(rng) for _ in range(rng.randint(1, 3))]
        normalised = reference_mlqa(prediction, language)
        assert metrics.mlqa_normalise(prediction, language) == normalised, prediction
        match, f1 = metrics.answer_scores(prediction, answers, lambda t: metrics.mlqa_normalise(t, language))
        gold = [reference_mlqa(a, language) for a in answers]
        assert match == max(normalised == g for g in gold)
        assert f1 == pytest.approx(max(reference_f1(normalised, g) for g in gold), abs=1e-12)


def test_normalisation_stored():
    assert metrics.squad_normalise("The  U.S. (an) Army — “A”") == "us army — “ ”"
    assert metrics.mlqa_normalise("The  U.S. (an) Army — “A”", "en") == "us army"
    assert metrics.mlqa_normalise("Das Haus, der Hof", "de") == "haus hof"
    assert metrics.mlqa_normalise("北京 abc市!", "zh") == "北 京 abc 市"
    assert metrics.mlqa_normalise("المال في البيت", "ar") == "م في بيت"           # "al" goes inside words too
    with pytest.raises(ValueError, match="no normalisation for 'ro'"):
        metrics.mlqa_normalise("x", "ro")


def test_answer_scores_stored():
    assert metrics.answer_scores("the cat", ["Cat.", "dog"]) == (1.0, 1.0)
    assert metrics.answer_scores("black cat", ["dog", "the cat"]) == (0.0, pytest.approx(2 / 3))
    assert metrics.answer_scores("the", ["a"]) == (1.0, 0.0)             # SQuAD 1.1: both empty, F1 0
    with pytest.raises(ValueError, match="without gold answers"):
        metrics.answer_scores("x", [])


# ---- correlation: scipy -------------------------------------------------------------------------------------

def test_correlation_stored():
    x, y = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    assert metrics.pearson(x, y) == pytest.approx(0.8, abs=1e-15)
    assert metrics.spearman(x, y) == pytest.approx(0.8, abs=1e-15)
    # ties: ranks 1.5 1.5 3 4 against 1 3 3 3 -> sum of products 2, sums of squares 4.5 and 3
    assert metrics.spearman([1, 1, 2, 9], [0, 5, 5, 5]) == pytest.approx(2 / np.sqrt(4.5 * 3), abs=1e-15)
    assert metrics.spearman([1, 10, 100], [3, 2, 1]) == -1
    assert metrics.pearson([3, 3, 3], [1, 2, 3]) == 0 and metrics.spearman([3, 3, 3], [1, 2, 3]) == 0
    assert metrics.pearson([0.1] * 7, range(7)) == 0                     # 0.1 * 7 / 7 is not 0.1


def test_correlation_equals_scipy():
    stats = pytest.importorskip("scipy.stats", reason="waits for scipy to compare with")
    rng = np.random.default_rng(2)
    for case in range(2000):
        n = int(rng.integers(3, 60))
        x = rng.normal(size=n) * 10.0 ** rng.integers(-8, 8) + 10.0 ** rng.integers(0, 3)
        y = rng.integers(0, 6, n).astype(float) if case % 2 else x * rng.normal() + rng.normal(size=n)
        if case % 3 == 0:
            x = np.round(rng.normal(size=n))
        if np.ptp(x) <= 1e-6 * np.abs(x).max() or np.ptp(y) == 0:
            continue
        assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
        assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)


def test_correlation_refuses_bad_columns():
    for x, y in [([1.0], [1.0]), ([1, 2], [1, 2, 3]), ([1, np.nan], [1, 2])]:
        with pytest.raises(ValueError, match="a correlation needs"):
            metrics.spearman(x, y)


def test_weights_are_repeated_examples():
    """The promise that the bootstrap rests on: weight w is the same as the example w times."""
    rng = np.random.default_rng(3)
    table = rng.integers(0, 7, (40, 3)).astype(float)
    weights = np.stack([np.bincount(rng.integers(40, size=40), minlength=40) for _ in range(50)])
    for score, columns in [(metrics.mean, 1), (metrics.f1_from_counts, 3), (metrics.pearson, 2),
                           (metrics.spearman, 2)]:
        together = score(*table.T[:columns], weights=weights)
        one_by_one = [score(*np.repeat(table, w, axis=0).T[:columns]) for w in weights]
        assert together == pytest.approx(one_by_one, abs=1e-12), score


# ---- retrieval ----------------------------------------------------------------------------------------------

def test_retrieval_equals_a_plain_loop():
    rng = np.random.default_rng(4)
    for _ in range(200):
        n, d = int(rng.integers(1, 30)), int(rng.integers(2, 6))
        x = rng.normal(size=(n, d)) + 3 * rng.normal(size=d)
        y = x + 0.5 * rng.normal(size=(n, d)) + 3 * rng.normal(size=d)
        for centre in (False, True):
            for found, (a, b) in zip(metrics.retrieval_hits(x, y, centre), [(x, y), (y, x)]):
                p, q = a - centre * a.mean(0), b - centre * b.mean(0)
                cosine = [[float(u @ v / max(np.sqrt(u @ u) * np.sqrt(v @ v), 1e-300)) for v in q] for u in p]
                assert found.tolist() == [max(range(n), key=row.__getitem__) == i for i, row in enumerate(cosine)]


def test_retrieval_centring_removes_a_language_offset():
    rng = np.random.default_rng(5)
    meaning = rng.normal(size=(1500, 16))                                # over one chunk of 1024 queries
    offset = np.zeros(16)
    offset[0] = 1e5
    assert metrics.retrieval_hits(meaning + offset, meaning)[0].mean() < 0.01        # raw: all queries point the same way
    assert metrics.retrieval_hits(meaning + offset, meaning, centre=True).all()
    same = np.ones((10, 4))
    assert metrics.retrieval_hits(same, same).mean() == 0.1              # collapsed: chance
    for bad in (np.ones((3, 4)), np.full((10, 4), np.nan)):
        with pytest.raises(ValueError, match="retrieval needs"):
            metrics.retrieval_hits(same, bad)
