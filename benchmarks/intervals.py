"""Whether intervals cover, and tests reject, as often as they say: by simulation of comparisons whose truth is known.

Right or wrong answers of two systems are those of a probit model: an ability for each system, a difficulty for each
row, what a system makes of a row, what a seed does to a system, and noise. ``covers`` is the share of 95 % intervals
that hold the true value, ``rejects`` the share of tests that reject at 0.05 although there is no difference.

``python benchmarks/intervals.py``, some 30 minutes of one core
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import numpy as np
from measure import finish, options
from numpy.typing import NDArray
from scipy import stats

from ildistil.study import statistics

Floats = NDArray[np.float64]
Row = tuple[str, str, int, object, object, object, object]
HEADER = ["statistic", "setting", "trials", "covers", "rejects", "plain bootstrap covers", "BCa covers"]
EMPTY = "-"
OWN, NOISE = 0.5, 0.5  # what a system makes of a row, and a run of it; difficulties vary by 1


def latent(rng: np.random.Generator, seeds: int, rows: int, noise: float, abilities: tuple[float, float]) -> Floats:
    """Return how right two systems are of each row, ``(2, seeds, rows)``; the answer is right above 0."""
    shared = rng.normal(size=rows) + OWN * rng.normal(size=(2, 1, rows))
    runs = noise * rng.normal(size=(2, seeds, 1)) + NOISE * rng.normal(size=(2, seeds, rows))
    return np.array(abilities)[:, None, None] + shared + runs


def share_of_right(ability: float, noise: float) -> float:
    return float(stats.norm.cdf(ability / np.sqrt(1 + OWN**2 + NOISE**2 + noise**2)))


def by_seed(values: Floats) -> tuple[dict[int, Floats], dict[int, Floats]]:
    return dict(enumerate(values[0])), dict(enumerate(values[1]))


def plain(rng: np.random.Generator, difference: Floats, draws: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the percentile and BCa intervals of a bootstrap that resamples seeds and rows (Efron, 1987)."""
    seeds, rows = difference.shape
    drawn = rng.integers(0, rows, (draws, rows)) + np.arange(draws)[:, None] * rows
    means = np.bincount(drawn.ravel(), minlength=draws * rows).reshape(draws, rows) @ difference.T / rows
    joint = np.take_along_axis(means, rng.integers(0, seeds, (draws, seeds)), axis=1).mean(1)
    centre = difference.mean()
    pulls = np.concatenate([(difference.mean(1) - centre) / seeds, (difference.mean(0) - centre) / rows])
    skew = (pulls**3).sum() / (6 * max((pulls**2).sum(), 1e-30) ** 1.5)
    bias = stats.norm.ppf(np.clip((joint < centre).mean() + (joint == centre).mean() / 2, 1e-3, 1 - 1e-3))
    z = bias + stats.norm.ppf([0.025, 0.975])
    percentile, bca = (np.quantile(joint, at) for at in ([0.025, 0.975], stats.norm.cdf(bias + z / (1 - skew * z))))
    return (percentile[0], percentile[1]), (bca[0], bca[1])


def accuracies(rng: np.random.Generator, trials: int, seeds: int, rows: int, noise: float, draws: int) -> list[float]:
    """Return how often accuracy's interval covers and rejects, and how often the plain ones cover."""
    counts, abilities = np.zeros(4), (1.0, 0.9)
    truth = share_of_right(abilities[0], noise) - share_of_right(abilities[1], noise)
    for trial in range(trials):
        right = (latent(rng, seeds, rows, noise, abilities) > 0).astype(float)
        effect = statistics.compare(*by_seed(right), draws=draws, seed=trial).effect
        others = plain(rng, right[0] - right[1], draws)
        same = (latent(rng, seeds, rows, noise, (1.0, 1.0)) > 0).astype(float)
        p = statistics.compare(*by_seed(same), draws=draws, seed=trial).p
        covered = [low <= truth <= high for low, high in ((effect.low, effect.high), *others)]
        counts += [covered[0], p <= 0.05, *covered[1:]]
    return list(counts / trials)


def of_predictions(
    rng: np.random.Generator, trials: int, seeds: int, rows: int, noise: float, metric: str, draws: int
) -> float:
    """Return how often a metric of predictions rejects that two systems of one kind are alike."""
    kinds = {"F1": statistics.F1(1), "Matthews": statistics.matthews, "Pearson": statistics.pearson}
    rejected = 0
    for trial in range(trials):
        values = latent(rng, seeds, rows, noise, (1.0, 1.0))
        if metric in ("F1", "Matthews"):
            labels = (rng.random(rows) < 0.7).astype(float)  # CoLA and MRPC have two thirds of one class
            predictions = np.where(values > 0, labels, 1 - labels)
        else:
            labels = np.clip(np.round(rng.normal(2.5, 1.5, rows) * 4) / 4, 0, 5)  # STS-B
            predictions = labels + values
        counted = kinds.get(metric, statistics.spearman)
        rejected += statistics.compare(*by_seed(predictions), labels, counted, draws=draws, seed=trial).p <= 0.05
    return rejected / trials


