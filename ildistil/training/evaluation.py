"""Measure a student, alone, on the sets of a data module."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection

from ildistil.capture import ModelInfo
from ildistil.data.task import Task
from ildistil.metrics import default_metrics

__all__ = ["Evaluation", "batch_size", "predictions"]


class Evaluation:
    """The names of the sets that a student is measured on, and its metrics.

    Args:
        task: what the data module says of itself.
        student: its head decides what is measured where the task says nothing of its labels.
    """

    def __init__(self, task: Task, student: ModelInfo) -> None:
        self._task, self._student = task, student

    def name(self, stage: str, number: int) -> str:
        """Return the name of a set in logs; ``stage`` is ``"val"`` or ``"test"``."""
        names = self._task.validation_names if stage == "val" else self._task.test_names
        return names[number] if number < len(names) else f"{stage}_{number}"

    def make_metrics(self) -> MetricCollection | None:
        """Make new metrics; ``None`` where nothing can be measured."""
        made = self._task.metrics()
        if made is not None or self._task.num_labels is not None:
            return made
        labels, kind = self._student.labels, self._student.problem_type
        return default_metrics(labels, labels == 1 or kind == "regression", kind == "multi_label_classification")

    def measured(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Select what was measured on validation sets."""
        names = self._task.validation_names
        return {key: float(value) for key, value in metrics.items() if key.split("/")[0] in names}


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch."""
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))


def predictions(logits: Tensor) -> Tensor:
    """Return a class index for each row, or a number in a regression."""
    return logits.squeeze(-1).float() if logits.shape[-1] == 1 else logits.argmax(-1)
