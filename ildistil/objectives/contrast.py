"""Contrastive objectives: a student's text should be nearest to the teacher's same text."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ildistil import functional, ranks
from ildistil.capture import Activations, Sizes
from ildistil.functional.reduction import unit
from ildistil.mappings import All, LayerMapping
from ildistil.objectives.base import LayerObjective, ObjectiveError, Stack, Weight, same_tokens

__all__ = ["CLSContrast", "CLSInBatchContrast"]


class _Contrast(LayerObjective):
    """Compares first-token states of all mapped layers, concatenated and mapped to a few dimensions on both sides."""

    taps = ("hidden",)

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        size: int = 128,
        temperature: float = 0.07,
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, All() if mapping is None else mapping, stack, name)
        if size < 1 or not temperature > 0:
            raise ObjectiveError(
                f"{type(self).__name__}: size must be at least 1 and temperature > 0, got {size} and {temperature}."
            )
        if self.mapping.draws:
            raise ObjectiveError(f"{type(self).__name__} concatenates fixed layers; {self.mapping} draws them anew.")
        self.size, self.temperature = size, temperature

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Resolve the mapping and make a projection of each model."""
        super().build(student, teacher)
        for role, sizes, layers in zip(("student", "teacher"), self.sizes, self._layers(), strict=True):
            if sizes.width is None:
                raise ObjectiveError(
                    f"{type(self).__name__} needs the width of the {role}, and a config doesn't say it."
                )
            self.projections[role] = nn.Linear(sizes.width * len(layers), self.size)

    def describe(self) -> str:
        """Give the layers of both sides."""
        student, teacher = (" ".join(map(str, layers)) for layers in self._layers())
        return f"[{student}]<-[{teacher}]"

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Not used: all layers are compared together."""
        raise NotImplementedError

    def _layers(self) -> tuple[list[int], list[int]]:
        return sorted({s for s, _ in self.pairs}), sorted({t for _, t in self.pairs})

    def _vectors(self, student: Activations, teacher: Activations) -> tuple[Tensor, Tensor, Tensor]:
        """Give a vector of length 1 for each example, of both models, and which examples have a token at all."""
        mask = student.stack(self.stack).mask
        vectors = []
        for role, run, layers in zip(("student", "teacher"), (student, teacher), self._layers(), strict=True):
            hidden = run.stack(self.stack).hidden
            same_tokens(mask, hidden[layers[0]], axis=1)
            joined = torch.cat([functional.first_token(hidden[layer], mask) for layer in layers], dim=-1)
            with functional.full_precision(self.projections[role](joined)) as (vector,):
                vectors.append(unit(vector))
        return vectors[0], vectors[1], mask.any(1)


class CLSContrast(_Contrast):
    """Contrast of each text with texts of other classes, kept in a memory bank ("Hid-CLS-Contrast").

    ``-1/2 sum over both directions of log( exp(s t / T) / (exp(s t / T) + sum_k exp(s t_k / T)) )``, mean over
    examples. ``s`` and ``t`` are the first token's states of all mapped layers of student and teacher, concatenated,
    mapped to ``size`` dimensions and divided by their length; ``t_k`` (for the other direction ``s_k``) are the vectors
    of ``negatives`` texts of other classes, drawn from the bank. The bank keeps one vector of each model for every text
    it has met, by the batch's ``row_id``, and moves it by ``new = momentum * old + (1 - momentum) * now``. Until it
    knows texts of other classes, which is in the first step, the term is 0.

    The bank is the same in all processes, grows with the row ids it meets, and is in the checkpoint, not in the
    exported student. Draws depend on ``seed``, step and class only.

    Args:
        weight: factor of the term: a number, or a schedule.
        mapping: which layers take part, on either side; default ``All()``. How it pairs them doesn't matter.
        size: number of dimensions that vectors are mapped to.
        temperature: ``T > 0``.
        negatives: how many texts of other classes to draw.
        momentum: the old vector's part when the bank learns a new one, from 0 to below 1.
        seed: of the draws.
        stack: which layers of an encoder-decoder: ``"encoder"`` or ``"decoder"``.
        name: key of the term in logs; default ``cls_contrast``.

    Raises:
        ObjectiveError: the problem has no classes; or a batch has no ``row_id`` or no class labels.

    Source: Sun et al., "Contrastive Distillation on Intermediate Representations for Language Model Compression"
    (CoDIR), 2020; Tian et al., "Contrastive Representation Distillation", 2020; Wang et al., 2023.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        size: int = 128,
        temperature: float = 0.07,
        negatives: int = 100,
        momentum: float = 0.5,
        seed: int = 0,
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, size, temperature, stack, "cls_contrast" if name is None else name)
        if negatives < 1 or not 0 <= momentum < 1:
            raise ObjectiveError(
                f"CLSContrast: negatives must be at least 1 and momentum in [0, 1), got {negatives} and {momentum}."
            )
        self.negatives, self.momentum, self.seed = negatives, momentum, seed
        self._bank = {"student": torch.empty(0, size), "teacher": torch.empty(0, size)}
        self._classes = torch.empty(0, dtype=torch.long)  # -1: not met yet
        self._step: int | None = None
        self._now: list[Tensor] = []
        self._waiting: list[list[Tensor]] = []

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Make the projections."""
        if teacher.problem_type in ("regression", "multi_label_classification") or teacher.labels == 1:
            raise ObjectiveError(
                "CLSContrast draws texts of other classes, and this problem has no exclusive classes. Use "
                "CLSInBatchContrast."
            )
        super().build(student, teacher)

    def begin(self, step: int | None) -> None:
        """Let the bank learn what was met in the step before; within a step it stays, whatever is accumulated."""
        super().begin(step)
        if step is None or step != self._step:
            self._learn()
        self._step = step

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean of both directions."""
        rows, classes = self._rows(batch)
        s, t, real = self._vectors(student, teacher)
        real = real & (classes >= 0)
        self._now = [rows[real], classes[real], s[real].detach(), t[real].detach()]
        drawn, drawn_for = self._draw(classes[real])
        allowed = drawn_for == classes[:, None]
        bank = {role: vectors[drawn].to(s.dtype) for role, vectors in self._bank.items()}
        values = functional.info_nce(s, t, bank["teacher"], allowed, self.temperature)
        values = (values + functional.info_nce(t, s, bank["student"], allowed, self.temperature)) / 2
        return functional.example_mean(values, real)

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the number of examples with a token and a class."""
        return (student.stack(self.stack).mask.any(1) & (self._rows(batch)[1] >= 0)).sum()

    def remember(self) -> None:
        """Note the texts of this step, of all processes."""
        if self._now:
            self._waiting.append([ranks.gathered(x) for x in self._now])
        self._now = []

    def state_dict(self) -> dict[str, Any]:
        """Give the bank for a checkpoint."""
        self._learn()
        return {"student": self._bank["student"], "teacher": self._bank["teacher"], "classes": self._classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the bank of a checkpoint."""
        self._bank = {role: state_dict[role] for role in self._bank}
        self._classes = state_dict["classes"]
        self._waiting = []

    def _rows(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        rows, classes = batch.get("row_id"), batch.get("labels")
        if not isinstance(rows, Tensor):
            raise ObjectiveError(
                "CLSContrast keeps a vector of each text, and the batch has no 'row_id', a number for each row of the "
                "data. ildistil's data modules give one; else add it in the collate function, or use "
                "CLSInBatchContrast."
            )
        if not isinstance(classes, Tensor) or classes.ndim != 1 or classes.is_floating_point():
            raise ObjectiveError(
                "CLSContrast draws texts of other classes, and the batch's 'labels' are no classes. Use "
                "CLSInBatchContrast."
            )
        self._to(rows.device)
        return rows, classes

    def _draw(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Draw texts of other classes for every class of the batch; give their rows, and the class they are for."""
        drawn, drawn_for = [classes.new_empty(0)], [classes.new_empty(0)]
        for present in torch.unique(classes).tolist():
            others = ((self._classes >= 0) & (self._classes != present)).nonzero().squeeze(1)
            # By class and step, not by batch: the same in all processes, and in all parts of an accumulated batch.
            seed = random.Random(f"{self.seed} {self._step} {present}").getrandbits(62)
            picked = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: self.negatives]
            drawn.append(others[picked.to(others.device)])
            drawn_for.append(torch.full_like(drawn[-1], present))
        return torch.cat(drawn), torch.cat(drawn_for)

    def _learn(self) -> None:
        for waiting in self._waiting:
            # Samplers repeat rows to give every process as many: the first one counts.
            once, where = torch.unique(waiting[0], return_inverse=True)
            numbers = torch.arange(len(where), device=where.device)
            first = torch.full_like(once, len(where)).scatter_reduce(0, where, numbers, "amin")
            rows, classes, *vectors = (x[first] for x in waiting)
            self._to(rows.device)
            self._grow(int(rows.max()) + 1 if len(rows) else 0)
            known = (self._classes[rows] >= 0).unsqueeze(1)
            for role, now in zip(self._bank, vectors, strict=True):
                bank = self._bank[role]
                now = now.to(bank.dtype)
                moved = self.momentum * bank[rows] + (1 - self.momentum) * now
                bank[rows] = unit(torch.where(known, moved, now))
            self._classes[rows] = classes
        self._waiting = []

    def _grow(self, rows: int) -> None:
        more = rows - len(self._classes)
        if more > 0:
            more += len(self._classes)  # twice as large at least, so that growing is rare
            self._classes = torch.cat([self._classes, self._classes.new_full((more,), -1)])
            self._bank = {role: torch.cat([b, b.new_zeros(more, self.size)]) for role, b in self._bank.items()}

    def _to(self, device: torch.device) -> None:
        if self._classes.device != device:
            self._classes = self._classes.to(device)
            self._bank = {role: bank.to(device) for role, bank in self._bank.items()}


class CLSInBatchContrast(_Contrast):
    """Contrast of each text with the other texts of its batch, without a memory bank.

    ``-1/2 sum over both directions of log( exp(s_b t_b / T) / sum_c exp(s_b t_c / T) )``, mean over examples ``b``,
    with ``c`` over all examples of the batch. ``s`` and ``t`` are as in :class:`CLSContrast`. Needs neither labels nor
    row ids. The term couples the examples of a batch: it takes in the batches of all processes, and refuses accumulated
    batches.

    Args:
        weight: factor of the term: a number, or a schedule.
        mapping: which layers take part, on either side; default ``All()``. How it pairs them doesn't matter.
        size: number of dimensions that vectors are mapped to.
        temperature: ``T > 0``.
        stack: which layers of an encoder-decoder: ``"encoder"`` or ``"decoder"``.
        name: key of the term in logs; default ``cls_in_batch_contrast``.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018.
    """

    batch_coupled = True

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean of both directions, over the examples of all processes."""
        s, t, real = self._vectors(student, teacher)
        s, t, real = ranks.gathered(s), ranks.gathered(t), ranks.gathered(real.int()).bool()
        others = ~torch.eye(len(s), dtype=torch.bool, device=s.device) & real
        values = functional.info_nce(s, t, t, others, self.temperature)
        values = (values + functional.info_nce(t, s, s, others, self.temperature)) / 2
        return functional.example_mean(values, real)
