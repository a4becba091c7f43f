"""Objectives on the logits: of classes, of regressions, and of masked or next tokens."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ildistil import distributed, functional
from ildistil.capture import Activations, LazyLogits, ModelInfo
from ildistil.errors import CaptureError, ObjectiveError
from ildistil.functional.checks import check_number, check_temperature
from ildistil.functional.logits import Divergence, check_divergence
from ildistil.kernels import chunked
from ildistil.objectives.base import Count, Objective, Weight


class _LogitsObjective(Objective):
    taps = ("logits",)
    of_classes = False  # whether distributions over exclusive classes are compared

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Check that both models have the same labels, and that these are classes where they must be."""
        name, problems = type(self).__name__, (student.problem_type, teacher.problem_type)
        if None not in (student.labels, teacher.labels) and student.labels != teacher.labels:
            raise ObjectiveError(
                f"{name}: the student has {student.labels} labels, the teacher {teacher.labels}. Give the student the "
                f"teacher's labels (num_labels={teacher.labels}), or leave this objective out."
            )
        # The softmax of one output is always 1.
        if self.of_classes and (teacher.labels == 1 or "regression" in problems):
            raise ObjectiveError(f"{name} compares class distributions; a regression has none. Use LogitsMSE.")
        if self.of_classes and "multi_label_classification" in problems:
            raise ObjectiveError(
                f"{name} compares distributions over exclusive classes; a multi-label problem has none. Use LogitsMSE."
            )

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Count:
        """Return the number of examples, or of target tokens of a language model."""
        targets = self._targets(student, batch)
        return Count(targets.sum(), "tokens" if targets.ndim == 2 else "examples")

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean over examples, or over the target tokens of a language model."""
        _check_head(type(self).__name__, student=student, teacher=teacher)
        if None not in (student.next_token, teacher.next_token) and student.next_token != teacher.next_token:
            raise ObjectiveError(
                f"{type(self).__name__}: one model predicts the next token, the other doesn't. Give both the same head."
            )
        if student.lazy_logits is not None:
            self._check_tokens(student.lazy_logits, teacher)
            return self._token_loss(student.lazy_logits, teacher, self._targets(student, batch))
        s, t = student.logits, teacher.logits
        if s.shape != t.shape or s.ndim not in (2, 3):
            raise ObjectiveError(
                f"{type(self).__name__} compares logits of shape (batch, labels) or (batch, tokens, labels); the "
                f"student gives {tuple(s.shape)}, the teacher {tuple(t.shape)}."
            )
        targets = self._targets(student, batch)
        if s.ndim == 3:  # only the rows that count: whole vocabularies are large
            s, t, targets = s[targets], t[targets], torch.ones_like(targets[targets])
        else:  # whatever stands in rows of padding, NaN included, must not reach a gradient
            s, t = (torch.where(targets[:, None], x, 0) for x in (s, t))
        return self.compare(s, t, targets)

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Compare rows of logits ``(rows, labels)``: the mean over the rows of the mask."""

    def _token_loss(self, student: LazyLogits, teacher: Activations, targets: Tensor) -> Tensor:
        """Compare logits that aren't made yet, at the targets ``(batch, tokens)`` only."""
        t = teacher.logits[targets] if teacher.lazy_logits is None else teacher.lazy_logits.at(targets)
        return self.compare(student.at(targets), t, torch.ones_like(targets[targets]))

    def _check_tokens(self, student: LazyLogits, teacher: Activations) -> None:
        theirs = teacher.logits if teacher.lazy_logits is None else teacher.lazy_logits.states
        if theirs.shape[:-1] != student.states.shape[:-1]:
            raise ObjectiveError(
                f"{type(self).__name__} compares logits token by token; the student saw {student.states.shape[1]} "
                f"tokens of {student.states.shape[0]} examples, the teacher has logits for {tuple(theirs.shape[:-1])}."
            )

    def _targets(self, student: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return which rows of the logits count: boolean, ``(batch,)`` or ``(batch, tokens)``."""
        lazy = student.lazy_logits
        shape = student.logits.shape[:-1] if lazy is None else lazy.states.shape[:-1]
        if len(shape) == 1:
            return student.mask.any(1)
        labels = batch.get("labels")
        real = student.mask if labels is None else labels != -100
        if real.shape != shape:
            raise ObjectiveError(
                f"{type(self).__name__}: the student gives logits for {tuple(shape)} tokens, and "
                f"{'the mask' if labels is None else 'the labels'} of the batch have the shape {tuple(real.shape)}."
            )
        if labels is not None and student.next_token is None:
            raise ObjectiveError(
                f"{type(self).__name__}: which label a row of the student's logits predicts isn't known: "
                f"{student.why_not_known}. Leave the labels out of the batch: then all real tokens count."
            )
        if not student.next_token:
            return real
        # Position i predicts token i + 1; the padding before a text predicts nothing.
        return torch.cat([real[:, 1:] & student.mask[:, :-1], torch.zeros_like(real[:, :1])], dim=1)


def _check_head(name: str, **models: Activations) -> None:
    """Refuse models that make no logits."""
    for whose, model in models.items():
        try:
            if model.lazy_logits is None:
                model.logits  # noqa: B018 (what raises)
        except CaptureError as error:
            raise ObjectiveError(
                f"{name} reads logits, and the {whose} makes none. {error} Train one on top of an encoder first: "
                "'ildistil finetune' on labels, or with a Corpus whose labels are masked or next tokens "
                "(--model.freeze true leaves the encoder as it is). Or leave this objective out."
            ) from error


class _RowObjective(_LogitsObjective):
    """Compares each row of logits by itself, so that a vocabulary's logits need never all exist."""

    @abstractmethod
    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Compare rows of logits ``(rows, labels)``: one value for each."""

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return the mean over the rows."""
        return functional.example_mean(self.values(student, teacher), mask)

    def _token_loss(self, student: LazyLogits, teacher: Activations, targets: Tensor) -> Tensor:
        """Go over the targets a few rows at a time, through both models' output layers."""
        theirs = teacher.lazy_logits
        rows = teacher.logits[targets] if theirs is None else theirs.states[targets]

        def values(logits: Tensor, part: slice) -> Tensor:
            with torch.no_grad():
                wanted = rows[part] if theirs is None else theirs.made(rows[part])
            if wanted.shape != logits.shape:
                raise ObjectiveError(
                    f"{type(self).__name__}: the student's vocabulary has {logits.shape[-1]} entries, the teacher's "
                    f"{wanted.shape[-1]}. Both must be the same."
                )
            return self.values(logits, wanted)

        states = student.states[targets]
        return chunked.summed(values, student.made, student.layer, states) / max(1, len(states))


class LogitsKL(_RowObjective):
    """Divergence of the class distributions ("vanilla" distillation), for classes or for tokens of a vocabulary.

    With ``p = softmax(z_T / T)`` of the teacher and ``q = softmax(z_S / T)`` of the student, ``T^2 KL(p || q)``, in
    nats; reverse ``T^2 KL(q || p)``; generalised Jensen-Shannon ``T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`` with
    ``m = beta p + (1 - beta) q``. Mean over examples; for language models over the target tokens (where ``labels``
    isn't -100; without labels, over all real tokens), the next ones where the model predicts the next. The other
    arguments are those of :class:`Objective`.

    Args:
        temperature: softening ``T``, between 0.01 and 1000; the factor ``T^2`` keeps the size of the gradient
            independent of it.
        divergence: ``"forward"``, ``"reverse"`` or ``"jensen-shannon"``.
        beta: the teacher's part of the mixture, ``0 < beta < 1``; for Jensen-Shannon.
        top_k: keep the teacher's ``k`` most likely classes apart, and count all others as one.

    Raises:
        ConfigError: an argument is out of range.
        ObjectiveError: the models have different labels, or a single one (a regression).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; reverse and Jensen-Shannon:
    Agarwal et al., "On-Policy Distillation of Language Models", 2024.
    """

    of_classes = True

    def __init__(
        self,
        weight: Weight = 1.0,
        temperature: float = 2.0,
        divergence: Divergence = "forward",
        beta: float = 0.5,
        top_k: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        check_divergence(temperature, divergence, beta, top_k, "LogitsKL: ")
        self.temperature, self.divergence, self.beta, self.top_k = temperature, divergence, beta, top_k

    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the divergence of every row."""
        return functional.logits_kl(student, teacher, self.temperature, self.divergence, self.beta, self.top_k)

    def describe(self) -> str:
        """Return the temperature, and what is not the usual divergence."""
        parts = ["logits", f"T = {self.temperature:g}"]
        parts += [self.divergence] if self.divergence != "forward" else []
        parts += [f"top {self.top_k}"] if self.top_k is not None else []
        return ", ".join(parts)


class LogitsMSE(_RowObjective):
    """Mean squared error of the logits; also the one for regression.

    ``1/C ||z_S - z_T||^2``, mean over examples; for language models over the target tokens, as in :class:`LogitsKL`.
    The arguments are those of :class:`Objective`.

    Raises:
        ObjectiveError: the models have different numbers of labels.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014.
    """

    def values(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the squared error of every row."""
        return functional.logits_mse(student, teacher)


class LogitsDIST(_LogitsObjective):
    """Pearson distance of the class probabilities, over the classes of an example and over the examples of a class.

    ``T^2 (inter * mean_b(1 - corr_c(q_bc, p_bc)) + intra * mean_c(1 - corr_b(q_bc, p_bc)))`` with ``q`` and ``p`` the
    student's and teacher's probabilities at temperature ``T``. It asks for the same order and proportions, not for the
    same values. Of two classes a correlation is always 1 or -1: then only the part over the batch teaches. The term
    couples the examples of a batch: it takes in the batches of all processes, and refuses accumulated batches. For
    language models the rows are the target tokens, as in :class:`LogitsKL`. The other arguments are those of
    :class:`Objective`.

    Args:
        temperature: softening ``T``, between 0.01 and 1000.
        inter: factor of the part over classes.
        intra: factor of the part over the batch.

    Raises:
        ObjectiveError: the models have different labels, or a single one (a regression); or nothing would teach.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022.
    """

    batch_coupled = True
    of_classes = True

    def __init__(
        self,
        weight: Weight = 1.0,
        temperature: float = 1.0,
        inter: float = 1.0,
        intra: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        check_temperature(temperature, "LogitsDIST: temperature")
        for part, factor in (("inter", inter), ("intra", intra)):
            check_number(f"LogitsDIST: {part}", factor, ">= 0 and at most 1e30", lambda factor: factor >= 0)
        if inter == intra == 0:
            raise ObjectiveError("LogitsDIST: inter and intra are both 0: nothing would teach.")
        self.temperature, self.inter, self.intra = temperature, inter, intra

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Check the labels."""
        super().build(student, teacher)
        if teacher.labels == 2 and self.intra == 0:
            raise ObjectiveError(
                "LogitsDIST: the correlation of two classes is always 1 or -1, so the part over classes teaches "
                "nothing. Use intra > 0, or LogitsKL."
            )

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return both parts, over the rows of all processes."""
        within, defined = functional.logits_dist(student, teacher, self.temperature)
        defined = defined & mask
        rows = distributed.all_reduce_sum(defined.sum()).clamp(min=1)
        inter = distributed.all_reduce_sum(torch.where(defined, within, 0).sum()) / rows
        intra = functional.logits_dist_over_batch(student, teacher, mask, self.temperature, distributed.all_reduce_sum)
        return self.inter * inter + self.intra * intra
