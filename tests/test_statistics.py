"""Statistics of comparisons against scipy, statsmodels, scikit-posthocs and loops; and what they refuse."""

import importlib
import itertools
import math
import re
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scikit_posthocs
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from ildistil.errors import ConfigError, DataError, IldistilError
from ildistil.metrics import metric_collection
from ildistil.study import statistics


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def by_seed(values: Any) -> dict[int, Any]:
    return dict(enumerate(values))


def close(estimate: statistics.Estimate, low: float, high: float, of_width: float) -> bool:
    return max(abs(estimate.low - low), abs(estimate.high - high)) < of_width * (high - low)


# Means and shares.


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_of_a_mean(level: float) -> None:
    values = [81.2, 80.4, 83.0, 79.9]
    found = statistics.summarise(values, level)
    assert (found.mean.low, found.mean.high) == pytest.approx(DescrStatsW(values).tconfint_mean(1 - level))
    assert (found.mean.value, found.standard_deviation, found.n) == pytest.approx(
        (np.mean(values), np.std(values, ddof=1), 4)
    )


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (5, 8), (243, 277), (1, 5463)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_the_interval_of_a_share(successes: int, n: int, level: float) -> None:
    found = statistics.proportion(successes, n, level).share
    wanted = proportion_confint(successes, n, 1 - level, method="wilson")
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-12)
    assert found.value == successes / n


# Metrics of counted rows.

CLASSES = 3


def of_torchmetrics(name: str, classes: int) -> Callable[[Any, Any], float]:
    def metric(predictions: Any, labels: Any) -> float:
        of = metric_collection((name,), classes)
        return float(of(torch.tensor(predictions).long(), torch.tensor(labels).long())[name])

    return metric