def paired(rng: np.random.Generator, trials: int, n: int, test: Callable[[Floats], statistics.PairedTest]) -> float:
    """Return how often a test of paired differences rejects; they are of a skewed pair, so symmetric about 0."""
    differences = rng.exponential(size=(trials, n)) - rng.exponential(size=(trials, n))
    return float(np.mean([test(each).p <= 0.05 for each in differences]))


def families(rng: np.random.Generator, trials: int, comparisons: int, n: int) -> float:
    """Return how often Holm's adjustment rejects any of some comparisons that are all without a difference."""
    wrong = 0
    for _ in range(trials):
        tests = {str(i): statistics.sign_flip(rng.normal(size=n)).p for i in range(comparisons)}
        wrong += min(each.p for each in statistics.holm(tests).values()) <= 0.05
    return wrong / trials


def over_tasks(rng: np.random.Generator, trials: int, tasks: int, systems: int) -> tuple[float, float, float]:
    """Return how often Friedman's test rejects: by permutations, χ² and F."""
    scores = rng.normal(size=(trials, tasks, systems)).round(1)
    found = [statistics.friedman(each, draws=1000, seed=trial) for trial, each in enumerate(scores)]
    p = np.array([(each.p, each.chi2_p, each.f_p) for each in found])
    return tuple((p <= 0.05).mean(0).tolist())


def ranks(rng: np.random.Generator, trials: int, tasks: int, apart: float, draws: int) -> tuple[float, float]:
    """Return how often the intervals of a mean rank cover, ours and the plain one; five objectives, three seeds."""
    levels, objectives, seeds = np.linspace(apart, 0, 5), 5, 3

    def scores(number: int) -> Floats:
        own = 0.3 * rng.normal(size=(number, 1, objectives))
        return levels + own + 0.5 * rng.normal(size=(number, seeds, objectives))

    truth, covered = stats.rankdata(-scores(20_000).mean(1), axis=1).mean(0), np.zeros(2)
    for trial in range(trials):
        table = scores(tasks)
        runs = {str(i): {str(t): dict(enumerate(table[t, :, i])) for t in range(tasks)} for i in range(objectives)}
        found = [statistics.ranks(runs, draws=draws, seed=trial).ranks[str(i)] for i in range(objectives)]
        drawn = table[rng.integers(0, tasks, (draws, tasks, 1)), rng.integers(0, seeds, (draws, tasks, seeds))]
        low, high = np.quantile(stats.rankdata(-drawn.mean(2), axis=-1).mean(1), [0.025, 0.975], axis=0)
        ours = [each.low <= true <= each.high for each, true in zip(found, truth, strict=True)]
        covered += [np.mean(ours), np.mean((low <= truth) & (truth <= high))]
    return tuple((covered / trials).tolist())


def sensitivities(
    rng: np.random.Generator, trials: int, seeds: int, means: Floats, deviations: Floats, draws: int
) -> list[float]:
    """Return how often the range's interval covers, the test of two alike rejects, the plain interval covers; ranges.

    The last two are the mean range, ours and as seen.
    """
    counts, truth = np.zeros(5), np.ptp(means)
    for trial in range(trials):
        scores = means + deviations * rng.normal(size=(2, seeds, means.size))
        first, second = ({str(k): each[:, k] for k in range(means.size)} for each in scores)
        found = statistics.compare_sensitivity(first, second, draws=draws, seed=trial)
        one = found.first
        drawn = np.take_along_axis(scores[:1], rng.integers(0, seeds, (draws, seeds, means.size)), axis=1).mean(1)
        low, high = np.quantile(np.ptp(drawn, axis=1), [0.025, 0.975])
        covered = [one.range.low <= truth <= one.range.high, low <= truth <= high]
        counts += [covered[0], found.p <= 0.05, covered[1], one.range.value, one.raw_range]
    return list(counts / trials)


def of_ranks(rng: np.random.Generator, trials: int, draws: int) -> Iterator[Row]:
    """Yield the rows of mean ranks."""
    for tasks, apart in product((3, 5, 7), (0.0, 1.0, 2.0, 4.0)):
        covers, plain_covers = ranks(rng, trials, tasks, apart, draws)
        setting = f"{tasks} tasks, best {apart / 0.5:g} sd from worst"
        yield row("mean rank", setting, trials, covers, plain_covers=plain_covers)


