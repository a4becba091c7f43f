"""The official metrics of GLUE, and those for the user's own tasks, through torchmetrics."""

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelF1Score,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.utilities import dim_zero_cat

from ildistil.errors import ConfigError

__all__ = [
    "METRICS",
    "OF_CLASSES",
    "OF_NUMBERS",
    "AveragePrecision",
    "ClassF1",
    "Matthews",
    "default_metrics",
    "metric_collection",
]

OF_CLASSES = ("accuracy", "f1", "macro_f1", "average_precision", "matthews")
_OF_LABELS = ("micro_f1", "macro_f1", "average_precision")
OF_NUMBERS = ("pearson", "spearman")
#: Names of the metrics: of classes, of several labels a row (micro_f1, macro_f1, average_precision), of numbers.
METRICS = (*OF_CLASSES, "micro_f1", *OF_NUMBERS)

#: What marks a row or token that no metric counts, as no loss does.
IGNORED = -100

Positive = int | Literal["all"] | None


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews correlation coefficient of two or more classes; exactly 0 where it is undefined.

    ``(n c - sum_k p_k t_k) / sqrt((n² - sum_k p_k²) (n² - sum_k t_k²))``, where ``n`` is the number of rows, ``c`` that
    of correct ones, ``p_k`` and ``t_k`` the numbers predicted as, and belonging to, class ``k``. This is 0/0 where all
    predictions or all targets are of one class. torchmetrics smooths that case for two classes, and a constant
    prediction scores up to 0.07; here it is 0, as in scikit-learn. Counts are multiplied as integers, exactly.

    Source: Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.

    >>> metric = Matthews(num_classes=2)
    >>> float(metric(torch.tensor([1, 1, 1, 1]), torch.tensor([1, 1, 0, 1])))
    0.0
    """

    def compute(self) -> Tensor:
        """Return the coefficient of all rows seen, a scalar in [-1, 1]."""
        counts: Tensor = self.confmat
        rows, correct, true, predicted = counts.sum(), counts.trace(), counts.sum(1), counts.sum(0)
        covariance = rows * correct - (true * predicted).sum()
        spreads = [(rows * rows - (each * each).sum()).float().sqrt() for each in (true, predicted)]
        scale = spreads[0] * spreads[1]
        return torch.where(scale > 0, covariance / scale, 0.0)


class ClassF1(MulticlassF1Score):
    """F1 of one class: ``2 TP / (2 TP + FP + FN)``; 0 where the class neither occurs nor is predicted.

    Args:
        num_labels: Number of classes.
        positive: Index of the class.

    >>> float(ClassF1(2, positive=0)(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])))
    0.800000011920929
    """

    def __init__(self, num_labels: int, positive: int) -> None:
        super().__init__(num_labels, average="none", ignore_index=IGNORED)
        self.positive = positive

    def compute(self) -> Tensor:
        """Return the score of all rows seen, a scalar in [0, 1]."""
        return super().compute()[self.positive]


class AveragePrecision(Metric):
    """Area under the precision-recall curve: ``sum_n (R_n - R_(n-1)) P_n``, over the distinct scores ``n``, falling.

    Of classes the score is the log-odds of the class, of several labels a row it is the label's logit. With several
    classes or labels it is the mean over those that occur; 0 where none does, and NaN where a score is.

    Args:
        columns: Classes it is of; None for all.
        multi_label: Whether a row may have several labels: then it is of all.

    >>> metric = AveragePrecision([1])
    >>> logits = torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]])
    >>> round(float(metric(None, torch.tensor([1, 0, 1, 0]), logits)), 4)  # (1/1 + 2/3) / 2
    0.8333
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    hits: list[Tensor]

    def __init__(self, columns: Sequence[int] | None = None, multi_label: bool = False) -> None:
        super().__init__()
        self.columns, self.multi_label = columns, multi_label
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("hits", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor | None, target: Tensor, logits: Tensor) -> None:
        """Take in rows.

        Args:
            preds: Not used.
            target: Class indices ``(rows,)``, or 0 and 1 ``(rows, labels)``.
            logits: Of the model, ``(rows, classes or labels)``.
        """
        columns = range(logits.shape[-1]) if self.columns is None else self.columns
        if self.multi_label:
            scores, hits = logits.float(), target > 0.5
        else:
            real = target != IGNORED
            scores = _log_odds(logits[real].float(), columns)
            hits = target[real][:, None] == torch.tensor(columns, device=target.device)
        self.scores.append(scores)
        self.hits.append(hits)

    def compute(self) -> Tensor:
        """Return the mean over the classes of all rows seen, a scalar in [0, 1]."""
        scores, hits = dim_zero_cat(self.scores), dim_zero_cat(self.hits)
        occurs = hits.any(0)
        if scores.isnan().any() or not occurs.any():
            return scores.new_full((), float("nan") if scores.isnan().any() else 0.0)
        columns = zip(scores.T[occurs], hits.T[occurs], strict=True)
        return torch.stack([_average_precision(*column) for column in columns]).mean()


