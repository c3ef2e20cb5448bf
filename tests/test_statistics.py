"""eval/statistics.py against scipy, closed forms and simulation."""
import itertools
import math

import numpy as np
import pytest

from eval import metrics, statistics


# ---- relative improvement -----------------------------------------------------------------------------------

def test_relative_improvement_by_hand():
    baseline = {"ner": {"de": 0.5, "sw": 0.2}, "nli": {"en": 0.8}}
    system = {"ner": {"de": 0.55, "sw": 0.3}, "nli": {"en": 0.76}}
    result = statistics.relative_improvement(system, baseline)
    assert result.cells["ner"] == pytest.approx({"de": 10, "sw": 50})
    assert result.tasks == pytest.approx({"ner": 30, "nli": -5})
    assert result.mean == pytest.approx(12.5)                 # over tasks; over the three cells it would be 18.3


def test_relative_improvement_refuses():
    one = {"nli": {"en": 0.5}}
    for system, baseline, message in [
        ({"nli": {"en": 0.5, "de": 0.5}}, one, "nli: languages that only one side has: de"),
        ({"ner": {"en": 0.5}}, one, "tasks that only one side has: ner, nli"),
        (one, {"nli": {"en": 0.0}}, "nli en: a relative improvement needs a baseline above 0"),
        ({"nli": {"en": float("nan")}}, one, "nli en: a score is not a finite number"),
        ({}, {}, "no task"), ({"nli": {}}, {"nli": {}}, "nli: no language"),
    ]:
        with pytest.raises(ValueError, match=message):
            statistics.relative_improvement(system, baseline)


# ---- bootstrap ----------------------------------------------------------------------------------------------

def cell(rng, n=50, seeds=2, gain=0.1, base=0.5):
    """Right or wrong on n examples: [seeds, n, 1] for both systems, correlated through the example's difficulty."""
    difficulty = rng.random(n)
    table = [(rng.random((seeds, n, 1)) * 0.6 + difficulty[None, :, None] * 0.4 < p).astype(float)
             for p in (base + gain, base)]
    return statistics.Cell(metrics.mean, *table)


def test_bootstrap_estimate_is_the_relative_improvement():
    rng = np.random.default_rng(0)
    tags = rng.integers(1, 5, (2, 3, 40, 3)).astype(float)
    tags[..., 0] = np.minimum(tags[..., 1], tags[..., 2]) - rng.integers(0, 2, (2, 3, 40))
    pairs = rng.normal(size=(2, 3, 40, 2)) + 3 * rng.normal(size=(1, 1, 40, 1))
    cells = {"ner": {"de": statistics.Cell(metrics.f1_from_counts, *tags)},
             "sts": {"de": statistics.Cell(metrics.spearman, *pairs)},
             "nli": {"de": cell(rng), "sw": cell(rng)}}
    scores = [{task: {language: np.mean([c.score(*run.T) for run in getattr(c, side)])
                      for language, c in row.items()} for task, row in cells.items()}
              for side in ("system", "baseline")]
    result = statistics.bootstrap(cells, resamples=200)
    assert result.estimate == pytest.approx(statistics.relative_improvement(*scores).mean)
    assert result.replicates.shape == (200,)
    assert [(result.replicates < edge).sum() for edge in (result.low, result.high)] == [5, 195]
    again, other = statistics.bootstrap(cells, resamples=200), statistics.bootstrap(cells, resamples=200, seed=1)
    assert (result.replicates == again.replicates).all() and (result.replicates != other.replicates).any()


