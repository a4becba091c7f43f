"""Means and proportions with their intervals."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import at_least, check_level, vector

__all__ = ["Estimate", "Proportion", "Summary", "proportion", "summarise"]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval."""

    value: float
    low: float
    high: float
    level: float

    def describe(self, signed: bool = False) -> str:
        """Return the value and its interval in words."""
        return wording.estimate(self.value, self.low, self.high, self.level, signed)


@dataclass(frozen=True)
class Summary:
    """Mean of ``n`` values with its interval, and their sample standard deviation."""

    mean: Estimate
    standard_deviation: float
    n: int

    def describe(self) -> str:
        """Return mean, interval, standard deviation and n in words."""
        digits = wording.digits_of(self.mean.low, self.mean.high)
        return f"{self.mean.describe()}; standard deviation {self.standard_deviation:.{digits}f}, n = {self.n}"


@dataclass(frozen=True)
class Proportion:
    """Share of ``n`` trials that succeeded, with its interval."""

    share: Estimate
    successes: int
    n: int

    def describe(self) -> str:
        """Return share, interval and counts in words."""
        return f"{self.share.describe()}; {self.successes} of {self.n}"


def summarise(values: ArrayLike, level: float = 0.95) -> Summary:
    """Compute mean, sample standard deviation and Student's interval of the mean.

    ``mean ± t(n - 1) s / sqrt(n)``, for independent values, as of runs with different seeds.

    Args:
        values: ``(n,)``, at least two.
        level: Of confidence.

    Raises:
        DataError: Fewer than two values, or NaN.

    >>> summarise([80.0, 82.0, 84.0]).describe()
    '82.0 (95 % interval 77.0 to 87.0); standard deviation 2.0, n = 3'
    """
    check_level(level)
    array = vector(values, "values")
    mean, deviation = array.mean(), array.std(ddof=1)
    half = stats.t.ppf((1 + level) / 2, array.size - 1) * deviation / np.sqrt(array.size)
    return Summary(Estimate(float(mean), float(mean - half), float(mean + half), level), float(deviation), array.size)


def proportion(successes: int, n: int, level: float = 0.95) -> Proportion:
    """Compute a share and Wilson's interval.

    ``(p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n)``: within [0, 1], also where all or none succeed. For an
    accuracy the trials are the rows, so that it is of one trained model.

    Args:
        successes: Trials that succeeded.
        n: Trials.
        level: Of confidence.

    Raises:
        DataError: No trials, or more successes than trials.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.

    >>> proportion(243, 277).describe()
    '0.877 (95 % interval 0.833 to 0.911); 243 of 277'
    """
    check_level(level)
    at_least(n, "trials", 1)
    if not 0 <= successes <= n:
        raise DataError(f"Successes must be between 0 and the {n} trials, got {successes}.")
    share, z = successes / n, float(stats.norm.ppf((1 + level) / 2))
    centre, scale = (share + z * z / (2 * n)), 1 + z * z / n
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
    return Proportion(Estimate(share, float(low), float(high), level), successes, n)