@pytest.mark.parametrize(
    ("counted", "plain", "kind"),
    [
        (statistics.accuracy, of_torchmetrics("accuracy", CLASSES), "classes"),
        (statistics.F1(None), of_torchmetrics("macro_f1", CLASSES), "classes"),
        (statistics.matthews, of_torchmetrics("matthews", CLASSES), "classes"),
        (statistics.F1(1), of_torchmetrics("f1", 2), "two"),
        (statistics.matthews, of_torchmetrics("matthews", 2), "two"),
        (statistics.pearson, lambda x, y: stats.pearsonr(x, y).statistic, "numbers"),
        (statistics.spearman, lambda x, y: stats.spearmanr(x, y).statistic, "numbers"),
        (statistics.mean, lambda x, y: x.mean(), "numbers"),
        (statistics.resampled(lambda x, y: float(np.median(x - y))), lambda x, y: np.median(x - y), "numbers"),
    ],
)
def test_a_metric_of_counted_rows_is_that_of_repeated_rows(counted: Any, plain: Any, kind: str) -> None:
    draw, rows = rng(1), 40
    if kind == "numbers":
        labels = draw.integers(0, 6, rows) / 2  # ties
        predictions = np.stack([labels + draw.normal(size=rows), np.round(labels + draw.normal(size=rows))])
    else:
        classes = CLASSES if kind == "classes" else 2
        labels, predictions = draw.integers(0, classes, rows), draw.integers(0, classes, (2, rows))
    counts = draw.multinomial(rows, np.full(rows, 1 / rows), size=5).astype(float)
    found = counted(predictions.astype(float), labels.astype(float), counts)
    for resample, of_runs in zip(counts.astype(int), found, strict=True):
        for run, value in zip(predictions, of_runs, strict=True):
            assert value == pytest.approx(plain(np.repeat(run, resample), np.repeat(labels, resample)), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_correlations_have_no_scale(scale: float) -> None:
    labels = rng().normal(size=50)
    predictions = labels + rng(1).normal(size=50)
    found = statistics.pearson(1e3 * scale + scale * predictions[None], labels, np.ones((1, 50)))[0, 0]
    assert found == pytest.approx(stats.pearsonr(predictions, labels).statistic, abs=1e-8)


def test_f1_and_matthews_are_0_where_nothing_is_said_or_true() -> None:
    nothing, ones = np.zeros((1, 5)), np.ones((1, 5))
    assert statistics.F1(1)(nothing, np.zeros(5), ones) == 0
    assert statistics.matthews(nothing, np.array([0.0, 1, 0, 1, 0]), ones) == 0


# Two systems over seeds and rows.


def test_without_a_choice_of_rows_it_is_the_paired_t_interval() -> None:
    first, second = rng(0).normal(size=(2, 5, 1)) * np.ones((2, 5, 50))
    found = statistics.compare(by_seed(first), by_seed(second), draws=40_000)
    wanted = stats.ttest_rel(first[:, 0], second[:, 0])
    interval = wanted.confidence_interval(0.95)
    assert close(found.effect, interval.low, interval.high, 0.03)
    assert found.p == pytest.approx(wanted.pvalue, abs=0.02)
    assert found.from_rows == pytest.approx(0, abs=1e-12)


def test_without_a_difference_of_seeds_it_is_the_bootstrap_over_rows() -> None:
    first, second = (rng(seed).exponential(size=200) for seed in (0, 1))
    found = statistics.compare(by_seed([first] * 3), by_seed([second] * 3), draws=20_000)
    wanted = stats.bootstrap(((first - second),), np.mean, method="percentile", n_resamples=20_000, random_state=rng(2))
    assert close(found.effect, *wanted.confidence_interval, 0.03)
    assert found.from_rows == pytest.approx(wanted.standard_error, rel=0.03)
    assert found.from_seeds == pytest.approx(0, abs=1e-12)


def test_standard_errors_are_those_of_crossed_random_effects() -> None:
    draw, seeds, rows = rng(3), 6, 400
    first = draw.normal(size=(seeds, 1)) * 0.2 + draw.normal(size=rows) + draw.normal(size=(seeds, rows))
    second = draw.normal(size=(seeds, rows))
    difference = first - second
    found = statistics.compare(by_seed(first), by_seed(second))
    mean, of_seeds, of_rows = difference.mean(), difference.mean(1), difference.mean(0)
    square_seeds = rows * ((of_seeds - mean) ** 2).sum() / (seeds - 1)
    rest = difference - of_seeds[:, None] - of_rows + mean
    square_rest = (rest**2).sum() / ((seeds - 1) * (rows - 1))
    assert found.from_seeds == pytest.approx(math.sqrt((square_seeds - square_rest) / (rows * seeds)), rel=0.03)
    assert found.from_rows == pytest.approx(of_rows.std(ddof=1) / math.sqrt(rows), rel=0.03)
    assert found.effect.value == pytest.approx(mean)


def test_both_systems_get_the_same_rows() -> None:
    scores = rng().normal(size=(3, 100))
    found = statistics.compare(by_seed(scores + 0.5), by_seed(scores))
    assert (found.effect.low, found.effect.high) == pytest.approx((0.5, 0.5))


def test_a_metric_of_predictions_is_resampled_as_by_a_loop() -> None:
    draw, rows, seeds, draws = rng(4), 120, 3, 2000
    labels = draw.integers(0, 2, rows)
    first, second = (np.where(draw.random((seeds, rows)) < right, labels, 1 - labels) for right in (0.9, 0.6))
    counted = statistics.compare(by_seed(first), by_seed(second), labels, statistics.F1(1), draws=draws)
    f1 = of_f1(first, labels) - of_f1(second, labels)
    drawn = [draw.integers(0, rows, rows) for _ in range(draws)]
    values = np.array([of_f1(first[:, i], labels[i]) - of_f1(second[:, i], labels[i]) for i in drawn])
    assert counted.effect.value == pytest.approx(f1.mean())
    assert counted.from_rows == pytest.approx(values.mean(1).std(), rel=0.08)
    inner = (values - values.mean(1)[:, None]).var(0).mean() * seeds / (seeds - 1)
    spread = (seeds - 1) * f1.var(ddof=1) / draw.chisquare(seeds - 1, draws)
    joint = values.mean(1) + draw.normal(size=draws) * np.sqrt(np.maximum(spread - inner, 0) / seeds)
    assert close(counted.effect, *np.quantile(joint, [0.025, 0.975]), 0.12)


def of_f1(predictions: Any, labels: Any) -> Any:
    found = ((predictions == 1) & (labels == 1)).sum(1)
    return 2 * found / ((predictions == 1).sum(1) + (labels == 1).sum())


def test_a_plain_metric_gives_what_the_counted_one_does() -> None:
    draw = rng(5)
    labels = draw.integers(0, 2, 60)
    first, second = (by_seed(np.where(draw.random((3, 60)) < 0.8, labels, 1 - labels)) for _ in range(2))
    plain = statistics.resampled(lambda x, y: float((x == y).mean()))
    one = statistics.compare(first, second, labels, plain, draws=200)
    assert one == statistics.compare(first, second, labels, statistics.accuracy, draws=200)


def test_memory_does_not_grow_with_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (by_seed(rng(seed).normal(size=(3, 1000))) for seed in (0, 1))
    peaks, found = [], []
    for at_once, draws in ((50_000, 500), (50_000, 5000), (1_000_000, 5000)):
        monkeypatch.setattr(sys.modules[statistics.resampled.__module__], "_AT_ONCE", at_once)
        tracemalloc.start()
        found.append(statistics.compare(first, second, draws=draws))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
    assert found[1] == found[2]


def test_missing_seeds_are_named() -> None:
    scores = rng().normal(size=(5, 30))
    found = statistics.compare({s: scores[s] for s in (0, 1, 2)}, {s: scores[s] + 1 for s in (1, 2, 4)})
    assert (found.seeds, found.rows, found.left_out) == (2, 30, ("0 of the first", "4 of the second"))
    assert "2 seeds, 30 rows" in found.describe()
    assert found.describe().endswith("left out for want of a partner: 0 of the first, 4 of the second")


# Tests of paired differences.


def brute(values: Any) -> float:
    flips = [abs(np.dot(signs, values)) for signs in itertools.product((1, -1), repeat=len(values))]
    return float(np.mean([flip >= abs(np.sum(values)) - 1e-9 for flip in flips]))


@pytest.mark.parametrize("n", [2, 5, 9])
def test_sign_flips_are_all_of_them(n: int) -> None:
    differences = rng(n).normal(0.5, 1, n).round(1) + 0.05
    found = statistics.sign_flip(differences)
    wanted = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.p == pytest.approx(brute(differences))
    assert (found.exact, found.smallest, found.effect) == (True, 2 / 2**n, pytest.approx(differences.mean()))


def test_sums_that_are_equal_but_for_rounding_count() -> None:
    assert statistics.sign_flip([0.1, 0.2, 0.3]).p == 0.25
    assert statistics.sign_flip([0.3, -0.1, -0.2]).p == 1


def test_random_flips_are_never_0_and_near_the_exact_share() -> None:
    differences = rng(0).normal(0.3, 1, 25)
    found = statistics.sign_flip(differences, draws=20_000)
    wanted = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=200_000, random_state=rng(1)
    )
    assert found.p == pytest.approx(wanted.pvalue, abs=4 * math.sqrt(wanted.pvalue / 20_000))
    assert statistics.sign_flip(np.ones(25), draws=999).p == pytest.approx(1 / 1000)
    assert (found.exact, found.smallest) == (False, pytest.approx(1 / 20_001))
    assert statistics.sign_flip(differences, draws=20_000) == found


