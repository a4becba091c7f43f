import math
import warnings
from typing import Any

import pytest
import scipy.stats
import torch

from ildistil.data import Glue, TextData
from ildistil.errors import ConfigError
from ildistil.metrics import AveragePrecision, Matthews, default_metrics, metric_collection

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


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("constant", ["predictions", "targets", "both"])
def test_matthews_of_a_constant_is_exactly_zero(classes: int, constant: str) -> None:
    drawn_rows = torch.randint(classes, (100,), generator=GENERATOR)
    for value in range(classes):
        fixed = torch.full((100,), value)
        preds, target = {"predictions": (fixed, drawn_rows), "targets": (drawn_rows, fixed), "both": (fixed, fixed)}[
            constant
        ]
        assert float(Matthews(classes)(preds, target)) == 0.0


@pytest.mark.parametrize("classes", [2, 3])
def test_matthews_agrees_with_loops_in_whole_numbers_and_with_scikit_learn(classes: int) -> None:
    reference = pytest.importorskip("sklearn.metrics").matthews_corrcoef
    for skew in (0.5, 0.97):  # the second: nearly constant predictions
        target = torch.randint(classes, (500,), generator=GENERATOR)
        rare = torch.rand(500, generator=GENERATOR) > skew
        preds = torch.where(rare, target, torch.zeros_like(target))
        found = float(Matthews(classes)(preds, target))
        assert found == pytest.approx(reference(target, preds), abs=1e-6)
        assert found == pytest.approx(matthews(preds.tolist(), target.tolist()), abs=1e-6)
    assert float(Matthews(classes)(target, target)) == pytest.approx(1.0)
    if classes == 2:
        assert float(Matthews(classes)(1 - target, target)) == pytest.approx(-1.0)


def test_matthews_of_many_rows_loses_no_digits() -> None:
    metric = Matthews(2)
    metric.confmat = torch.tensor([[99_999_000, 500], [499, 1]])  # float32 products are off by more than the result
    tn, fp, fn, tp = 99_999_000, 500, 499, 1
    expected = (tn * tp - fp * fn) / math.sqrt((tn + fp) * (tn + fn) * (tp + fp) * (tp + fn))
    metric._update_count = 1
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-5)


def test_matthews_over_processes_is_that_of_all_rows() -> None:
    preds, target = torch.randint(3, (2, 40), generator=GENERATOR), torch.randint(3, (2, 40), generator=GENERATOR)
    there = Matthews(3)
    there.update(preds[1], target[1])
    # As with two processes, where torchmetrics gathers each state in compute().
    gathered = {
        "dist_sync_fn": lambda state, group=None: [state, there.confmat],
        "distributed_available_fn": lambda: True,
    }
    here = Matthews(3, **gathered)
    here.update(preds[0], target[0])
    assert float(here.compute()) == pytest.approx(
        matthews(preds.flatten().tolist(), target.flatten().tolist()), abs=1e-6
    )


def test_the_metrics_of_a_task_of_which_only_the_labels_are_known() -> None:
    def names(*args: Any) -> list[str] | None:
        made = default_metrics(*args)
        return None if made is None else list(made)

    assert names(2, False) == names(5, False) == ["accuracy"]
    assert names(1, True) == ["pearson", "spearman"]
    assert names(4, False, True) == ["average_precision", "micro_f1"]
    assert names(None, False) is names(None, True) is names(3, True) is None


def test_metrics_of_classes_need_classes() -> None:
    with pytest.raises(ConfigError, match="'accuracy' needs at least two classes, got 1"):
        metric_collection(("accuracy",), 1)


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


def average_precision(scores: list[float], hits: list[bool]) -> float:
    """The mean over the hits of the precision at the last row that scores no less."""
    found = 0.0
    for score, hit in zip(scores, hits, strict=True):
        if hit:
            at_least = [h for s, h in zip(scores, hits, strict=True) if s >= score]
            found += sum(at_least) / len(at_least)
    return found / sum(hits)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("positive", [None, 0, 1, "all"])
