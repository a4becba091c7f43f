"""The student's own supervised loss."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ildistil.capture import Activations
from ildistil.objectives.base import Objective

__all__ = ["TaskLoss"]


class TaskLoss(Objective):
    """The loss the student's own head computes from the batch's ``labels``; needs no teacher.

    Cross-entropy for classification, mean squared error for regression, and so on: whatever the model's ``forward``
    returns as ``loss``, in its own reduction.

    Args:
        weight: factor of the term.
        name: key of the term in logs; default ``task_loss``.
    """

    taps = ("loss",)
    teacher_taps = ()

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the student's loss."""
        return student.loss