@pytest.mark.parametrize("n", [5, 12, 20, 30, 60])
def test_wilcoxon_is_scipys(n: int) -> None:
    differences = rng(n).normal(0.3, 1, n)
    found = statistics.wilcoxon(differences)
    exact = n <= 50
    ranked = stats.rankdata(np.abs(differences))[differences > 0].sum()
    z = (ranked - n * (n + 1) / 4) / math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    wanted = stats.wilcoxon(differences, method="exact").pvalue if exact else 2 * stats.norm.sf(abs(z))
    assert found.p == pytest.approx(wanted)
    assert (found.exact, found.zeros) == (exact, 0)
    walsh = [(x + y) / 2 for i, x in enumerate(differences) for y in differences[i:]]
    assert found.effect == pytest.approx(np.median(walsh))


def test_wilcoxon_with_ties_and_zeros_is_exact_and_says_so() -> None:
    differences = np.array([1.0, 1, 2, -1, 0, 3, 0, 2, 4])
    found = statistics.wilcoxon(differences)
    kept = differences[differences != 0]
    assert found.p == pytest.approx(brute(np.sign(kept) * stats.rankdata(np.abs(kept))))
    assert (found.zeros, found.n, found.exact, found.smallest) == (2, 9, True, 2 / 2**7)
    assert "over 9 pairs, 2 of them without a difference" in found.describe()


