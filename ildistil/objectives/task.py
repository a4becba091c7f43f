"""The student's own supervised loss."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ildistil import functional
from ildistil.capture import Activations, LazyLogits
from ildistil.capture.head import labels_of_rows
from ildistil.kernels import chunked
from ildistil.objectives.base import Count, Objective


class TaskLoss(Objective):
    """The loss the student's own head computes from the batch's ``labels``; needs no teacher.

    Cross-entropy for classification, mean squared error for regression, and so on: whatever the model's ``forward``
    returns as ``loss``, in its own reduction. The arguments are those of :class:`Objective`.
    """

    taps = ("loss",)
    teacher_taps = ()

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Count:
        """Return the number of labels: of examples, or of the target tokens of a language model."""
        labels = batch.get("labels")
        if labels is None:  # the model takes them from elsewhere
            return super().count(student, batch)
        if labels.is_floating_point():
            return Count(torch.tensor(len(labels), device=labels.device))
        targets = labels_of_rows(labels, student.next_token)
        return Count((targets != -100).sum(), "tokens" if labels.ndim == 2 else "examples")

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the student's loss; 0 for a batch without any label, of which the model makes a mean of nothing."""
        if student.lazy_logits is not None:  # not made yet: only those that have a label are, a few rows at a time
            return self._token_loss(student.lazy_logits)
        return torch.where(self.count(student, batch).number > 0, student.loss, 0)

    def _token_loss(self, logits: LazyLogits) -> Tensor:
        states, labels = logits.labelled()

        def values(made: Tensor, rows: slice) -> Tensor:
            with functional.full_precision(made) as (z,):
                return F.cross_entropy(z, labels[rows], reduction="none")

        return chunked.summed(values, logits.made, logits.layer, states) / max(1, len(states))
