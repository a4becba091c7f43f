"""Friedman's test of several systems over tasks."""

from dataclasses import dataclass
from math import factorial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import at_least, check_draws, finite

__all__ = ["Friedman", "friedman"]


@dataclass(frozen=True)
class Friedman:
    """Test of whether several systems rank alike over tasks.

    Attributes:
        ranks: Mean rank of each system, 1 the best.
        concordance: Kendall's W: 0 where tasks don't agree on the ranks, 1 where they are of one mind.
        tasks: Number of tasks.
        p: Of random permutations within tasks.
        smallest: The smallest p that so many tasks and systems can give.
        chi2: Friedman's statistic, corrected for ties.
        chi2_p: By the χ² distribution, for many tasks.
        f: Iman and Davenport's form of it, ``(tasks - 1) χ² / (tasks (systems - 1) - χ²)``.
        f_p: By the F distribution.
        critical_difference: Nemenyi's, of two mean ranks, at the level 0.05 over all pairs.
    """

    ranks: tuple[float, ...]
    concordance: float
    tasks: int
    p: float
    smallest: float
    chi2: float
    chi2_p: float
    f: float
    f_p: float
    critical_difference: float

    def describe(self, alpha: float = 0.05) -> str:
        """Return concordance, numbers and p in words; and whether the test can reach ``alpha`` at all."""
        return (
            f"agreement of the tasks on the ranks of {len(self.ranks)} systems: Kendall's W = {self.concordance:.2f}; "
            f"{self.tasks} tasks, Friedman, {wording.p_value(self.p)}"
            f"{wording.unreachable(self.smallest, alpha, f'{self.tasks} tasks')}"
        )


def friedman(scores: ArrayLike, higher_is_better: bool = True, draws: int = 20_000, seed: int = 0) -> Friedman:
    """Test whether systems rank alike over tasks.

    ``χ² = (k - 1) sum_j (R_j - n (k + 1)/2)² / (sum_ij r_ij² - n k (k + 1)²/4)`` over ``n`` tasks and ``k`` systems,
    with rank sums ``R_j``. p is the share of random permutations of the ranks within each task with a χ² as large,
    ``(1 + as large) / (1 + draws)``: it holds for few tasks, where the χ² distribution says too little, and the F
    distribution too much where all tasks agree.

    Args:
        scores: ``(tasks, systems)``, such as means over seeds; at least two tasks and three systems.
        higher_is_better: Whether rank 1 is of the highest score.
        draws: Random permutations.
        seed: Of the permutations.

    Raises:
        DataError: Too few tasks or systems, or NaN.

    Source: Friedman, "The Use of Ranks to Avoid the Assumption of Normality", 1937; Iman and Davenport,
    "Approximations of the critical region of the Friedman statistic", 1980; Demšar, "Statistical Comparisons of
    Classifiers over Multiple Data Sets", 2006.

    >>> friedman([[80, 78, 75], [91, 90, 85], [60, 61, 55], [70, 66, 64]]).describe()
    "agreement of the tasks on the ranks of 3 systems: Kendall's W = 0.81; 4 tasks, Friedman, p = 0.0434"
    """
    check_draws(draws)
    table = finite(scores, "scores")
    if table.ndim != 2:
        raise DataError(f"Scores must be (tasks, systems), got the shape {table.shape}.")
    tasks, systems = table.shape
    at_least(tasks, "tasks", 2)
    at_least(systems, "systems (of two, use sign_flip or wilcoxon)", 3)
    placed = stats.rankdata(-table if higher_is_better else table, axis=1)
    spread = float((placed**2).sum() - tasks * systems * (systems + 1) ** 2 / 4)
    chi2 = (systems - 1) * _between(placed) / spread if spread > 0 else 0.0
    freedom = (systems - 1, (systems - 1) * (tasks - 1))
    rest = tasks * (systems - 1) - chi2
    f = (tasks - 1) * chi2 / rest if rest > 1e-9 else float("inf")
    drawn = np.random.default_rng(seed).permuted(np.broadcast_to(placed, (draws, *placed.shape)), axis=2)
    as_large = np.count_nonzero(_between(drawn) >= _between(placed) - 1e-9)
    studentized = float(stats.studentized_range.ppf(0.95, systems, np.inf)) / np.sqrt(2)
    return Friedman(
        ranks=tuple(map(float, placed.mean(0))),
        concordance=chi2 / (tasks * (systems - 1)),
        tasks=tasks,
        p=(1 + as_large) / (1 + draws),
        smallest=max(float(factorial(systems)) ** (1 - tasks), 1 / (1 + draws)),
        chi2=chi2,
        chi2_p=float(stats.chi2.sf(chi2, freedom[0])),
        f=f,
        f_p=float(stats.f.sf(f, *freedom)),
        critical_difference=float(studentized * np.sqrt(systems * (systems + 1) / (6 * tasks))),
    )


def _between(placed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the squared deviations of rank sums, of ``(..., tasks, systems)``."""
    tasks, systems = placed.shape[-2:]
    return np.asarray(((placed.sum(-2) - tasks * (systems + 1) / 2) ** 2).sum(-1))
