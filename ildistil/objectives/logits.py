"""Objectives on the logits."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ildistil import functional
from ildistil.capture import Activations, Sizes
from ildistil.objectives.base import Objective, ObjectiveError

__all__ = ["LogitsKL", "LogitsMSE"]


class _LogitsObjective(Objective):
    taps = ("logits",)

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Check that both models have the same labels."""
        if None not in (student.labels, teacher.labels) and student.labels != teacher.labels:
            raise ObjectiveError(
                f"{type(self).__name__}: the student has {student.labels} labels, the teacher {teacher.labels}. Give "
                f"the student the teacher's labels (num_labels={teacher.labels}), or leave this objective out."
            )

    def _checked(self, student: Activations, teacher: Activations) -> tuple[Tensor, Tensor]:
        s, t = student.logits, teacher.logits
        if s.shape != t.shape or s.ndim != 2:
            raise ObjectiveError(
                f"{type(self).__name__} compares logits of shape (batch, labels); the student gives {tuple(s.shape)}, "
                f"the teacher {tuple(t.shape)}."
            )
        return s, t


class LogitsKL(_LogitsObjective):
    """Kullback-Leibler divergence of the class distributions ("vanilla" distillation).

    ``T^2 KL(softmax(z_T / T) || softmax(z_S / T))``, mean over examples, in nats.

    Args:
        weight: factor of the term.
        temperature: softening ``T > 0``; the factor ``T^2`` keeps the size of the gradient independent of it.
        name: key of the term in logs; default ``logits_kl``.

    Raises:
        ObjectiveError: the models have different labels, or a single one (a regression).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 2.0, name: str | None = None) -> None:
        super().__init__(weight, name)
        if not temperature > 0:
            raise ObjectiveError(f"LogitsKL: temperature must be > 0, got {temperature}.")
        self.temperature = temperature

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Check the labels; one output is a regression, whose softmax is always 1."""
        super().build(student, teacher)
        if teacher.labels == 1 or "regression" in (student.problem_type, teacher.problem_type):
            raise ObjectiveError("LogitsKL compares class distributions; a regression has none. Use LogitsMSE.")
        if "multi_label_classification" in (student.problem_type, teacher.problem_type):
            raise ObjectiveError(
                "LogitsKL compares distributions over exclusive classes; a multi-label problem has none. Use LogitsMSE."
            )

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean over examples."""
        return functional.example_mean(
            functional.logits_kl(*self._checked(student, teacher), self.temperature), student.mask.sum(1)
        )

    def describe(self) -> str:
        """Say the temperature."""
        return f"logits, T = {self.temperature:g}"


class LogitsMSE(_LogitsObjective):
    """Mean squared error of the logits; also the one for regression.

    ``1/C ||z_S - z_T||^2``, mean over examples.

    Args:
        weight: factor of the term.
        name: key of the term in logs; default ``logits_mse``.

    Raises:
        ObjectiveError: the models have different numbers of labels.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014.
    """

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean over examples."""
        return functional.example_mean(functional.logits_mse(*self._checked(student, teacher)), student.mask.sum(1))