@pytest.mark.parametrize("test", [statistics.sign_flip, statistics.wilcoxon])
def test_no_difference_at_all_has_a_p_of_1(test: Any) -> None:
    found = test([0.0, 0.0, 0.0])
    assert (found.p, found.smallest, found.effect) == (1, 1, 0)


@pytest.mark.parametrize("test", [statistics.sign_flip, statistics.wilcoxon])
def test_what_cannot_be_reached_is_said(test: Any) -> None:
    assert statistics.smallest_p(5) == 2 / 2**5 == 0.0625
    five, six = test([1.0, 2, 3, 4, 5]), test([1.0, 2, 3, 4, 5, 6])
    assert five.p == 0.0625
    assert "0.05 cannot be reached" in five.describe()
    assert "cannot be reached" not in five.describe(alpha=0.1)
    assert "cannot be reached" not in six.describe()
    assert "5 pairs with a difference give no p below 0.0625" in test([1.0, 2, 3, 4, 5, 0]).describe()


# Several tasks, several comparisons.


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("higher", [False, True])
def test_friedman_is_scipys(ties: bool, higher: bool) -> None:
    scores = rng(2).normal(size=(7, 4)) + np.arange(4)
    scores = scores.round() if ties else scores
    found = statistics.friedman(scores, higher_is_better=higher)
    chi2, p = stats.friedmanchisquare(*scores.T)
    assert (found.chi2, found.chi2_p) == pytest.approx((chi2, p))
    placed = np.array([stats.rankdata(-row if higher else row) for row in scores])
    assert found.ranks == pytest.approx(placed.mean(0))
    # Iman and Davenport's F is that of an analysis of variance of the ranks, by task and system.
    between = 7 * ((placed.mean(0) - 2.5) ** 2).sum()
    rest = ((placed - placed.mean(0)) ** 2).sum()
    assert found.f == pytest.approx(between / 3 / (rest / 18))
    assert found.f_p == pytest.approx(stats.f.sf(found.f, 3, 18))
    assert found.concordance == pytest.approx(chi2 / (7 * 3))


def test_permutations_of_friedman_are_near_all_of_them() -> None:
    scores = np.array([[3.0, 2, 1], [3, 1, 2], [3, 2, 1], [2, 3, 1]])
    orders = list(itertools.permutations(range(3)))
    all_of_them = itertools.product(orders, repeat=4)
    between = [((np.sum(each, 0) - 4) ** 2).sum() for each in all_of_them]
    seen = ((stats.rankdata(scores, axis=1).sum(0) - 8) ** 2).sum()
    wanted = np.mean(np.array(between) >= seen - 1e-9)
    assert statistics.friedman(scores).p == pytest.approx(wanted, abs=4 * math.sqrt(wanted / 20_000))


def test_friedman_of_few_tasks_or_equal_scores() -> None:
    two = statistics.friedman([[3.0, 2, 1], [9, 8, 7]])
    assert two.concordance == 1
    assert two.smallest == pytest.approx(1 / 6)
    assert two.p == pytest.approx(1 / 6, abs=0.02)
    assert "2 tasks give no p below 0.167" in two.describe()
    same = statistics.friedman(np.ones((4, 3)))
    assert (same.p, same.chi2, same.concordance, same.ranks) == (1, 0, 0, (2, 2, 2))


def test_the_critical_difference_is_nemenyis() -> None:
    scores = pd.DataFrame(rng(6).normal(size=(8, 5)) + 1.1 * np.arange(5))
    p = scikit_posthocs.posthoc_nemenyi_friedman(scores).to_numpy()
    found = statistics.friedman(scores.to_numpy())
    apart = np.abs(np.subtract.outer(found.ranks, found.ranks))
    assert np.array_equal(apart > found.critical_difference, p < 0.05)
    assert 0 < (p < 0.05).sum() < 20


