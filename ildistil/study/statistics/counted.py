"""Metrics of resampled rows, all resamples at once.

A resample is given by how often each row is in it, so that sums over its rows are one matrix product.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["F1", "CountedMetric", "accuracy", "matthews", "mean", "pearson", "resampled", "spearman"]

Floats = NDArray[np.float64]
#: Row counts that are held at once, 8 bytes each.
_AT_ONCE = 1_000_000


class CountedMetric(Protocol):
    """A metric of rows that are counted.

    Args:
        predictions: Of each run, ``(runs, rows)``.
        labels: ``(rows,)``.
        counts: How often each row is in each resample, ``(resamples, rows)``; each sums to the number of rows.

    Returns:
        ``(resamples, runs)``.
    """

    def __call__(self, predictions: Floats, labels: Floats, counts: Floats, /) -> Floats:
        """Compute the metric of each run on each resample."""
        ...


def mean(predictions: Floats, labels: Floats, counts: Floats) -> Floats:
    """Compute the mean of row-wise scores; labels are not used.

    >>> mean(np.array([[1.0, 0.0, 1.0]]), np.zeros(3), np.array([[1.0, 1.0, 1.0], [0.0, 3.0, 0.0]])).tolist()
    [[0.6666666666666666], [0.0]]
    """
    return np.asarray((counts @ predictions.T) / counts.sum(1, keepdims=True))


def accuracy(predictions: Floats, labels: Floats, counts: Floats) -> Floats:
    """Compute the share of rows whose predicted class is their label.

    >>> accuracy(np.array([[1.0, 0.0, 1.0]]), np.array([1.0, 1.0, 1.0]), np.ones((1, 3))).tolist()
    [[0.6666666666666666]]
    """
    return mean((predictions == labels).astype(np.float64), labels, counts)


@dataclass(frozen=True)
class F1:
    """F1 of one class, ``2 TP / (2 TP + FP + FN)``, or the mean over the classes that occur in labels or predictions.

    0 where the class neither occurs nor is predicted.

    Args:
        positive: The class; None for the mean.

    >>> float(F1(1)(np.array([[1.0, 1.0, 0.0, 0.0]]), np.array([1.0, 0.0, 0.0, 0.0]), np.ones((1, 4)))[0, 0])
    0.6666666666666666
    """

    positive: int | None = 1

    def __call__(self, predictions: Floats, labels: Floats, counts: Floats, /) -> Floats:
        """Compute the score of each run on each resample, ``(resamples, runs)``."""
        classes = np.unique([predictions, np.broadcast_to(labels, predictions.shape)])
        total, occurring = 0.0, 0.0
        for each in classes if self.positive is None else [self.positive]:
            said, true = (predictions == each).astype(np.float64), (labels == each).astype(np.float64)
            found, either = counts @ (said * true).T, counts @ (said + true).T
            total = total + np.divide(2 * found, either, out=np.zeros_like(found), where=either > 0)
            occurring = occurring + (either > 0)
        return np.asarray(total / np.maximum(1 if self.positive is not None else occurring, 1))


def matthews(predictions: Floats, labels: Floats, counts: Floats) -> Floats:
    """Compute Matthews' correlation of two or more classes; 0 where labels or predictions are of one class.

    ``(n c - sum_k p_k t_k) / sqrt((n² - sum_k p_k²) (n² - sum_k t_k²))``: ``n`` rows, ``c`` of them correct, ``p_k``
    predicted as and ``t_k`` labelled class ``k``.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.

    >>> float(matthews(np.array([[1.0, 1.0, 0.0, 0.0]]), np.array([1.0, 0.0, 0.0, 0.0]), np.ones((1, 4)))[0, 0])
    0.5773502691896258
    """
    rows = counts.sum(1, keepdims=True)
    covariance = rows * (counts @ (predictions == labels).astype(np.float64).T)
    spread_said, spread_true = rows**2 + 0 * covariance, rows**2
    for each in np.union1d(predictions, labels):
        said = counts @ (predictions == each).astype(np.float64).T
        true = counts @ (labels == each).astype(np.float64)[:, None]
        covariance, spread_said, spread_true = covariance - said * true, spread_said - said**2, spread_true - true**2
    scale = np.sqrt(spread_said * spread_true)
    return np.asarray(np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0))


def pearson(predictions: Floats, labels: Floats, counts: Floats) -> Floats:
    """Compute Pearson's correlation; NaN where labels or predictions are constant.

    >>> round(float(pearson(np.array([[1.0, 2.0, 4.0]]), np.array([1.0, 2.0, 3.0]), np.ones((1, 3)))[0, 0]), 4)
    0.982
    """
    x, y = _standardised(predictions), _standardised(labels)
    rows = counts.sum(1, keepdims=True)
    mean_x, mean_y = counts @ x.T / rows, counts @ y[:, None] / rows
    covariance = counts @ (x * y).T / rows - mean_x * mean_y
    return _correlation(covariance, counts @ (x * x).T / rows - mean_x**2, counts @ (y * y)[:, None] / rows - mean_y**2)


def spearman(predictions: Floats, labels: Floats, counts: Floats) -> Floats:
    """Compute Spearman's correlation, of ranks within each resample, ties averaged; NaN where a side is constant.

    >>> round(float(spearman(np.array([[1.0, 2.0, 9.0]]), np.array([1.0, 2.0, 3.0]), np.ones((1, 3)))[0, 0]), 4)
    1.0
    """
    rows = counts.sum(1)
    y = _counted_ranks(labels, counts) - (rows[:, None] + 1) / 2
    spread_y = np.einsum("ij,ij,ij->i", counts, y, y)
    columns = []
    for run in predictions:
        x = _counted_ranks(run, counts) - (rows[:, None] + 1) / 2
        covariance = np.einsum("ij,ij,ij->i", counts, x, y)
        columns.append(_correlation(covariance, np.einsum("ij,ij,ij->i", counts, x, x), spread_y))
    return np.stack(columns, axis=1)


def resampled(metric: Callable[[Floats, Floats], float]) -> CountedMetric:
    """Make a counted metric of a plain one, by calling it on each resample: slow, but for any metric.

    Args:
        metric: Of predictions and labels, both ``(rows,)``; the order of rows must not matter to it.

    >>> median = resampled(lambda predictions, labels: float(np.median(predictions - labels)))
    >>> median(np.array([[1.0, 2.0, 4.0]]), np.array([1.0, 1.0, 1.0]), np.ones((1, 3))).tolist()
    [[1.0]]
    """

    def counted(predictions: Floats, labels: Floats, counts: Floats) -> Floats:
        drawn = [np.repeat(np.arange(labels.size), count.astype(int)) for count in counts]
        return np.array([[metric(run[rows], labels[rows]) for run in predictions] for rows in drawn])

    return counted


def resamples(rng: np.random.Generator, draws: int, rows: int) -> Iterator[Floats]:
    """Yield how often each row is drawn, ``(some draws, rows)``, so many at once as memory is meant for."""
    for start in range(0, draws, step := max(1, _AT_ONCE // rows)):
        some = min(step, draws - start)
        drawn = rng.integers(0, rows, (some, rows)) + np.arange(some)[:, None] * rows
        yield np.bincount(drawn.ravel(), minlength=some * rows).reshape(some, rows).astype(np.float64)


def _counted_ranks(values: Floats, counts: Floats) -> Floats:
    """Return the rank of each row in each resample, ``(resamples, rows)``."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(distinct.size))
    totals = np.add.reduceat(counts[:, order], starts, axis=1)
    return np.asarray((totals.cumsum(1) - (totals - 1) / 2)[:, group])


def _standardised(values: Floats) -> Floats:
    centred = values - values.mean(-1, keepdims=True)
    deviation = centred.std(-1, keepdims=True)
    return np.asarray(centred / np.where(deviation > 0, deviation, 1))


def _correlation(covariance: Floats, *variances: Floats) -> Floats:
    # Rounding leaves a constant's variance a little off 0.
    spread = np.sqrt(np.maximum(variances[0], 0)) * np.sqrt(np.maximum(variances[1], 0))
    ratio = np.divide(covariance, spread, out=np.full_like(covariance, np.nan), where=spread > 1e-12)
    return np.asarray(np.clip(ratio, -1, 1))
