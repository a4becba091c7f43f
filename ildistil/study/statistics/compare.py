"""Two systems on the same seeds and the same rows: the difference, and how far seeds and rows leave it open."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import at_least, check_draws, check_level, vector
from ildistil.study.statistics.counted import CountedMetric, mean, resamples
from ildistil.study.statistics.pairs import Pairs, pair
from ildistil.study.statistics.summary import Estimate

__all__ = ["Comparison", "compare"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """Difference of two systems, first less second.

    Attributes:
        effect: Difference of the metric, mean over seeds, with its interval.
        first: Metric of the first system, mean over seeds.
        second: Metric of the second system.
        seeds: Number of seeds both have.
        rows: Number of rows.
        from_rows: Standard error that rows leave, which more seeds won't lessen.
        from_seeds: Standard error that seeds leave, which more rows won't lessen.
        p: Of no difference, two-sided, from the same draws.
        left_out: Seeds that only one system has.
    """

    effect: Estimate
    first: float
    second: float
    seeds: int
    rows: int
    from_rows: float
    from_seeds: float
    p: float
    left_out: tuple[str, ...]

    def describe(self, first: str = "first", second: str = "second") -> str:
        """Return effect, interval, numbers and p in words.

        Args:
            first: Name of the first system.
            second: Name of the second system.
        """
        digits = wording.digits_of(self.effect.low, self.effect.high)
        return (
            f"{first} less {second}: {self.effect.describe(signed=True)}, {self.first:.{digits}f} against "
            f"{self.second:.{digits}f}; {self.seeds} seeds, {self.rows} rows, {wording.p_value(self.p)}"
            f"{wording.left_out(self.left_out)}"
        )


def compare(
    first: Mapping[Hashable, ArrayLike],
    second: Mapping[Hashable, ArrayLike],
    labels: ArrayLike | None = None,
    metric: CountedMetric = mean,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare two systems over the seeds and the rows that both were run on, by a joint bootstrap.

    Rows are resampled, the same ones for both systems and all seeds. Three to six seeds can't be: a resample of so few
    varies too little, and its intervals may cover 78 %. Their part is drawn as Student's t is, from the normal
    distribution with the variance ``(n - 1) s² / χ²(n - 1)``, of which goes what the rows explain:

    ``Δ* = mean_i Δ_i(rows*) + z sqrt(max(0, (n - 1) s² / χ²(n - 1) - v) / n)``

    with ``s²`` the sample variance of the seeds' differences ``Δ_i``, and ``v`` the part of it that comes from rows,
    ``n / (n - 1)`` times the variance over resamples of ``Δ_i(rows*) - mean_i Δ_i(rows*)``. The interval is between
    quantiles of ``Δ*``. Where rows vary little it is the paired t interval over seeds, where seeds vary little the
    percentile interval over rows.

    Args:
        first: Seed to row-wise scores, or predictions, ``(rows,)``; rows in one order everywhere.
        second: The same of the other system.
        labels: ``(rows,)``, for metrics that need them.
        metric: Of the mean's kind (`mean`, of row-wise scores), or of predictions: `accuracy`, `F1`, `matthews`,
            `pearson`, `spearman`, or any other by `resampled`.
        level: Of confidence.
        draws: Number of resamples.
        seed: Of the draws.

    Raises:
        DataError: Fewer than two seeds or rows in common, NaN, unequal lengths, or a metric that isn't defined.
        ConfigError: A level or a number of draws that can't be.

    Source: Owen, "The pigeonhole bootstrap", 2007; Weerahandi, "Generalized Confidence Intervals", 1993.

    >>> rng = np.random.default_rng(0)
    >>> hits = {seed: rng.random(500) for seed in range(4)}
    >>> first, second = ({seed: hits[seed] < share for seed in hits} for share in (0.8, 0.7))
    >>> print(*compare(first, second).describe("AttentionKL", "LogitsKL").split("; "), sep=chr(10))
    AttentionKL less LogitsKL: +0.097 (95 % interval +0.071 to +0.123), 0.794 against 0.697
    4 seeds, 500 rows, p = 0.0018
    """
    check_level(level)
    check_draws(draws)
    pairs = pair(first, second)
    seeds, rows = _rows_of(pairs)
    target = np.zeros(rows) if labels is None else vector(labels, "labels")
    if target.size != rows:
        raise DataError(f"Labels are of {target.size} rows, predictions of {rows}.")
    if labels is None and metric is not mean:
        raise DataError("Labels are needed by every metric but the mean of row-wise scores.")
    systems = np.concatenate([pairs.first, pairs.second])
    whole = _defined(metric(systems, target, np.ones((1, rows))))[0]
    rng = np.random.default_rng(seed)
    values = np.concatenate([_defined(metric(systems, target, counts)) for counts in resamples(rng, draws, rows)])
    differences, drawn = whole[:seeds] - whole[seeds:], values[:, :seeds] - values[:, seeds:]
    over_rows, inner = drawn.mean(1), _variance_of_rows(drawn)
    spread = (seeds - 1) * differences.var(ddof=1) / rng.chisquare(seeds - 1, draws)
    joint = over_rows + rng.standard_normal(draws) * np.sqrt(np.maximum(spread - inner, 0) / seeds)
    low, high = np.quantile(joint, [(1 - level) / 2, (1 + level) / 2])
    return Comparison(
        effect=Estimate(float(differences.mean()), float(low), float(high), level),
        first=float(whole[:seeds].mean()),
        second=float(whole[seeds:].mean()),
        seeds=seeds,
        rows=rows,
        from_rows=float(over_rows.std()),
        from_seeds=float(np.sqrt(max(differences.var(ddof=1) - inner, 0.0) / seeds)),
        p=two_sided(joint),
        left_out=pairs.left_out,
    )


def two_sided(draws: Floats) -> float:
    """Return the p value of 0: twice the smaller share of draws on one side of it, at least ``2 / (draws + 1)``."""
    one_side = int(min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0)))
    return min(1.0, 2 * (1 + one_side) / (draws.size + 1))


def _rows_of(pairs: Pairs) -> tuple[int, int]:
    if pairs.first.ndim != 2:
        raise DataError("Row-wise scores or predictions are needed of each seed. For one score a seed, use sign_flip.")
    seeds, rows = pairs.first.shape
    at_least(rows, "rows", 2)
    return seeds, rows


def _defined(values: Floats) -> Floats:
    undefined = np.count_nonzero(~np.isfinite(values).all(1))
    if undefined:
        raise DataError(
            f"The metric is undefined on {undefined} of {len(values)} samples of the rows, as a correlation with "
            "constant predictions is. Use more rows, or a metric that is defined there."
        )
    return values


def _variance_of_rows(drawn: Floats) -> float:
    """Return the part of the variance over seeds that the choice of rows explains."""
    seeds = drawn.shape[1]
    return float((drawn - drawn.mean(1, keepdims=True)).var(0).mean() * seeds / (seeds - 1))