def test_holm_is_statsmodels() -> None:
    p_values = {str(i): float(p) for i, p in enumerate([*rng(0).random(6) ** 3, 0.01, 0.01, 1.0])}
    found = statistics.holm(p_values)
    wanted = multipletests(list(p_values.values()), method="holm")[1]
    assert [each.p for each in found.values()] == pytest.approx(wanted)
    assert list(found) == list(p_values)


def test_a_family_that_cannot_reach_its_level_says_so() -> None:
    tests = {str(i): statistics.sign_flip(rng(i).normal(size=6)) for i in range(3)}
    found = statistics.holm({k: t.p for k, t in tests.items()}, {k: t.smallest for k, t in tests.items()})
    assert [each.smallest for each in found.values()] == pytest.approx([3 / 32] * 3)
    assert all("0.05 cannot be reached" in each.describe() for each in found.values())


# Ranks, sensitivity.


def table(objectives: int, tasks: int, seeds: int, apart: float = 0.0) -> dict[str, dict[str, dict[Any, float]]]:
    scores = rng(8).normal(size=(objectives, tasks, seeds)) + apart * np.arange(objectives)[:, None, None]
    return {f"o{o}": {f"t{t}": by_seed(scores[o, t]) for t in range(tasks)} for o in range(objectives)}


@pytest.mark.parametrize("higher", [False, True])
def test_mean_ranks(higher: bool) -> None:
    runs = table(4, 5, 3)
    found = statistics.ranks(runs, higher_is_better=higher)
    for name, rank in found.ranks.items():
        places = []
        for task in runs[name]:
            means = {o: np.mean(list(runs[o][task].values())) for o in runs}
            places.append(1 + sum((m > means[name]) if higher else (m < means[name]) for m in means.values()))
        assert rank.value == pytest.approx(np.mean(places))
        assert 1 <= rank.low <= rank.value <= rank.high <= 4
    values = [rank.value for rank in found.ranks.values()]
    assert values == sorted(values)
    assert found.tasks == {f"t{t}": 3 for t in range(5)}


def test_the_spread_of_ranks_is_that_of_a_loop() -> None:
    runs, draw, drawn = table(3, 4, 2), rng(9), []
    for _ in range(3000):
        places = []
        for task in draw.integers(0, 4, 4):
            seeds = draw.integers(0, 2, 2)
            places.append(stats.rankdata([-np.mean([runs[o][f"t{task}"][s] for s in seeds]) for o in runs]))
        drawn.append(np.mean(places, 0))
    half = stats.t.ppf(0.975, 3) * math.sqrt(4 / 3) * np.std(drawn, 0)
    found = statistics.ranks(runs).ranks
    for i, name in enumerate(runs):
        assert found[name].low == pytest.approx(max(1, found[name].value - half[i]), abs=0.15)
        assert found[name].high == pytest.approx(min(3, found[name].value + half[i]), abs=0.15)


def test_ranks_are_of_runs_that_all_have_and_name_the_others() -> None:
    runs = table(3, 3, 3, apart=10)
    del runs["o1"]["t0"][2], runs["o2"]["t1"]
    found = statistics.ranks(runs)
    assert found.tasks == {"t0": 2, "t2": 3}
    assert set(found.left_out) == {"o0 t0 2", "o2 t0 2", *(f"{o} t1 {s}" for o in ("o0", "o1") for s in range(3))}
    assert "seeds: t0 2, t2 3" in found.describe()
    assert list(found.ranks) == ["o2", "o1", "o0"]


def test_a_range_without_noise_is_as_seen() -> None:
    found = statistics.sensitivity({"a": [1.0, 1.0], "b": [3.0, 3.0], "c": [2.0, 2.0]})
    assert (found.range.value, found.range.low, found.range.high) == (2, 2, 2)
    assert (found.variance.value, found.noise) == (1, 0)
    assert statistics.sensitivity({"a": [1.0, 1.0], "b": [1.0, 1.0]}).range.value == 0


