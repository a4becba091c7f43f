"""Measure a student, alone, on the sets of a data module."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from ildistil.capture import ModelInfo
from ildistil.capture.inputs import token_mask, without_labels
from ildistil.capture.trial import Trial, predicts_next_token, undisturbed
from ildistil.data.task import Task, set_names
from ildistil.errors import CaptureError, NotFiniteError
from ildistil.metrics import IGNORED, default_metrics

__all__ = ["Evaluation", "Measures", "batch_size", "check_predicted"]


class Measures(nn.Module):
    """What is measured on one set: the mean loss, the metrics, and how often each class is predicted.

    All of it is over all rows, whatever the batches and processes they came in.

    Args:
        metrics: of the task; ``None`` where nothing is measured but the loss.
        classes: how many there are; 0 where labels are no classes.
    """

    def __init__(self, metrics: MetricCollection | None, classes: int) -> None:
        super().__init__()
        self.loss = _MeanLoss()
        self.metrics = metrics
        self.seen = _Seen(classes)
        self._has_loss = False

    def update(self, output: Any, predictions: Tensor, labels: Tensor, weight: Tensor) -> None:
        """Take in a batch; ``weight`` is how many things its loss is the mean of."""
        logits, loss = output.logits.detach(), getattr(output, "loss", None)
        if loss is not None:
            self._has_loss = True
            self.loss.update(loss.detach(), weight)
        if self.metrics is not None:
            self.metrics.update(predictions, labels, logits=logits)
        self.seen.update(predictions, labels, logits)

    def logged(self) -> Iterator[tuple[str, Metric]]:
        """Return what is logged of the set, by name."""
        if self._has_loss:
            yield "loss", self.loss
        if self.metrics is not None:
            yield from self.metrics.items(keep_base=True)


class _MeanLoss(Metric):
    """The mean over all that counts; NaN where nothing does. torchmetrics' own drops NaN, or else the weights."""

    higher_is_better = False
    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, mean: Tensor, weight: Tensor) -> None:
        """Take in the mean of a batch, which is nothing where its weight is 0."""
        self.total += torch.where(weight > 0, mean.float(), 0) * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        return self.total / self.weight