def _average_precision(scores: Tensor, hits: Tensor) -> Tensor:
    order = scores.argsort(descending=True)
    falling = scores[order]
    last = torch.cat([falling[1:] != falling[:-1], falling.new_ones(1, dtype=torch.bool)])  # of equal scores
    found = hits[order].cumsum(0)[last].to(scores.dtype)
    taken = torch.arange(1, len(scores) + 1, device=scores.device)[last]
    return (found.diff(prepend=found.new_zeros(1)) * found / taken).sum() / found[-1]


def _log_odds(logits: Tensor, columns: Sequence[int]) -> Tensor:
    """Return ``log(p / (1 - p))`` of classes' probabilities; unlike ``p``, it tells confident rows apart."""
    others = [torch.cat([logits[:, :c], logits[:, c + 1 :]], dim=1).logsumexp(1) for c in columns]
    return logits[:, list(columns)] - torch.stack(others, dim=1)


def metric_collection(
    names: Sequence[str], num_labels: int, positive: Positive = None, multi_label: bool = False
) -> MetricCollection:
    """Return the named metrics; they are updated by ``preds, target, logits=logits``.

    ``preds`` and ``target`` are class indices, floats in a regression, or 0 and 1 for each of several labels. Targets
    of -100 don't count.

    Args:
        names: Of `METRICS`.
        num_labels: Number of classes or labels.
        positive: Index of the class that f1 and average_precision are of; "all" for their mean over the classes.
            None is class 1 of two, and "all" of more. macro_f1 is always the mean.
        multi_label: Whether a row may have several labels; then it is the mean over the labels, but micro_f1 is of all
            labels of all rows together.

    Raises:
        ConfigError: A name is unknown, or of another kind of problem.

    >>> metrics = metric_collection(("accuracy", "f1"), num_labels=2)
    >>> {k: float(v) for k, v in metrics(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])).items()}
    {'accuracy': 0.75, 'f1': 0.6666666865348816}
    """
    if positive is None:
        positive = 1 if num_labels == 2 else "all"
    # No compute groups: Lightning logs each metric by itself, and must find its own state in it.
    made = {name: _metric(name, num_labels, positive, multi_label) for name in names}
    return MetricCollection(made, compute_groups=False)  # type: ignore[arg-type]


def default_metrics(num_labels: int | None, regression: bool, multi_label: bool = False) -> MetricCollection | None:
    """Return the metrics of a task of which only its labels are known, or None where none is defined.

    Accuracy for classes, micro F1 and average precision for several labels a row, Pearson and Spearman correlation for
    a regression with one output; none for several outputs.

    Args:
        num_labels: Outputs of the model's head; None if unknown.
        regression: Whether labels are numbers on a scale.
        multi_label: Whether a row may have several labels.

    >>> list(default_metrics(3, regression=False)), default_metrics(None, regression=False)
    (['accuracy'], None)
    """
    if num_labels is None or (regression and num_labels > 1):
        return None
    names = OF_NUMBERS if regression else ("micro_f1", "average_precision") if multi_label else ("accuracy",)
    return metric_collection(names, num_labels, multi_label=multi_label)


def _metric(name: str, num_labels: int, positive: int | Literal["all"], multi_label: bool) -> Metric:
    if name not in METRICS:
        raise ConfigError(f"Unknown metric {name!r}. Known: {', '.join(METRICS)}.")
    if name in OF_NUMBERS:
        return PearsonCorrCoef() if name == "pearson" else _spearman()
    if multi_label:
        return _metric_of_labels(name, num_labels)
    if name == "micro_f1":
        raise ConfigError("The metric 'micro_f1' is for rows of several labels; of one class a row it is the accuracy.")
    if num_labels < 2:
        raise ConfigError(f"The metric {name!r} needs at least two classes, got {num_labels}.")
    match name:
        case "accuracy":  # micro: the share of correct rows, not the mean of the classes' shares
            return MulticlassAccuracy(num_labels, average="micro", ignore_index=IGNORED)
        case "average_precision":
            return AveragePrecision(None if positive == "all" else [positive])
        case "matthews":
            return Matthews(num_labels, ignore_index=IGNORED)
    if name == "macro_f1" or positive == "all":
        return MulticlassF1Score(num_labels, average="macro", ignore_index=IGNORED)
    return ClassF1(num_labels, positive)


def _metric_of_labels(name: str, num_labels: int) -> Metric:
    match name:
        case "average_precision":
            return AveragePrecision(multi_label=True)
        case "micro_f1":
            return MultilabelF1Score(num_labels, average="micro")
        case "macro_f1":
            return MultilabelF1Score(num_labels, average="macro")
    raise ConfigError(f"The metric {name!r} is not for rows of several labels. Use one of {', '.join(_OF_LABELS)}.")


def _spearman() -> SpearmanCorrCoef:
    # torchmetrics warns that all predictions are kept: a float a row, and there is no rank correlation without.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all")
        return SpearmanCorrCoef()
