"""Contrastive objectives: a student's text should be nearest to the teacher's same text."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ildistil import distributed, functional
from ildistil.capture import Activations, ModelInfo
from ildistil.errors import ObjectiveError
from ildistil.functional.reduction import unit
from ildistil.mappings import All, LayerMapping
from ildistil.objectives.base import Count, Weight, same_tokens
from ildistil.objectives.mapped import JointObjective, Stack
from ildistil.stages import Step

__all__ = ["CLSContrast", "CLSInBatchContrast"]


class _Contrast(JointObjective):
    """Compares first-token states of all mapped layers, concatenated and mapped to a few dimensions on both sides."""

    taps = ("hidden",)
    default_mapping = All()

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        size: int = 128,
        temperature: float = 0.07,
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        if size < 1 or not temperature > 0:
            raise ObjectiveError(
                f"{type(self).__name__}: size must be at least 1 and temperature > 0, got {size} and {temperature}."
            )
        if self.mapping.draws:
            raise ObjectiveError(f"{type(self).__name__} concatenates fixed layers; {self.mapping} draws them anew.")
        self.size, self.temperature = size, temperature

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and make a projection of each model."""
        super().build(student, teacher)
        for role, info, layers in zip(("student", "teacher"), self.models, self.layers(), strict=True):
            if info.width is None:
                raise ObjectiveError(
                    f"{type(self).__name__} needs the width of the {role}, and a config doesn't say it."
                )
            self.projections[role] = nn.Linear(info.width * len(layers), self.size)

    def _vectors(self, student: Activations, teacher: Activations) -> tuple[Tensor, Tensor, Tensor]:
        """Return a vector of length 1 for each example, of both models, and which examples have a token at all."""
        mask = student.stack(self.stack).mask
        vectors = []
        for role, run, layers in zip(("student", "teacher"), (student, teacher), self.layers(), strict=True):
            hidden = [run.stack(self.stack).hidden.take(layer) for layer in layers]
            same_tokens(mask, hidden[0], axis=1)
            projection = self.projections[role]
            precision = next(projection.parameters()).dtype  # a teacher in half precision has another
            states = [functional.first_token(state, mask).to(precision) for state in hidden]
            with functional.full_precision(projection(torch.cat(states, dim=-1))) as (vector,):
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

    The bank is the same in all processes, grows with the texts it meets, and is in the checkpoint, not in the
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

    _slots: dict[int, int]  # row id -> row of the bank
    _bank: dict[str, Tensor]
    _classes: Tensor
    _step: int | None
    _now: list[Tensor]
    _waiting: list[list[Tensor]]

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
        self._forget()

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Make the projections."""
        if teacher.problem_type in ("regression", "multi_label_classification") or teacher.labels == 1:
            raise ObjectiveError(
                "CLSContrast draws texts of other classes, and this problem has no exclusive classes. Use "
                "CLSInBatchContrast."
            )
        super().build(student, teacher)

    def bind(self, engine: object | None) -> None:
        """Bind to an engine; without one the bank is empty, as its vectors are of that engine."""
        super().bind(engine)
        if engine is None:
            self._forget()

    def begin(self, step: Step) -> None:
        """Let the bank learn what was met in the step before; within a step it stays, whatever is accumulated."""
        super().begin(step)
        if step.number is None:
            raise ObjectiveError(
                f"{self.name} draws texts anew at every step. Say which it is: distill(batch, Step(number))."
            )
        if step.number != self._step:
            self._learn()
        self._step = step.number

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean of both directions."""
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

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Count:
        """Return the number of examples with a token and a class."""
        return Count((student.stack(self.stack).mask.any(1) & (self._rows(batch)[1] >= 0)).sum())

    def remember(self) -> None:
        """Note the texts of this step, of all processes."""
        if self._now:
            self._waiting.append([distributed.all_gather(x) for x in self._now])
        self._now = []

    def state_dict(self) -> dict[str, Any]:
        """Return the bank for a checkpoint, and what it is about to learn."""
        used = len(self._slots)
        bank = {role: vectors[:used].clone() for role, vectors in self._bank.items()}
        return {
            "row_ids": torch.tensor(list(self._slots), dtype=torch.long),
            "classes": self._classes[:used].clone(),
            "waiting": list(self._waiting),
            **bank,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the bank of a checkpoint."""
        self._slots = {row: slot for slot, row in enumerate(state_dict["row_ids"].tolist())}
        self._bank = {role: state_dict[role] for role in self._bank}
        self._classes = state_dict["classes"]
        self._waiting = list(state_dict["waiting"])

    def _forget(self) -> None:
        self._slots = {}
        self._bank = {"student": torch.empty(0, self.size), "teacher": torch.empty(0, self.size)}
        self._classes = torch.empty(0, dtype=torch.long)
        self._step, self._now, self._waiting = None, [], []

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
            # By class and step, not by batch: the same in all processes, and in all parts of an accumulated batch.
            seed = random.Random(f"{self.seed} {self._step} {present}").getrandbits(62)
            drawn.append(self._others(present, torch.Generator().manual_seed(seed)).to(classes.device))
            drawn_for.append(torch.full_like(drawn[-1], present))
        return torch.cat(drawn), torch.cat(drawn_for)

    def _others(self, present: int, generator: torch.Generator) -> Tensor:
        """Draw rows of other classes, each once."""
        used = len(self._slots)
        if used > 16 * self.negatives:  # a few tries find enough, without shuffling a large bank
            tried = torch.randint(used, (8 * self.negatives,), generator=generator).to(self._classes.device)
            found = list(dict.fromkeys(tried[self._classes[tried] != present].tolist()))
            if len(found) >= self.negatives:
                return torch.tensor(found[: self.negatives])
        others: Tensor = (self._classes[:used] != present).nonzero().squeeze(1).cpu()
        return others[torch.randperm(len(others), generator=generator)[: self.negatives]]

    def _learn(self) -> None:
        for waiting in self._waiting:
            # Samplers repeat rows to give every process as many: the first one counts. In the order of their ids,
            # whichever process had them.
            once, where = torch.unique(waiting[0], return_inverse=True)
            numbers = torch.arange(len(where), device=where.device)
            first = torch.full_like(once, len(where)).scatter_reduce(0, where, numbers, "amin")
            ids, classes, *vectors = (x[first] for x in waiting)
            self._to(ids.device)
            new = [row for row in ids.tolist() if row not in self._slots]
            known = torch.tensor([row in self._slots for row in ids.tolist()], device=ids.device).unsqueeze(1)
            self._slots.update({row: len(self._slots) + i for i, row in enumerate(new)})
            self._grow(len(self._slots))
            rows = torch.tensor([self._slots[row] for row in ids.tolist()], dtype=torch.long, device=ids.device)
            for role, now in zip(self._bank, vectors, strict=True):
                bank = self._bank[role]
                now = now.to(bank.dtype)
                moved = self.momentum * bank[rows] + (1 - self.momentum) * now
                bank[rows] = unit(torch.where(known, moved, now))
            self._classes[rows] = classes
        self._waiting = []

    def _grow(self, rows: int) -> None:
        if rows > len(self._classes):
            more = max(rows, 2 * len(self._classes)) - len(self._classes)  # twice as large, so that growing is rare
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
        """Return the mean of both directions, over the examples of all processes."""
        s, t, real = self._vectors(student, teacher)
        s, t, real = distributed.all_gather(s), distributed.all_gather(t), distributed.all_gather(real.int()).bool()
        others = ~torch.eye(len(s), dtype=torch.bool, device=s.device) & real
        values = functional.info_nce(s, t, t, others, self.temperature)
        values = (values + functional.info_nce(t, s, s, others, self.temperature)) / 2
        return functional.example_mean(values, real)
