"""How much the initialisation decides."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import at_least, check_draws, check_level, vector
from ildistil.study.statistics.compare import two_sided
from ildistil.study.statistics.summary import Estimate

__all__ = ["Sensitivity", "SensitivityDifference", "compare_sensitivity", "sensitivity"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity:
    """Spread of an objective's scores over initialisations, without what seeds add to it.

    Attributes:
        range: Best less worst initialisation, with its interval.
        variance: Over initialisations, with its interval.
        means: Initialisation to mean over seeds.
        seeds: Initialisation to number of seeds.
        raw_range: Best less worst mean, as seen.
        raw_variance: Of the means, as seen.
        noise: What seeds add to the variance of the means.
    """

    range: Estimate
    variance: Estimate
    means: dict[str, float]
    seeds: dict[str, int]
    raw_range: float
    raw_variance: float
    noise: float

    def describe(self) -> str:
        """Return range, means and numbers in words."""
        digits = wording.digits_of(self.range.low, self.range.high)
        means = ", ".join(f"{name} {mean:.{digits}f} (n = {self.seeds[name]})" for name, mean in self.means.items())
        return (
            f"range over {len(self.means)} initialisations {self.range.describe()}, "
            f"{self.raw_range:.{digits}f} with the noise of seeds; means: {means}"
        )


@dataclass(frozen=True)
class SensitivityDifference:
    """Difference of two objectives' sensitivities, first less second.

    Attributes:
        range: Difference of the ranges, with its interval.
        first: Sensitivity of the first objective.
        second: Sensitivity of the second objective.
        p: Of no difference, two-sided, from the same draws.
    """

    range: Estimate
    first: Sensitivity
    second: Sensitivity
    p: float

    def describe(self, first: str = "first", second: str = "second") -> str:
        """Return both ranges, their difference and p in words."""
        digits = wording.digits_of(self.range.low, self.range.high)
        runs = [sum(each.seeds.values()) for each in (self.first, self.second)]
        return (
            f"range over initialisations, {first} less {second}: {self.range.describe(signed=True)}, "
            f"{self.first.range.value:.{digits}f} against {self.second.range.value:.{digits}f}; "
            f"{runs[0]} and {runs[1]} runs, {wording.p_value(self.p)}"
        )


def sensitivity(runs: Mapping[str, ArrayLike], level: float = 0.95, draws: int = 10_000, seed: int = 0) -> Sensitivity:
    """Compute range and variance of an objective's scores over initialisations.

    Means over seeds differ even where the initialisation does nothing, so that range and variance as seen are too
    large. Of the variance ``V`` of the means goes what seeds add to it, ``noise = mean_k(s_k² / n_k)``; the range
    shrinks alike: ``range sqrt(max(0, V - noise) / V)``.

    The interval is between quantiles over draws of the means, ``mean_k + z_k s_k / sqrt(n_k) sqrt(ν / χ²(ν))``, of
    which ``noise`` goes twice, once for the seeds that were run and once for the draw. ``ν`` is Welch and
    Satterthwaite's: ``sum_k(q_k)² / sum_k(q_k² / (n_k - 1))`` with ``q_k = s_k² / n_k``, as a poor
    initialisation often varies most.
    Initialisations are those of the study, not a sample of others.

    Args:
        runs: Initialisation to scores of its seeds, at least two each.
        level: Of confidence.
        draws: Number of draws.
        seed: Of the draws.

    Raises:
        DataError: Fewer than two initialisations, or than two seeds of one, or NaN.

    Source: Satterthwaite, "An Approximate Distribution of Estimates of Variance Components", 1946; Searle, Casella and
    McCulloch, "Variance Components", 1992.

    >>> runs = {"1,2,3": [86.1, 86.4, 86.2], "4,5,6": [70.2, 66.0, 68.1], "2,4,6": [83.0, 82.1, 82.9]}
    >>> print(*sensitivity(runs).describe().split("; "), sep=chr(10))
    range over 3 initialisations 18.1 (95 % interval 13.3 to 22.9), 18.1 with the noise of seeds
    means: 1,2,3 86.2 (n = 3), 4,5,6 68.1 (n = 3), 2,4,6 82.7 (n = 3)
    """
    return _with_draws(runs, level, draws, np.random.default_rng(seed))[0]


def compare_sensitivity(
    first: Mapping[str, ArrayLike],
    second: Mapping[str, ArrayLike],
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> SensitivityDifference:
    """Compare how much the initialisation decides for two objectives, by their ranges.

    Args:
        first: Initialisation to scores of its seeds, as for `sensitivity`.
        second: The same of the other objective, over the same initialisations.
        level: Of confidence.
        draws: Number of draws, of each.
        seed: Of the draws.

    Raises:
        DataError: Other initialisations, or what `sensitivity` refuses.
    """
    if set(first) != set(second):
        odd = ", ".join(sorted(set(first) ^ set(second)))
        raise DataError(f"Both objectives need the same initialisations; only one has: {odd}.")
    rng = np.random.default_rng(seed)
    (one, drawn), (other, others) = (_with_draws(runs, level, draws, rng) for runs in (first, second))
    low, high = np.quantile(drawn - others, [(1 - level) / 2, (1 + level) / 2])
    estimate = Estimate(one.range.value - other.range.value, float(low), float(high), level)
    return SensitivityDifference(estimate, one, other, two_sided(drawn - others))


def _with_draws(
    runs: Mapping[str, ArrayLike], level: float, draws: int, rng: np.random.Generator
) -> tuple[Sensitivity, Floats]:
    """Return a sensitivity, and the draws of its range."""
    check_level(level)
    check_draws(draws)
    at_least(len(runs), "initialisations", 2)
    scores = [vector(each, f"seeds of the initialisation {name}") for name, each in runs.items()]
    means, sizes = np.array([each.mean() for each in scores]), np.array([each.size for each in scores])
    squares = np.array([each.var(ddof=1) for each in scores]) / sizes
    noise = float(squares.mean())
    freedom = squares.sum() ** 2 / (squares**2 / (sizes - 1)).sum() if noise > 0 else 1.0
    scales = np.sqrt(squares * freedom / rng.chisquare(freedom, (draws, 1)))
    drawn = _without(means + scales * rng.standard_normal((draws, sizes.size)), 2 * noise)
    kinds = [_estimate(*pair, level) for pair in zip(_without(means, noise), drawn, strict=True)]
    return Sensitivity(
        range=kinds[0],
        variance=kinds[1],
        means=dict(zip(runs, map(float, means), strict=True)),
        seeds=dict(zip(runs, map(int, sizes), strict=True)),
        raw_range=float(np.ptp(means)),
        raw_variance=float(means.var(ddof=1)),
        noise=noise,
    ), drawn[0]


def _without(means: Floats, noise: float) -> tuple[Floats, Floats]:
    """Return range and variance over the last dimension, less the noise in them."""
    seen = means.var(-1, ddof=1)
    variance = np.maximum(seen - noise, 0)
    share = np.divide(variance, seen, out=np.zeros_like(seen), where=seen > 0)
    return np.asarray(np.ptp(means, axis=-1) * np.sqrt(share)), variance


def _estimate(value: Floats, drawn: Floats, level: float) -> Estimate:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high), level)