def test_f1_and_average_precision_are_of_the_positive_class(classes: int, positive: Any) -> None:
    preds, target = drawn(classes)
    logits = torch.randn(200, classes, generator=GENERATOR) * 2
    logits = logits.round() if classes == 2 else logits  # with ties
    logits += 3 * torch.nn.functional.one_hot(torch.tensor(target), classes) * (torch.rand(200, 1) < 0.5)
    metrics = metric_collection(("f1", "macro_f1", "average_precision"), classes, positive)
    for i in range(0, 200, 32):
        part = slice(i, i + 32)
        metrics.update(torch.tensor(preds[part]), torch.tensor(target[part]), logits=logits[part])
    shares = logits.double().softmax(-1) if classes > 2 else logits - logits.flip(1)
    of_class = [average_precision(shares[:, k].tolist(), [t == k for t in target]) for k in range(classes)]
    scores = [f1(preds, target, k) for k in range(classes)]
    one = 1 if positive is None and classes == 2 else positive
    mean = one is None or one == "all"
    assert {k: float(v) for k, v in metrics.compute().items()} == {
        "f1": pytest.approx(sum(scores) / classes if mean else scores[one]),
        "macro_f1": pytest.approx(sum(scores) / classes),
        "average_precision": pytest.approx(sum(of_class) / classes if mean else of_class[one], abs=1e-5),
    }
    sklearn = pytest.importorskip("sklearn.metrics")
    assert float(metrics.compute()["macro_f1"]) == pytest.approx(sklearn.f1_score(target, preds, average="macro"))


def test_average_precision_tells_confident_rows_apart() -> None:
    """Their probabilities are all 1 in float32."""
    logits = torch.tensor([[0.0, 40.0], [0.0, 30.0], [0.0, 50.0], [0.0, 60.0]])
    assert len(logits.softmax(-1)[:, 1].unique()) == 1
    assert float(AveragePrecision([1])(None, torch.tensor([1, 0, 1, 0]), logits)) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_average_precision_of_odd_rows() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    assert float(AveragePrecision([1])(None, torch.zeros(3, dtype=torch.long), logits)) == 0.0  # none is positive
    assert float(AveragePrecision([1])(None, torch.tensor([1, -100, 0]), logits)) == pytest.approx(0.5)
    assert math.isnan(AveragePrecision([1])(None, torch.tensor([1, 0, 0]), logits * math.nan))


def test_metrics_of_several_labels_a_row() -> None:
    logits = torch.randn(60, 4, generator=GENERATOR)
    target = (torch.rand(60, 4, generator=GENERATOR) < 0.3).float()
    target[:, 3] = 0  # a label that no row has
    metrics = default_metrics(4, False, multi_label=True)
    assert metrics is not None
    for i in range(0, 60, 16):
        part = slice(i, i + 16)
        metrics.update((logits[part].sigmoid() > 0.5).long(), target[part], logits=logits[part])
    hits = sum(int(p > 0 and t == 1) for p, t in zip(logits.flatten(), target.flatten(), strict=True))
    wrong = sum(int((p > 0) != (t == 1)) for p, t in zip(logits.flatten(), target.flatten(), strict=True))
    of_label = [average_precision(logits[:, k].tolist(), (target[:, k] == 1).tolist()) for k in range(3)]
    assert {k: float(v) for k, v in metrics.compute().items()} == {
        "micro_f1": pytest.approx(2 * hits / (2 * hits + wrong)),
        "average_precision": pytest.approx(sum(of_label) / 3, abs=1e-6),
    }
    with pytest.raises(ConfigError, match="'accuracy' is not for rows of several labels"):
        metric_collection(("accuracy",), 4, multi_label=True)


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_rows_and_tokens_without_a_label_do_not_count(shape: tuple[int, ...]) -> None:
    target = torch.tensor([0, -100, 2, 1, -100, 2]).view(shape)
    preds = torch.tensor([0, 1, 2, 2, 0, 2]).view(shape)
    metrics = metric_collection(("accuracy", "f1", "matthews"), 3)
    metrics.update(preds, target)
    kept = metric_collection(("accuracy", "f1", "matthews"), 3)
    kept.update(torch.tensor([0, 2, 2, 2]), torch.tensor([0, 2, 1, 2]))
    assert metrics.compute() == kept.compute()
    metrics.update(preds, torch.full(shape, -100))
    assert metrics.compute() == kept.compute()
