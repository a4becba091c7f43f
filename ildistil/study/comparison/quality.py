"""Internal: how good models are on the rows of a set, and where they differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from ildistil.metrics import ClassF1, Matthews
from ildistil.study import statistics
from ildistil.study.comparison.content import Bin, Calibration, Flip, OfClass
from ildistil.study.statistics import CountedMetric, Estimate, OverRows

__all__ = ["BINS", "Answers", "agreement", "calibration", "flips", "measured", "of_classes"]

Floats = NDArray[np.float64]
Texts = Sequence[tuple[str, ...]]

#: Bins of the calibration error.
BINS = 15
# Resamples of a metric that is computed anew on each.
_SLOW_DRAWS = 1000


@dataclass(frozen=True)
class Answers:
    """What one model says of all rows.

    Attributes:
        logits: ``(rows, outputs)``.
        labels: ``(rows,)``: of classes, or numbers.
    """

    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def is_regression(self) -> bool:
        """Whether it predicts numbers."""
        return self.logits.shape[1] == 1

    @cached_property
    def predictions(self) -> torch.Tensor:
        """Class indices, or numbers, ``(rows,)``."""
        return self.logits.squeeze(-1) if self.is_regression else self.logits.argmax(-1)

    @cached_property
    def right(self) -> torch.Tensor:
        """Whether each row's class is the predicted one, ``(rows,)``."""
        return self.predictions == self.labels

    @cached_property
    def confidence(self) -> Floats:
        """Probability of the predicted class, ``(rows,)``."""
        return np.asarray(self.logits.double().softmax(-1).amax(-1))


def measured(models: Sequence[Answers], metric: Callable[[], Metric], level: float, draws: int) -> OverRows:
    """Measure a metric of all models on the same rows and resamples.

    Args:
        models: What they say, the labels the same.
        metric: Makes the metric.
        level: Of confidence.
        draws: Number of resamples; at most 1,000 of a metric that is computed anew on each of them.
    """
    counted = _counted(metric())
    if counted is None:
        counted, draws = _anew(models, metric), min(draws, _SLOW_DRAWS)
    predictions = np.stack([each.predictions.double().numpy() for each in models])
    return statistics.over_rows(predictions, models[0].labels.double().numpy(), counted, level, draws)


def _counted(metric: Metric) -> CountedMetric | None:
    """Return the form of a metric that takes all resamples at once; None where it has none."""
    match metric:
        case MulticlassAccuracy(average="micro"):
            return statistics.accuracy
        case ClassF1():
            return statistics.F1(metric.positive)
        case MulticlassF1Score(average="macro"):
            return statistics.F1(None)
        case Matthews():
            return statistics.matthews
        case PearsonCorrCoef():
            return statistics.pearson
        case SpearmanCorrCoef():
            return statistics.spearman
    return None


def _anew(models: Sequence[Answers], make: Callable[[], Metric]) -> CountedMetric:
    """Return a metric that is computed anew on each resample, from predictions and logits."""

    def of(model: Answers, rows: torch.Tensor) -> float:
        metric = make()
        metric.update(
            **metric._filter_kwargs(preds=model.predictions[rows], target=model.labels[rows], logits=model.logits[rows])
        )
        return float(metric.compute())

    def counted(predictions: Floats, labels: Floats, counts: Floats) -> Floats:
        drawn = [torch.from_numpy(np.repeat(np.arange(labels.size), count.astype(int))) for count in counts]
        return np.array([[of(model, rows) for model in models] for rows in drawn])

    return counted


def of_classes(model: Answers, names: Sequence[str], level: float) -> tuple[OfClass, ...]:
    """Return what a model makes of each class."""
    found = []
    for number, name in enumerate(names):
        true, said = model.labels == number, model.predictions == number
        hits, rows, predicted = int((true & said).sum()), int(true.sum()), int(said.sum())
        recall, precision = (statistics.proportion(hits, n, level).share if n else None for n in (rows, predicted))
        found.append(OfClass(name, rows, recall, precision, 2 * hits / max(rows + predicted, 1)))
    return tuple(found)


def calibration(model: Answers, bins: int = BINS) -> Calibration:
    """Compute the expected calibration error: ``sum_b n_b / n |accuracy_b - confidence_b|``.

    Bins are of equal width in the probability of the predicted class, and closed on the right.

    Args:
        model: What a classifier says.
        bins: Number of bins between 0 and 1.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    confidence, right = model.confidence, model.right.double().numpy()
    edges = np.linspace(0, 1, bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    found = tuple(
        Bin(
            float(edges[number]), float(edges[number + 1]), int(inside.sum()), float(confidence[inside].mean()),
            float(right[inside].mean()),
        )
        for number in range(bins)
        if (inside := place == number).any()
    )  # fmt: skip
    error = sum(each.rows * abs(each.accuracy - each.confidence) for each in found) / len(right)
    return Calibration(error, float(confidence.mean()), float(right.mean()), found)


def flips(
    teacher: Answers, student: Answers, ids: Sequence[int], names: Sequence[str], texts: Texts | None, number: int
) -> tuple[tuple[int, tuple[Flip, ...]], tuple[int, tuple[Flip, ...]]]:
    """Return the rows that only the teacher is right on, and those that only the student is; the most confident first.

    Args:
        teacher: What the teacher says.
        student: What the student says.
        ids: Of the rows.
        names: Of the classes.
        texts: Of the rows by their ids, if known.
        number: How many rows to show of each.

    Returns:
        Of both, the number of all such rows and those to show. In a regression these are the rows on which the student
        is further off than the teacher by most, and none.
    """

    def flip(row: int) -> Flip:
        said = [each[row] for each in (teacher.labels, teacher.predictions, student.predictions)]
        words = [f"{float(v):.3g}" if teacher.is_regression else names[int(v)] for v in said]
        sure = None if teacher.is_regression else float(student.confidence[row])
        return Flip(ids[row], None if texts is None else texts[ids[row]], words[0], words[1], words[2], sure)

    if teacher.is_regression:
        off = [(each.predictions - each.labels).abs().double().numpy() for each in (student, teacher)]
        worse = off[0] - off[1]
        order = np.argsort(-worse, kind="stable")[:number]
        return (int((worse > 0).sum()), tuple(flip(row) for row in order.tolist() if worse[row] > 0)), (0, ())
    found = []
    for chosen in (teacher.right & ~student.right, student.right & ~teacher.right):
        rows = np.flatnonzero(chosen.numpy())
        order = rows[np.argsort(-student.confidence[rows], kind="stable")][:number]
        found.append((len(rows), tuple(flip(row) for row in order.tolist())))
    return found[0], found[1]


def agreement(teacher: Answers, student: Answers, level: float, draws: int) -> statistics.Proportion | Estimate:
    """Return the share of rows with the same prediction; of numbers, the correlation of the predictions."""
    one, two = student.predictions, teacher.predictions
    if not teacher.is_regression:
        return statistics.proportion(int((one == two).sum()), len(one), level)
    both = statistics.over_rows(one.double().numpy()[None], two.double().numpy(), statistics.pearson, level, draws)
    return both.of(0)