def test_noise_goes_from_the_variance() -> None:
    scores = {"a": [1.0, 3.0], "b": [5.0, 5.5, 6.0], "c": [0.0, 4.0]}
    found = statistics.sensitivity(scores)
    means = [np.mean(each) for each in scores.values()]
    noise = np.mean([np.var(each, ddof=1) / len(each) for each in scores.values()])
    assert (found.noise, found.raw_variance) == pytest.approx((noise, np.var(means, ddof=1)))
    assert found.variance.value == pytest.approx(found.raw_variance - noise)
    assert found.range.value == pytest.approx(np.ptp(means) * math.sqrt(found.variance.value / found.raw_variance))
    assert found.seeds == {"a": 2, "b": 3, "c": 2}


def test_sensitivities_that_differ_are_told_apart() -> None:
    draw = rng(3)
    steep, flat = (
        {str(k): m + 0.3 * draw.normal(size=4) for k, m in enumerate(means)} for means in ((0, 5, 9), (3, 3, 4))
    )
    found = statistics.compare_sensitivity(steep, flat)
    assert found.range.low < 8 < found.range.high
    assert found.range.low > 0
    assert found.p < 0.01
    assert statistics.compare_sensitivity(flat, flat).p > 0.5


# By simulation: short forms of benchmarks/intervals.py.


def within(rate: float, wanted: float, trials: int) -> bool:
    return abs(rate - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / trials)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("intervals")


@pytest.mark.parametrize(("seeds", "noise"), [(3, 0.0), (3, 0.1), (3, 0.3), (6, 0.03), (6, 0.3)])
def test_the_joint_interval_covers_and_rejects_at_its_level(simulated: Any, seeds: int, noise: float) -> None:
    covers, rejects, *_ = simulated.accuracies(rng(seeds), 250, seeds, 277, noise, 300)
    slack = 3 * math.sqrt(0.05 * 0.95 / 250)
    assert 0.92 - slack < covers
    assert rejects < 0.08 + slack


def test_a_plain_bootstrap_of_three_seeds_would_not_cover(simulated: Any) -> None:
    _, _, plain, bca = simulated.accuracies(rng(1), 250, 3, 872, 0.3, 300)
    assert max(plain, bca) < 0.85


@pytest.mark.parametrize("metric", ["F1", "Matthews", "Pearson", "Spearman"])
def test_metrics_of_predictions_reject_at_their_level(simulated: Any, metric: str) -> None:
    assert simulated.of_predictions(rng(2), 100, 4, 277, 0.1, metric, 200) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 100)


@pytest.mark.parametrize(("test", "exact"), [(statistics.sign_flip, 12 / 256), (statistics.wilcoxon, 10 / 256)])
def test_tests_of_pairs_reject_at_the_level_their_steps_allow(simulated: Any, test: Any, exact: float) -> None:
    rate = simulated.paired(rng(3), 3000, 8, test)
    assert within(rate, exact, 3000)


def test_families_and_friedman_reject_at_most_at_their_level(simulated: Any) -> None:
    assert simulated.families(rng(4), 600, 5, 8) < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 600)
    assert simulated.over_tasks(rng(5), 400, 5, 4)[0] < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 400)


def test_ranks_and_ranges_cover(simulated: Any) -> None:
    assert simulated.ranks(rng(6), 100, 5, 1.0, 200)[0] > 0.9
    for means in (np.zeros(3), np.array([0.0, 5.0, 6.0])):
        covers, rejects, _, ours, raw = simulated.sensitivities(rng(7), 150, 3, means, np.array([1.0, 1.0, 4.0]), 300)
        assert covers > 0.88
        assert rejects < 0.12
        assert ours < raw


# What is refused.

NAN = [1.0, float("nan")]
ROWS = {0: [1.0, 0.0, 1.0], 1: [0.0, 0.0, 1.0]}


