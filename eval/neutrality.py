"""How much language is left in the sentence vectors, and what else was lost with it. Layer by layer.

An adversary that is fooled proves little: it may only have been weak (arXiv 1808.06640). So the question is put
to probes that are trained afresh on the finished model, on sentences that training never saw:

linear, mlp         test accuracy of language probes; `prior` is that of a guess
centred             that of the linear probe after each language's mean is subtracted: what an adversary has to
                    beat, for this takes no training
between             share of the variance that lies between the languages' centroids; `between_chance` is its
                    expectation for random labels, (k - 1) / (n - 1)
cka, cka_chance     linear CKA (arXiv 1905.00414) of translations, and of shuffled ones: few rows inflate it
retrieval, retrieval_centred    accuracy between each language and English, both directions
effective_rank, mean_cosine     of all vectors: neutral because collapsed shows here

Validation MLM loss by resource tier, the other price, is in the training run's metrics.jsonl.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from eval import finetune, metrics

LEAST = 6                 # sentences of a language that is measured
SENTENCES = 150           # of each language at most; every third is for testing the probes
TOTAL = 4000              # sentences of all languages, translations not counted: bounds the time of the probes
STEPS = 150
MEASURES = ("linear", "mlp", "centred", "between", "cka", "cka_chance", "retrieval", "retrieval_centred", "effective_rank",
            "mean_cosine")   # of a layer; `between_chance` comes with them
DRAWN = 12, 25            # languages and sentences of each on the map of the report page


def measure(model, tokenizer, languages, prefix="", dtype=torch.float32, say=None):
    """{code: [retrieval.Pair]} -> {"languages", "n", "prior", "layers": [a dict a layer, the embeddings first], "map":
    {code: [[x, y]]}}, the map being the first two principal components of the last layer.

    Each language gives its first pairs, at most SENTENCES, and equally many where TOTAL cuts them. The
    translations of all languages stand for English in retrieval and CKA, those of the first one for English among
    the languages. Raises ValueError where no language has LEAST sentences.
    """
    most = max(LEAST, min(SENTENCES, TOTAL // max(1, len(languages))))
    pairs = {code: rows[:most] for code, rows in languages.items() if len(rows) >= LEAST}
    if not pairs:
        raise ValueError(f"neutrality needs retrieval data: {LEAST} sentences of a language and their translations")
    foreign = [[prefix + p.sentence for p in rows] for rows in pairs.values()]
    english = [[prefix + p.translation for p in rows] for rows in pairs.values()]
    text = [s for rows in foreign + english for s in rows]
    found = finetune.vectors(model, tokenizer, text, dtype=dtype, layers=True)      # [L + 1, n, H]
    sizes = [len(rows) for rows in foreign]
    named = [*pairs, "en"]
    label = np.repeat(np.arange(len(named)), [*sizes, sizes[0]])
    position = np.concatenate([np.arange(n) for n in [*sizes, sizes[0]]])
    held_out = position % 3 == 2          # by line, so that no line has its translation on the other side
    layers = []
    for states in found.astype(np.float64):
        everything = states[:len(label)]               # all foreign sentences, then the English of the first
        sides = (np.split(states[:sum(sizes)], np.cumsum(sizes)[:-1]),
                 np.split(states[sum(sizes):], np.cumsum(sizes)[:-1]))
        layers.append(layer_measures(everything, label, held_out, list(zip(*sides))))
        if say:
            row = layers[-1]
            say(f"neutrality  layer {len(layers) - 1:2}  probe linear {row['linear']:.3f} mlp {row['mlp']:.3f} "
                f"centred {row['centred']:.3f}  between {row['between']:.3f}  retrieval {row['retrieval']:.3f} "
                f"centred {row['retrieval_centred']:.3f}  rank {row['effective_rank']:.0f}")
    counts = np.bincount(label[held_out], minlength=len(named))
    last = found[-1][:len(label)].astype(np.float64)
    drawn = {code: (label == k).nonzero()[0][:DRAWN[1]] for k, code in [*enumerate(named)][-DRAWN[0]:]}
    rows = np.concatenate(list(drawn.values()))
    flat = np.round(principal_components(last[rows]), 4)
    points = dict(zip(drawn, np.split(flat, np.cumsum([len(r) for r in drawn.values()])[:-1])))
    return {"languages": named, "n": len(label), "prior": float(counts.max() / counts.sum()), "layers": layers,
            "map": {code: xy.tolist() for code, xy in points.items()}}


def principal_components(x):
    """x [n, D] -> its first two principal components [n, 2], scaled to -1..1."""
    u, spread, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    flat = u[:, :2] * spread[:2]
    return flat / max(np.abs(flat).max(), 1e-30)


def layer_measures(states, label, held_out, translations):
    """states [n, H], label [n], held_out [n] bool, translations [(x, y)] of parallel rows -> dict."""
    train, test = ~held_out, held_out
    centred = states.copy()
    for k in np.unique(label):
        centred[label == k] -= states[train & (label == k)].mean(0)
    result = {name: probe(x[train], label[train], x[test], label[test], hidden)
              for name, x, hidden in (("linear", states, 0), ("mlp", states, 256), ("centred", centred, 0))}
    rng = np.random.default_rng(0)
    classes = len(np.unique(label))
    hits = [[metrics.retrieval_hits(x, y, centre=c).mean() for c in (False, True)] for x, y in translations]
    return result | {
        "between": between_variance(states, label), "between_chance": (classes - 1) / (len(label) - 1),
        "cka": float(np.mean([cka(x, y) for x, y in translations])),
        "cka_chance": float(np.mean([cka(x, rng.permutation(y)) for x, y in translations])),
        "retrieval": float(np.mean(hits, axis=0)[0]), "retrieval_centred": float(np.mean(hits, axis=0)[1]),
        "effective_rank": effective_rank(states), "mean_cosine": mean_cosine(states)}


def probe(x, label, x_test, label_test, hidden=0, seed=0):
    """Test accuracy of a freshly trained softmax classifier, with one hidden layer of `hidden` units unless 0.

    x [n, D]; features are standardised. Full-batch AdamW, STEPS steps.
    """
    mean, spread = x.mean(0), x.std(0) + 1e-6 * max(1e-12, np.abs(x).max())
    x, x_test = (torch.from_numpy((m - mean) / spread).float() for m in (x, x_test))
    target = torch.from_numpy(label)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classes = int(label.max()) + 1
        net = (nn.Sequential(nn.Linear(x.shape[1], hidden), nn.GELU(), nn.Linear(hidden, classes)) if hidden
               else nn.Linear(x.shape[1], classes))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2 if not hidden else 3e-3, weight_decay=0.1, fused=True)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(x), target).backward()
            optimizer.step()
        with torch.no_grad():
            return float((net(x_test).argmax(1).numpy() == label_test).mean())


def between_variance(x, label):
    """Between-centroid sum of squares over the total one, 0 to 1: R^2 of the language. x [n, D], label [n]."""
    deviation = x - x.mean(0)
    between = sum((label == k).sum() * np.square(deviation[label == k].mean(0)).sum() for k in np.unique(label))
    return float(between / max(np.square(deviation).sum(), 1e-30))


def cka(x, y):
    """Linear CKA of x, y [n, D], rows in correspondence: 1 for the same up to rotation and scale."""
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / max(scale, 1e-30))


def effective_rank(x):
    """exp of the entropy of the covariance's spectrum (Roy & Vetterli 2007, on eigenvalues), 1 to D."""
    values = np.linalg.eigvalsh(np.cov(x.T)).clip(0)
    if values.sum() <= 0:
        return 1.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_cosine(x):
    """Mean cosine over all pairs of different rows of x [n, D]; near 1: every sentence looks alike."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    n = len(x)
    return float((np.square(unit.sum(0)).sum() - np.square(unit).sum()) / (n * (n - 1)))