def test_bootstrap_levels_have_their_closed_form_variance():
    """With one level drawn, the replicate variance is that of a mean of k draws: var / k."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=12)

    def constant(v, seeds=1, n=3):                          # a cell whose difference is v for every example and seed
        return statistics.Cell(metrics.mean, np.full((seeds, n, 1), v), np.zeros((seeds, n, 1)))

    by_task = {str(i): {"x": constant(v)} for i, v in enumerate(values)}
    by_language = {"t": {str(i): constant(v) for i, v in enumerate(values)}}
    by_example = {"t": {"x": statistics.Cell(metrics.mean, values[None, :, None], np.zeros((1, 12, 1)))}}
    by_seed = {"t": {"x": statistics.Cell(metrics.mean, np.repeat(values[:, None, None], 3, 1), np.zeros((12, 3, 1)))}}
    for level, cells in zip(statistics.LEVELS, (by_task, by_language, by_example, by_seed)):
        result = statistics.bootstrap(cells, resamples=20000, relative=False, levels=(level,))
        assert result.estimate == pytest.approx(values.mean())
        assert result.replicates.var() == pytest.approx(values.var() / 12, rel=0.05), level
        other = [l for l in statistics.LEVELS if l != level]
        assert statistics.bootstrap(cells, resamples=50, relative=False, levels=other).replicates.std() < 1e-12


def test_bootstrap_draws_seeds_once_a_task():
    """A seed that shifts every language together must not average out over languages."""
    shift = np.array([-1.0, 1.0])[:, None, None] * np.ones((2, 4, 1))
    row = {str(i): statistics.Cell(metrics.mean, shift, 0 * shift) for i in range(30)}
    result = statistics.bootstrap({"t": row}, resamples=4000, relative=False)
    assert result.replicates.var() == pytest.approx(0.5, rel=0.1)      # var / 2 seeds; nested it would be 0.5 / 30


def test_bootstrap_pairs_the_systems():
    """Two systems that agree on every example differ by nothing in every replicate."""
    same = np.random.default_rng(2).random((3, 60, 1))
    result = statistics.bootstrap({"t": {"x": statistics.Cell(metrics.mean, same, same)}}, resamples=100)
    assert (result.replicates == 0).all()


def test_bootstrap_interval_covers():
    """The 95% interval holds the true improvement in about 95% of simulated studies.

    25 tasks, because a percentile interval over k tasks is too narrow by about sqrt(1 - 1/k), and 400 studies: the
    share lies within 0.95 +- 0.045 (four standard errors of 400 draws), less 0.02 for the narrowness.
    """
    rng = np.random.default_rng(3)
    inside = 0
    for study in range(400):
        cells = {}
        for task in range(25):
            task_effect = 1 + rng.normal() * 0.5
            cells[str(task)] = {}
            for language in range(3):
                effect = task_effect + rng.normal() * 0.5
                noise = 0.5 * rng.normal(size=(2, 8, 1)) + 0.3 * rng.normal(size=(2, 1, 1))
                cells[str(task)][str(language)] = statistics.Cell(metrics.mean, effect + noise, np.zeros((2, 8, 1)))
        result = statistics.bootstrap(cells, resamples=200, relative=False, seed=study)
        inside += result.low <= 1 <= result.high
    assert 0.885 <= inside / 400 <= 0.995, inside / 400


def test_bootstrap_refuses():
    ones = np.ones((1, 4, 1))
    with pytest.raises(ValueError, match="t x: both systems need"):
        statistics.bootstrap({"t": {"x": statistics.Cell(metrics.mean, ones, ones[:, :3])}})
    with pytest.raises(ValueError, match="t x: a relative improvement needs a baseline above 0"):
        statistics.bootstrap({"t": {"x": statistics.Cell(metrics.mean, ones, 0 * ones)}})
    with pytest.raises(ValueError, match="levels are task, language, example, seed, not year"):
        statistics.bootstrap({"t": {"x": statistics.Cell(metrics.mean, ones, ones)}}, levels=("year",))
    with pytest.raises(ValueError, match="different numbers of seeds"):
        statistics.bootstrap({"t": {"x": statistics.Cell(metrics.mean, ones, ones),
                                    "y": statistics.Cell(metrics.mean, *[np.ones((2, 4, 1))] * 2)}})
    with pytest.raises(ValueError, match="no cell"):
        statistics.bootstrap({})


# ---- Wilcoxon, permutation ----------------------------------------------------------------------------------

def enumerated(differences, statistic):
    """Two-sided p of a sign-symmetric statistic by listing all sign patterns."""
    observed = abs(statistic(differences))
    flips = itertools.product([1, -1], repeat=len(differences))
    return np.mean([abs(statistic(differences * s)) >= observed - 1e-9 for s in flips])


def signed_ranks(d):
    ranks = np.array([(np.abs(d) < abs(v)).sum() + ((np.abs(d) == abs(v)).sum() + 1) / 2 for v in d])
    return (np.sign(d) * ranks).sum()


def test_tests_are_exact_by_enumeration():
    rng = np.random.default_rng(4)
    for case in range(60):
        d = rng.normal(0.3, 1, int(rng.integers(1, 10)))
        if case % 2:
            d = np.round(d * 2) + 0.0                                 # ties; zeros are dropped
        kept = d[d != 0]
        expected = enumerated(kept, signed_ranks) if kept.size else 1.0
        assert statistics.wilcoxon(d)[1] == pytest.approx(expected, abs=1e-12), d
        assert statistics.permutation_test(d) == pytest.approx(enumerated(d, np.sum), abs=1e-12), d


def test_closed_forms():
    assert statistics.wilcoxon([1, 2, 3, 4, 5, 6]) == (0, pytest.approx(2 / 2 ** 6))
    assert statistics.permutation_test([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 2 ** 6)
    assert statistics.permutation_test([0.1] * 10) == pytest.approx(2 / 2 ** 10)     # rounding does not split ties
    # All of one size: a sign test, so P(at most 2 of 12 minus signs), twice.
    signs = [1.0] * 10 + [-1.0] * 2
    assert statistics.wilcoxon(signs)[1] == pytest.approx(2 * sum(math.comb(12, k) for k in range(3)) / 2 ** 12)
    assert statistics.wilcoxon([0, 0]) == (0, 1) and statistics.permutation_test([0, 0]) == 1
    for bad in ([], [np.nan, 1], [[1, 2]]):
        with pytest.raises(ValueError, match="list of finite differences"):
            statistics.wilcoxon(bad)


def test_wilcoxon_equals_scipy():
    stats = pytest.importorskip("scipy.stats", reason="waits for scipy to compare with")
    rng = np.random.default_rng(5)
    for case in range(300):
        small = rng.normal(0.2, 1, int(rng.integers(2, 51)))
        reference = stats.wilcoxon(small, method="exact")
        assert statistics.wilcoxon(small) == pytest.approx((reference.statistic, reference.pvalue), abs=1e-12)
        large = rng.normal(0.1, 1, int(rng.integers(60, 300)))
        if case % 2:
            large = np.round(large, 1)                                # ties and zeros
        reference = stats.wilcoxon(large, method="approx", correction=False, zero_method="wilcox")
        if (large != 0).sum() > 50:
            assert statistics.wilcoxon(large) == pytest.approx((reference.statistic, reference.pvalue), abs=1e-12)


def test_permutation_equals_scipy():
    stats = pytest.importorskip("scipy.stats", reason="waits for scipy to compare with")
    rng = np.random.default_rng(6)
    for _ in range(20):
        d = rng.normal(0.4, 1, int(rng.integers(3, 13)))
        reference = stats.permutation_test((d, np.zeros_like(d)), lambda x, y, axis: (x - y).mean(axis),
                                           vectorized=True, permutation_type="samples", n_resamples=np.inf)
        assert statistics.permutation_test(d) == pytest.approx(reference.pvalue, abs=1e-12)


def test_permutation_by_sampling_agrees_with_the_exact_tail():
    """Beyond 16 the signs are drawn: equal differences have a binomial tail to compare with."""
    d = np.array([1.0] * 18 + [-1.0] * 6)
    exact = 2 * sum(math.comb(24, k) for k in range(7)) / 2 ** 24                    # 0.0227
    sampled = statistics.permutation_test(d)
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 100_000)) and sampled != exact
    assert sampled == statistics.permutation_test(d) != statistics.permutation_test(d, seed=1)
    assert statistics.permutation_test([1.0] * 40) == pytest.approx(1 / 100_001)     # never 0


def test_holm_is_the_closure_of_bonferroni():
    """Holm's adjusted p is the largest |S| * min(p in S) over all sets S with this hypothesis (Marcus 1976)."""
    rng = np.random.default_rng(7)
    for _ in range(200):
        p = np.round(rng.random(int(rng.integers(1, 7))) ** 2, 2)
        sets = [s for k in range(1, p.size + 1) for s in itertools.combinations(range(p.size), k)]
        expected = [min(1, max(len(s) * p[list(s)].min() for s in sets if i in s)) for i in range(p.size)]
        assert statistics.holm(p) == pytest.approx(expected, abs=1e-12)
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.holm([0.5, 1.2])