def of_ranges(rng: np.random.Generator, trials: int, draws: int) -> Iterator[Row]:
    """Yield the rows of the sensitivity to the initialisation."""
    for seeds, apart, poor in product((3, 5), (0.0, 2.0, 6.0), (1.0, 4.0, 13.0)):
        means, deviations = apart * np.array([1.0, 0.8, 0.0]), np.array([1.0, 1.0, poor])
        *rates, ours, raw = sensitivities(rng, trials, seeds, means, deviations, draws)
        setting = f"{seeds} seeds, range {apart:g} sd (ours {ours:.1f}, raw {raw:.1f}), worst one's sd {poor:g}"
        yield row("range over 3 initialisations", setting, trials, *rates)


def of_summaries(rng: np.random.Generator, trials: int, draws: int) -> Iterator[Row]:
    """Yield the rows of means and shares."""
    for n in (3, 5):
        hits = [statistics.summarise(values).mean for values in rng.normal(size=(20 * trials, n))]
        yield row("t, mean", f"{n} seeds", 20 * trials, covers=float(np.mean([h.low <= 0 <= h.high for h in hits])))
    for rows, share in product((277, 872), (0.6, 0.95)):
        kept = [statistics.proportion(int(k), rows).share for k in rng.binomial(rows, share, 20 * trials)]
        covers = float(np.mean([k.low <= share <= k.high for k in kept]))
        yield row("Wilson", f"{rows} rows, {share:g} right", 20 * trials, covers)


def of_comparisons(rng: np.random.Generator, trials: int, draws: int) -> Iterator[Row]:
    """Yield the rows of two systems' accuracy."""
    for rows, seeds, noise in product((277, 872, 5463), (3, 4, 6), (0.0, 0.03, 0.1)):
        points = 100 * (share_of_right(1.0 + noise, 0) - share_of_right(1.0, 0))
        some = trials if rows < 1000 else trials // 2
        found = accuracies(rng, some, seeds, rows, noise, draws)
        yield row("accuracy", f"{rows} rows, {seeds} seeds that vary by {points:.1f} points", some, *found)


def of_metrics(rng: np.random.Generator, trials: int, draws: int) -> Iterator[Row]:
    """Yield the rows of metrics that are no means."""
    for metric, seeds, rows in product(("F1", "Matthews", "Pearson", "Spearman"), (3, 5), (277, 1043)):
        rejects = of_predictions(rng, trials, seeds, rows, 0.1, metric, draws)
        yield row(metric, f"{rows} rows, {seeds} seeds that vary", trials, rejects=rejects)


def of_tests(rng: np.random.Generator, trials: int, draws: int) -> Iterator[Row]:
    """Yield the rows of tests."""
    for n in (6, 8, 12):
        yield row("sign flip", f"{n} pairs", 10 * trials, rejects=paired(rng, 10 * trials, n, statistics.sign_flip))
        yield row("Wilcoxon", f"{n} pairs", 10 * trials, rejects=paired(rng, 10 * trials, n, statistics.wilcoxon))
    random = partial(statistics.sign_flip, draws=draws)
    yield row("sign flip, random", "24 pairs", 10 * trials, rejects=paired(rng, 10 * trials, 24, random))
    yield row("Holm, any of 10", "10 pairs each", 5 * trials, rejects=families(rng, 5 * trials, 10, 10))
    for tasks, systems in product((3, 5, 7), (3, 5)):
        by = zip(("permutations", "χ²", "F"), over_tasks(rng, 5 * trials, tasks, systems), strict=True)
        for name, rejects in by:
            yield row(f"Friedman, {name}", f"{tasks} tasks, {systems} systems", 5 * trials, rejects=rejects)


def row(
    statistic: str,
    setting: str,
    trials: int,
    covers: object = EMPTY,
    rejects: object = EMPTY,
    plain_covers: object = EMPTY,
    bca_covers: object = EMPTY,
) -> Row:
    return statistic, setting, trials, covers, rejects, plain_covers, bca_covers


if __name__ == "__main__":
    chosen = options(__doc__, trials=1000, draws=1000, seed=0).parse_args()
    sections = (of_summaries, of_comparisons, of_metrics, of_tests, of_ranks, of_ranges)
    table: list[Row] = []
    for number, section in enumerate(sections):
        print(f"{section.__name__}, {number + 1} of {len(sections)}", file=sys.stderr)
        table += section(np.random.default_rng([chosen.seed, number]), chosen.trials, chosen.draws)
    finish("intervals", HEADER, table, chosen.json, trials=chosen.trials, draws=chosen.draws)