@pytest.mark.parametrize(
    ("call", "kind", "said"),
    [
        (lambda: statistics.summarise([1.0]), DataError, "At least 2 values are needed, got 1"),
        (lambda: statistics.summarise([]), DataError, "got 0"),
        (lambda: statistics.summarise(NAN), DataError, "1 of 2 values are NaN or infinite, first at position 1"),
        (lambda: statistics.summarise(["a", "b"]), DataError, "must be numbers"),
        (lambda: statistics.summarise([[1.0], [2.0]]), DataError, "one dimension"),
        (lambda: statistics.summarise([1.0, 2.0], level=95), ConfigError, "between 0 and 1"),
        (lambda: statistics.proportion(5, 0), DataError, "At least 1 trials"),
        (lambda: statistics.proportion(5, 4), DataError, "between 0 and the 4 trials"),
        (
            lambda: statistics.pair({0: 1.0}, {1: 1.0}),
            DataError,
            "got 0; left out for want of a partner: 0 of the first",
        ),
        (lambda: statistics.pair([1.0], [1.0]), DataError, "mappings"),  # type: ignore[arg-type]
        (lambda: statistics.compare({0: [1.0, 2.0]}, {0: [1.0, 2.0]}), DataError, "At least 2 pairs"),
        (lambda: statistics.compare(ROWS, {0: [1.0, 0.0], 1: [0.0, 0.0]}), DataError, "same rows in every pair"),
        (lambda: statistics.compare({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}), DataError, "use sign_flip"),
        (lambda: statistics.compare({0: NAN, 1: NAN}, {0: NAN, 1: NAN}), DataError, "NaN"),
        (lambda: statistics.compare({0: [1.0], 1: [1.0]}, {0: [1.0], 1: [1.0]}), DataError, "At least 2 rows"),
        (lambda: statistics.compare(ROWS, ROWS, [1, 0]), DataError, "Labels are of 2 rows, predictions of 3"),
        (lambda: statistics.compare(ROWS, ROWS, metric=statistics.accuracy), DataError, "Labels are needed"),
        (lambda: statistics.compare(ROWS, ROWS, [1, 0, 1], statistics.pearson), DataError, "undefined on"),
        (lambda: statistics.compare(ROWS, ROWS, draws=10), ConfigError, "At least 100 draws"),
        (lambda: statistics.sign_flip([1.0]), DataError, "At least 2 differences"),
        (lambda: statistics.sign_flip(NAN), DataError, "NaN"),
        (lambda: statistics.wilcoxon(NAN), DataError, "NaN"),
        (lambda: statistics.friedman([[1.0, 2.0, 3.0]]), DataError, "At least 2 tasks"),
        (lambda: statistics.friedman([[1.0, 2.0], [1.0, 2.0]]), DataError, "use sign_flip or wilcoxon"),
        (lambda: statistics.friedman([1.0, 2.0]), DataError, "(tasks, systems)"),
        (lambda: statistics.friedman([[1.0, 2.0, 3.0], [1.0, 2.0]]), DataError, "rows of one length"),
        (lambda: statistics.holm({}), DataError, "At least 1 p values"),
        (lambda: statistics.holm({"a": 1.5}), DataError, "between 0 and 1"),
        (lambda: statistics.holm({"a": 0.5}, {"b": 0.5}), DataError, "only one has: a, b"),
        (lambda: statistics.ranks({"a": {}}), DataError, "At least 2 objectives"),
        (lambda: statistics.ranks({"a": {"t": {0: 1.0}}, "b": {"u": {0: 1.0}}}), DataError, "At least 2 tasks"),
        (lambda: statistics.ranks({o: {"t": {0: 1.0}, "u": {0: NAN[1]}} for o in "ab"}), DataError, "scores of u"),
        (lambda: statistics.sensitivity({"a": [1.0, 2.0]}), DataError, "At least 2 initialisations"),
        (lambda: statistics.sensitivity({"a": [1.0, 2.0], "b": [1.0]}), DataError, "seeds of the initialisation b"),
        (
            lambda: statistics.compare_sensitivity({"a": [1.0, 2], "b": [1.0, 2]}, {"a": [1.0, 2], "c": [1.0, 2]}),
            DataError,
            "only one has: b, c",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(call: Any, kind: type[IldistilError], said: str) -> None:
    with pytest.raises(kind, match=re.escape(said)):
        call()