# ---- power --------------------------------------------------------------------------------------------------

def test_power_is_the_size_without_an_effect():
    # The exact test's attainable size: with 6 languages only W = 0 rejects (2/64); with 5 nothing does.
    assert statistics.power(0, 1, 0, 6, 1, simulations=40_000) == pytest.approx(2 / 64, abs=4 * 0.0009)
    assert statistics.power(9, 1, 0, 5, 1) == 0
    assert statistics.power(1, 0, 0, 6, 1) == 1 and statistics.power(0, 0, 0, 6, 1) == 0


def test_what_all_languages_share_is_not_averaged_out_by_more_of_them():
    """No effect, but models that differ by chance: the more languages, the surer the test is of it."""
    alone, shared = (statistics.power(0, 0.02, 0.03, 12, 3, sd_run=run) for run in (0, 0.03))
    assert alone < 0.06 and shared > 0.3
    assert statistics.power(0, 0, 0, 12, 3, sd_run=1) > 0.95


def test_parallel_examples_are_drawn_once():
    """Two languages whose examples are the same know no more than one of them; drawn anew they would seem to."""
    shift = np.random.default_rng(5).normal(size=(1, 40, 1))
    spread = {}
    for parallel in (None, "x"):
        row = {code: statistics.Cell(metrics.mean, shift, 0 * shift, parallel) for code in ("de", "fr")}
        spread[parallel] = statistics.bootstrap({"t": row}, 4000, relative=False, levels=("example",)).replicates.std()
    assert spread["x"] == pytest.approx(shift.std() / 40 ** 0.5, rel=0.05)
    assert spread[None] == pytest.approx(spread["x"] / 2 ** 0.5, rel=0.05)


