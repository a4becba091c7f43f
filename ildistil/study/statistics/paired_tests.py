"""Tests of paired differences that assume no distribution."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import at_least, check_draws, vector

__all__ = ["PairedTest", "sign_flip", "smallest_p", "wilcoxon"]

Floats = NDArray[np.float64]
_EXACT_UP_TO = 20


@dataclass(frozen=True)
class PairedTest:
    """Test of paired differences.

    Attributes:
        effect: Mean of the differences; their Hodges-Lehmann estimate with `wilcoxon`.
        n: Pairs.
        zeros: Pairs without a difference.
        p: Two-sided.
        smallest: The smallest p that so many pairs with a difference can give.
        exact: Whether p is exact, or of random flips or an approximation.
        name: Of the test.
    """

    effect: float
    n: int
    zeros: int
    p: float
    smallest: float
    exact: bool
    name: str

    def describe(self, alpha: float = 0.05) -> str:
        """Return effect, n and p in words; and whether the test can reach ``alpha`` at all."""
        zeros = f", {self.zeros} of them without a difference" if self.zeros else ""
        how = "exact" if self.exact else "approximate"
        return (
            f"{self.effect:+.4g} over {self.n} pairs{zeros}; {self.name}, {how}: {wording.p_value(self.p)}"
            f"{wording.unreachable(self.smallest, alpha, f'{self.n - self.zeros} pairs with a difference')}"
        )


def smallest_p(n: int) -> float:
    """Return the smallest two-sided p of ``n`` paired differences, ``2 / 2^n``; 1 without any.

    >>> smallest_p(5), smallest_p(6)
    (0.0625, 0.03125)
    """
    at_least(n, "pairs", 0)
    return min(1.0, 2.0 ** (1 - n))


def sign_flip(differences: ArrayLike, draws: int = 100_000, seed: int = 0) -> PairedTest:
    """Test whether paired differences are as likely to be of either sign, by their mean.

    p is the share of the ``2^n`` ways to set the signs that give a mean as far from 0 as the one seen. Above 20
    differences it is of random flips: ``(1 + as far) / (1 + draws)``.

    Differences must be independent: those of several seeds on one task share what the task does to both systems. They
    are all of one null hypothesis, "no difference on any of these tasks"; for a claim about tasks in general, give one
    difference a task.

    Args:
        differences: ``(n,)``, at least two.
        draws: Random flips, above 20 differences.
        seed: Of the random flips.

    Raises:
        DataError: Fewer than two differences, or NaN.

    Source: Fisher, "The Design of Experiments", 1935; Phipson and Smyth, "Permutation P-values Should Never Be Zero",
    2010.

    >>> print(sign_flip([1.2, 0.8, 1.0, 0.5, 1.1, 1.4]).describe())
    +1 over 6 pairs; sign flips, exact: p = 0.0312
    >>> print(*sign_flip([1.2, 0.8, 1.0, 0.5, 1.1]).describe().split("; "), sep=chr(10))
    +0.92 over 5 pairs
    sign flips, exact: p = 0.0625
    5 pairs with a difference give no p below 0.0625, so 0.05 cannot be reached, whatever the differences
    """
    check_draws(draws)
    array = vector(differences, "differences")
    p, exact = _flipped(array, draws, seed)
    zeros = int(np.count_nonzero(array == 0))
    return PairedTest(
        float(array.mean()), array.size, zeros, p, _least(array.size - zeros, exact, draws), exact, "sign flips"
    )


def wilcoxon(differences: ArrayLike) -> PairedTest:
    """Test whether paired differences are symmetric about 0, by Wilcoxon's signed ranks.

    Differences of 0 are left out of the ranks, as Wilcoxon did, and counted in the result; ties share their mean rank.
    Exact up to 20 differences, with ties too, and up to 50 without; else the normal approximation.

    Args:
        differences: ``(n,)``, at least two; independent, as with `sign_flip`.

    Raises:
        DataError: Fewer than two differences, or NaN.

    Source: Wilcoxon, "Individual Comparisons by Ranking Methods", 1945; Hodges and Lehmann, "Estimates of Location
    Based on Rank Tests", 1963.

    >>> print(wilcoxon([1.2, 0.8, 1.0, 0.5, 1.1, 0.0, 0.9]).describe())
    +0.85 over 7 pairs, 1 of them without a difference; Wilcoxon, exact: p = 0.0312
    """
    array = vector(differences, "differences")
    walsh = (array[:, None] + array)[np.triu_indices(array.size)] / 2
    ranked = array[array != 0]
    if ranked.size <= _EXACT_UP_TO:
        p, exact = _flipped(np.sign(ranked) * stats.rankdata(np.abs(ranked)), 0, 0)
    else:
        exact = ranked.size <= 50 and np.unique(np.abs(ranked)).size == ranked.size
        p = float(stats.wilcoxon(ranked, method="auto").pvalue)
    zeros = array.size - ranked.size
    return PairedTest(float(np.median(walsh)), array.size, zeros, p, smallest_p(ranked.size), exact, "Wilcoxon")


def _flipped(array: Floats, draws: int, seed: int) -> tuple[float, bool]:
    """Return the share of sign flips whose sum is as far from 0, and whether it is of all flips."""
    # Sums of the same numbers in another order differ by rounding.
    bound = abs(array.sum()) - 1e-12 * np.abs(array).sum()
    if array.size <= _EXACT_UP_TO:
        sums = np.zeros(1)
        for each in array:
            sums = np.concatenate([sums + each, sums - each])
        return float(np.mean(np.abs(sums) >= bound)), True
    rng, far = np.random.default_rng(seed), 0
    for start in range(0, draws, step := max(1, 1_000_000 // array.size)):
        signs = rng.integers(0, 2, (min(step, draws - start), array.size)) * 2.0 - 1
        far += int(np.count_nonzero(np.abs(signs @ array) >= bound))
    return (1 + far) / (1 + draws), False


def _least(n: int, exact: bool, draws: int) -> float:
    return smallest_p(n) if exact else max(smallest_p(n), 1 / (1 + draws))