class _Seen(Metric):
    """How many rows were predicted as, and belong to, each class; and how many have logits that are NaN."""

    full_state_update = False
    predicted: Tensor
    true: Tensor
    spoilt: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name, size in (("predicted", classes), ("true", classes), ("spoilt", 1)):
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Count the rows of a batch."""
        self.spoilt += logits.isnan().flatten(1).any(1).sum()
        numbers = torch.arange(len(self.predicted), device=labels.device)
        if len(numbers):
            self.predicted += ((predictions[:, None] == numbers) & (labels != IGNORED)[:, None]).sum(0)
            self.true += (labels[:, None] == numbers).sum(0)

    def compute(self) -> tuple[list[int], list[int], int]:
        """Return the counts of all processes."""
        return self.predicted.tolist(), self.true.tolist(), int(self.spoilt)


class Evaluation:
    """The names of the sets that a student is measured on, and how.

    Args:
        task: what the data module says of itself.
        student: its head decides what is measured where the task says nothing of its labels.
    """

    def __init__(self, task: Task, student: ModelInfo) -> None:
        self._task, self._student = task, student
        self._validated: set[str] = set()
        self._constant: set[str] = set()
        self._next_token: bool | None = None

    def name(self, stage: Literal["val", "test"], number: int, count: int) -> str:
        """Return the name of one of ``count`` sets in logs.

        Raises:
            DataError: the data module names more or fewer sets than it has.
        """
        names = self._task.validation_names if stage == "val" else self._task.test_names
        name = set_names(names, count)[number]
        if stage == "val":
            self._validated.add(name)
        return name

    def measures(self, labels: Tensor) -> Measures:
        """Return new measures of a set with such labels."""
        made, classes = self._task.metrics(), self._student.labels or 0
        multi_label = self.is_multi_label(labels)
        if made is None and self._task.num_labels is None:
            made = default_metrics(self._student.labels, self._is_regression, multi_label)
        return Measures(made, classes if classes > 1 and labels.ndim == 1 and not labels.is_floating_point() else 0)

    @property
    def _is_regression(self) -> bool:
        return self._task.regression or self._student.labels == 1 or self._student.problem_type == "regression"

    def is_multi_label(self, labels: Tensor | None = None) -> bool:
        """Return whether a row may have several labels; numbers for each class say so too, as in transformers."""
        if self._task.multi_label or self._student.problem_type == "multi_label_classification":
            return True
        several = labels is not None and labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] > 1
        return several and not self._is_regression

    def predictions(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return a class index for each row, 0 or 1 for each of several labels, or a number in a regression.

        A label is predicted where its probability is above 0.5.
        """
        if self.is_multi_label(labels):
            return (logits > 0).long()
        return logits.squeeze(-1).float() if logits.shape[-1] == 1 else logits.argmax(-1)

    def weight(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, logits: Tensor) -> Tensor:
        """Return how many things the model's loss of a batch is the mean of.

        These are its rows with a label, or the target tokens of a language model.
        """
        if labels.is_floating_point():
            return torch.tensor(len(labels), device=labels.device)
        if labels.ndim == 2 and logits.shape[:2] == labels.shape and self._predicts_next(model, inputs, logits):
            labels = labels[:, 1:]
        return torch.ne(labels, IGNORED).sum()

    def _predicts_next(self, model: nn.Module, inputs: dict[str, Any], logits: Tensor) -> bool:
        """Return whether logits predict the next token, which the model's loss then has no first label for."""
        real = token_mask(inputs)
        real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if real is None else real
        if self._next_token is None and real.shape == logits.shape[:2]:
            found: bool | str | None = "not known"
            with suppress(CaptureError), undisturbed(model):
                trial = Trial.of(without_labels(model, inputs), real, repeats=False)
                found = predicts_next_token(model, trial, logits.shape[-1])
            self._next_token = None if found is None else found is True
        return self._next_token is True

    def look(self, measures: nn.ModuleDict, quiet: bool = False) -> None:
        """Look at the predictions on all sets, when they are through.

        A student that predicts one class for all rows of a set is pointed out once.

        Args:
            measures: by the names of the sets.
            quiet: whether these are only some rows.

        Raises:
            NotFiniteError: logits are NaN.
        """
        for name, each in measures.items():
            assert isinstance(each, Measures)
            if not each.seen.update_called:
                continue
            predicted, true, spoilt = each.seen.compute()
            each.seen.reset()
            _refuse_nan(spoilt, f"rows of {name}")
            constant = sum(map(bool, predicted)) == 1 and sum(map(bool, true)) > 1
            if constant and not quiet and name not in self._constant:
                self._constant.add(name)
                rank_zero_warn(
                    f"The student predicts one class for all {sum(predicted):,} rows of {name}: "
                    f"{self._class_name(predicted.index(max(predicted)))}. Their labels are of {sum(map(bool, true))} "
                    "classes. Metrics can look good all the same, where one class is frequent: look at macro_f1 or "
                    "matthews. Early in training this may pass; else try another learning rate."
                )

    def _class_name(self, number: int) -> str:
        names = self._task.label_names or self._student.label_names
        return f"{names[number]!r} (number {number})" if number < len(names) else f"number {number}"

    def measured(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Select what was measured on validation sets."""
        return {key: float(value) for key, value in metrics.items() if key.split("/")[0] in self._validated}


def check_predicted(logits: Tensor) -> None:
    """Refuse a batch of predictions that are none.

    Raises:
        NotFiniteError: logits are NaN.
    """
    _refuse_nan(int(logits.isnan().flatten(1).any(1).sum()), "rows of a batch")


def _refuse_nan(count: int, rows: str) -> None:
    if count:
        raise NotFiniteError(
            f"The student's logits are NaN for {count} {rows}: what it predicts there means nothing. Look for NaN in "
            "its weights, or for an unfit precision."
        )


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch."""
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
