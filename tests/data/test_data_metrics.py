import math
import warnings

import pytest
import scipy.stats
import torch

from ildistil.data import Glue, TextData
from ildistil.metrics import metric_collection

GENERATOR = torch.Generator().manual_seed(0)


def drawn(classes: int) -> tuple[list[int], list[int]]:
    target = torch.randint(classes, (200,), generator=GENERATOR)
    right = torch.rand(200, generator=GENERATOR) < 0.6
    return torch.where(right, target, torch.randint(classes, (200,), generator=GENERATOR)).tolist(), target.tolist()


def f1(preds: list[int], target: list[int], positive: int) -> float:
    both = sum(p == t == positive for p, t in zip(preds, target, strict=True))
    return 2 * both / (preds.count(positive) + target.count(positive))


def matthews(preds: list[int], target: list[int]) -> float:
    """Pearson's correlation of the class indicators, summed over the classes (Gorodkin's R_K)."""

    def covariance(x: list[int], y: list[int]) -> float:
        total = 0.0
        for k in set(preds) | set(target):
            a, b = [float(v == k) for v in x], [float(v == k) for v in y]
            total += sum((i - sum(a) / len(a)) * (j - sum(b) / len(b)) for i, j in zip(a, b, strict=True))
        return total

    return covariance(preds, target) / math.sqrt(covariance(preds, preds) * covariance(target, target))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_metrics_agree_with_their_definitions(classes: int) -> None:
    preds, target = drawn(classes)
    metrics = metric_collection(("accuracy", "f1", "matthews"), classes)
    for i in range(0, 200, 32):
        metrics.update(torch.tensor(preds[i : i + 32]), torch.tensor(target[i : i + 32]))
    scores = [f1(preds, target, k) for k in range(classes)]
    assert {k: float(v) for k, v in metrics.compute().items()} == {
        "accuracy": pytest.approx(sum(p == t for p, t in zip(preds, target, strict=True)) / 200),
        "f1": pytest.approx(scores[1] if classes == 2 else sum(scores) / classes),
        "matthews": pytest.approx(matthews(preds, target), abs=1e-6),
    }


def test_regression_metrics_agree_with_scipy() -> None:
    target = (torch.randint(0, 26, (200,), generator=GENERATOR) / 5).float()  # with ties, as STS-B has them
    preds = target + torch.randn(200, generator=GENERATOR)
    metrics = Glue("stsb").metrics()
    for i in range(0, 200, 32):
        metrics.update(preds[i : i + 32], target[i : i + 32])
    assert {k: float(v) for k, v in metrics.compute().items()} == {
        "pearson": pytest.approx(scipy.stats.pearsonr(preds, target).statistic, abs=1e-5),
        "spearman": pytest.approx(scipy.stats.spearmanr(preds, target).statistic, abs=1e-5),
    }


def test_the_metrics_of_every_task() -> None:
    def names(task: str) -> set[str]:
        return set(Glue(task).metrics())

    assert names("cola") == names("ax") == {"matthews", "accuracy"}
    assert names("mrpc") == names("qqp") == {"f1", "accuracy"}
    assert names("stsb") == {"pearson", "spearman"}
    for task in ("sst2", "mnli", "qnli", "rte", "wnli"):
        assert names(task) == {"accuracy"}
    own = TextData("a.csv", label_names=["x", "y", "z"])
    assert (set(own.metrics()), own.primary_metric) == ({"accuracy", "f1"}, "accuracy")
    assert TextData("a.csv", regression=True).primary_metric == "pearson"


def test_the_filter_for_torchmetrics_warning_is_taken_back() -> None:
    before = list(warnings.filters)
    metric_collection(("spearman",), 1)
    assert list(warnings.filters) == before


def test_an_unknown_metric() -> None:
    with pytest.raises(ValueError, match=r"Unknown metric 'recall'\. Known: accuracy"):
        metric_collection(("recall",), 2)
