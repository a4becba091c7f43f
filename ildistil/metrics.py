"""The official metrics of GLUE, and those for the user's own tasks, through torchmetrics."""

import warnings

from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from ildistil.errors import ConfigError

#: The names a metric can have; accuracy, f1 and matthews are for classes, pearson and spearman for regression.
METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")


def metric_collection(names: tuple[str, ...], num_labels: int) -> MetricCollection:
    """Return the named metrics; they take class indices (or floats in a regression) as ``preds``, and ``target``.

    Args:
        names: Of `METRICS`.
        num_labels: Number of classes. With two, f1 is of class 1; with more, it is the plain mean over the classes.

    Raises:
        ConfigError: A name is unknown.

    >>> import torch
    >>> metrics = metric_collection(("accuracy", "f1"), num_labels=2)
    >>> {k: float(v) for k, v in metrics(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 0, 0])).items()}
    {'accuracy': 0.75, 'f1': 0.6666666865348816}
    """
    # No compute groups: Lightning logs each metric by itself, and must find its own state in it.
    return MetricCollection({name: _metric(name, num_labels) for name in names}, compute_groups=False)


def _metric(name: str, num_labels: int) -> Metric:
    match name:
        case "accuracy":  # micro: the share of correct rows, not the mean of the classes' shares
            return MulticlassAccuracy(num_labels, average="micro")
        case "f1":
            return BinaryF1Score() if num_labels == 2 else MulticlassF1Score(num_labels, average="macro")
        case "matthews":
            return BinaryMatthewsCorrCoef() if num_labels == 2 else MulticlassMatthewsCorrCoef(num_labels)
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
