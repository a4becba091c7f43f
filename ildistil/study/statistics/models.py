"""Trained models on the same rows, one run each: no seeds, so that only rows leave anything open."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import check_draws, check_level, finite, vector
from ildistil.study.statistics.counted import CountedMetric, resamples
from ildistil.study.statistics.paired_tests import smallest_p
from ildistil.study.statistics.summary import Estimate

__all__ = ["McNemar", "OverRows", "mcnemar", "over_rows"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OverRows:
    """A metric of several models on the rows, and on resamples of them that all models share.

    Intervals are between quantiles of the resamples; NaN where the metric is undefined on one, as a correlation with
    constant predictions is.

    Attributes:
        values: Of each model on all rows, ``(models,)``.
        drawn: On the resamples, ``(draws, models)``.
        rows: Number of rows.
        level: Of confidence.
    """

    values: Floats
    drawn: Floats
    rows: int
    level: float

    def of(self, model: int) -> Estimate:
        """Return a model's metric."""
        return self._estimate(self.values[model], self.drawn[:, model])

    def difference(self, first: int, second: int) -> Estimate:
        """Return the first model's metric less the second's."""
        return self._estimate(self.values[first] - self.values[second], self.drawn[:, first] - self.drawn[:, second])

    def ratio(self, first: int, second: int) -> Estimate | None:
        """Return the first model's metric as a share of the second's; None unless that is above 0 on all resamples."""
        below = np.append(self.drawn[:, second], self.values[second])
        if not (below > 0).all():
            return None
        return self._estimate(self.values[first] / self.values[second], self.drawn[:, first] / self.drawn[:, second])

    def _estimate(self, value: float, drawn: Floats) -> Estimate:
        ends = np.quantile(drawn, [(1 - self.level) / 2, (1 + self.level) / 2])
        return Estimate(float(value), float(ends[0]), float(ends[1]), self.level)


def over_rows(
    predictions: ArrayLike, labels: ArrayLike, metric: CountedMetric, level: float = 0.95, draws: int = 10_000,
    seed: int = 0,
) -> OverRows:  # fmt: skip
    """Resample the rows that several trained models were measured on, by the percentile bootstrap.

    The intervals are about other rows for these models, not about models of other seeds: for these see `compare`.

    Args:
        predictions: Of each model, ``(models, rows)``.
        labels: ``(rows,)``.
        metric: Such as `accuracy`, `F1`, `matthews`, `pearson`, `spearman`.
        level: Of confidence.
        draws: Number of resamples.
        seed: Of the draws.

    Raises:
        DataError: Fewer than two rows, unequal lengths, or NaN.
        ConfigError: A level or a number of draws that can't be.

    Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979.

    >>> from ildistil.study.statistics import accuracy
    >>> labels, hits = np.ones(500), np.random.default_rng(0).random(500)
    >>> found = over_rows([hits < 0.9, hits < 0.8], labels, accuracy)
    >>> found.of(1).describe(), found.ratio(1, 0).describe()
    ('0.766 (95 % interval 0.728 to 0.802)', '0.867 (95 % interval 0.834 to 0.897)')
    """
    check_level(level)
    check_draws(draws)
    target, models = vector(labels, "labels"), finite(predictions, "predictions")
    if models.ndim != 2 or models.shape[1] != target.size:
        raise DataError(f"Predictions have the shape {models.shape}, which is not (models, {target.size} rows).")
    whole = metric(models, target, np.ones((1, target.size)))[0]
    rng = np.random.default_rng(seed)
    drawn = np.concatenate([metric(models, target, counts) for counts in resamples(rng, draws, target.size)])
    return OverRows(whole, drawn, target.size, level)


@dataclass(frozen=True)
class McNemar:
    """Whether two models are right on other numbers of the same rows.

    Attributes:
        difference: Of their accuracies, first less second.
        both: Rows that both are right on.
        only_first: Rows that the first alone is right on.
        only_second: Rows that the second alone is right on.
        neither: Rows that both are wrong on.
        p: Exact, two-sided.
    """

    difference: float
    both: int
    only_first: int
    only_second: int
    neither: int
    p: float

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.both + self.only_first + self.only_second + self.neither

    def describe(self, first: str = "first", second: str = "second", alpha: float = 0.05) -> str:
        """Return effect, numbers and p in words; and whether the test can reach ``alpha`` at all.

        Args:
            first: Name of the first model.
            second: Name of the second model.
            alpha: Level of the test.
        """
        unequal = self.only_first + self.only_second
        return (
            f"{self.difference:+.4f} of {self.n} rows: {self.only_first} right by {first} alone, {self.only_second} by "
            f"{second} alone; McNemar, exact: {wording.p_value(self.p)}"
            f"{wording.unreachable(smallest_p(unequal), alpha, f'{unequal} rows with a difference')}"
        )


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Test whether two models are right equally often, by the rows that only one of them is right on.

    If they are, each of these rows is a fair coin's: p is that of the binomial distribution.

    Args:
        first: Whether the first model is right on each row, ``(rows,)``.
        second: The same of the second.

    Raises:
        DataError: No rows, or unequal lengths.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages", 1947.

    >>> print(mcnemar([True] * 9 + [False] * 3, [True] * 3 + [False] * 9).describe("teacher", "student"))
    +0.5000 of 12 rows: 6 right by teacher alone, 0 by student alone; McNemar, exact: p = 0.0312
    """
    one, two = (vector(hits, "hits", least=1) > 0 for hits in (first, second))
    if one.size != two.size:
        raise DataError(f"The two models are of {one.size} and {two.size} rows. Both must be measured on the same.")
    lost, gained = int((one & ~two).sum()), int((two & ~one).sum())
    p = float(stats.binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return McNemar((lost - gained) / one.size, int((one & two).sum()), lost, gained, int((~one & ~two).sum()), p)
