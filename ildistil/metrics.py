"""The official metrics of GLUE, and those for the user's own tasks, through torchmetrics."""

import warnings

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from ildistil.errors import ConfigError

__all__ = ["METRICS", "Matthews", "default_metrics", "metric_collection"]

#: Names of the metrics: accuracy, f1 and matthews are for classes, pearson and spearman for regression.
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


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


def metric_collection(names: tuple[str, ...], num_labels: int) -> MetricCollection:
    """Return the named metrics; they take class indices (or floats in a regression) as ``preds``, and ``target``.

    Args:
        names: Of `METRICS`.
        num_labels: Number of classes. With two, f1 is of class 1; with more, it is the plain mean over the classes.

    Raises:
        ConfigError: A name is unknown, or a metric for classes is asked of fewer than two.

    >>> metrics = metric_collection(("accuracy", "f1"), num_labels=2)
    >>> {k: float(v) for k, v in metrics(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])).items()}
    {'accuracy': 0.75, 'f1': 0.6666666865348816}
    """
    # No compute groups: Lightning logs each metric by itself, and must find its own state in it.
    return MetricCollection({name: _metric(name, num_labels) for name in names}, compute_groups=False)


def default_metrics(num_labels: int | None, regression: bool, multi_label: bool = False) -> MetricCollection | None:
    """Return the metrics of a task of which only its labels are known, or None where none is defined.

    Accuracy for classes, Pearson and Spearman correlation for a regression with one output; none for several labels a
    row or several outputs.

    Args:
        num_labels: Outputs of the model's head; None if unknown.
        regression: Whether labels are numbers on a scale.
        multi_label: Whether a row may have several labels.

    >>> list(default_metrics(3, regression=False)), default_metrics(None, regression=False)
    (['accuracy'], None)
    """
    if num_labels is None or multi_label or (regression and num_labels > 1):
        return None
    return metric_collection(("pearson", "spearman") if regression else ("accuracy",), num_labels)


def _metric(name: str, num_labels: int) -> Metric:
    match name:
        case "accuracy" | "f1" | "matthews" if num_labels < 2:
            raise ConfigError(f"The metric {name!r} needs at least two classes, got {num_labels}.")
        case "accuracy":  # micro: the share of correct rows, not the mean of the classes' shares
            return MulticlassAccuracy(num_labels, average="micro")
        case "f1":
            return BinaryF1Score() if num_labels == 2 else MulticlassF1Score(num_labels, average="macro")
        case "matthews":
            return Matthews(num_labels)
        case "pearson":
            return PearsonCorrCoef()
        case "spearman":
            return _spearman()
    raise ConfigError(f"Unknown metric {name!r}. Known: {', '.join(METRICS)}.")


def _spearman() -> SpearmanCorrCoef:
    # torchmetrics warns that all predictions are kept: a float a row, and there is no rank correlation without.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `SpearmanCorrcoef` will save all")
        return SpearmanCorrCoef()