def test_power_counts_what_wilcoxon_rejects():
    """The same draws through the test itself."""
    differences = 0.7 + np.random.default_rng(0).standard_normal((500, 12))
    rejected = np.mean([statistics.wilcoxon(d)[1] <= 0.05 for d in differences])
    assert statistics.power(0.7, 1, 0, 12, 3, simulations=500) == rejected


def test_power_is_near_its_closed_form():
    """For normal differences Wilcoxon has the t-test's power at 3 / pi = 0.955 of the sample (Pitman)."""
    stats = pytest.importorskip("scipy.stats", reason="waits for scipy (non-central t)")
    for n, effect in [(40, 0.45), (60, 0.4), (80, 0.25)]:
        m = n * 3 / math.pi
        edge = stats.t.ppf(0.975, m - 1)
        shift = effect * math.sqrt(m)
        expected = stats.nct.sf(edge, m - 1, shift) + stats.nct.cdf(-edge, m - 1, shift)
        # spreads 0.6 between languages and 1.6 between 4 seeds make sqrt(0.36 + 0.64) = 1
        assert statistics.power(effect, 0.6, 1.6, n, 4, simulations=20_000) == pytest.approx(expected, abs=0.02)


def test_fewest_languages_and_seeds():
    needed = statistics.languages_needed(0.5, 0.6, 1.6, seeds=4)
    assert 30 <= needed <= 38                                  # t-test: 34 for power 0.8; Wilcoxon 34 / 0.955 = 36
    assert statistics.power(0.5, 0.6, 1.6, needed, 4) >= 0.8 > statistics.power(0.5, 0.6, 1.6, needed - 2, 4)
    assert statistics.seeds_needed(0.5, 0, 1.6, languages=needed) in (3, 4, 5)
    assert statistics.seeds_needed(0.2, 1, 1, languages=10) is None
    assert statistics.languages_needed(0.01, 1, 1, seeds=1) is None


def test_effect_spread_recovers_the_model():
    rng = np.random.default_rng(8)
    differences = 0.5 + 0.3 * rng.normal(size=(1, 4000)) + 0.8 * rng.normal(size=(5, 4000))
    assert statistics.effect_spread(differences) == pytest.approx((0.5, 0.3, 0.8, 0), abs=0.03)
    differences = 0.5 + 0.3 * rng.normal(size=(1, 500)) + 0.8 * rng.normal(size=(500, 500)) + 0.4 * rng.normal(size=(500, 1))
    assert statistics.effect_spread(differences) == pytest.approx((0.5, 0.3, 0.8, 0.4), abs=0.05)
    assert statistics.effect_spread([[1, 3], [3, 1]])[1] == 0  # all spread is the seeds'
    with pytest.raises(ValueError, match="at least 2 of each"):
        statistics.effect_spread([[1, 2, 3]])
