"""Contrastive objectives: a student's text should be nearest to the teacher's same text."""

import random
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ildistil import distributed, functional
from ildistil.capture import Activations, ModelInfo
from ildistil.errors import ObjectiveError
from ildistil.functional.checks import check_choice, check_count, check_number, check_temperature
from ildistil.functional.reduction import unit
from ildistil.mappings import All, LayerMapping
from ildistil.objectives.base import Count, Weight, same_tokens
from ildistil.objectives.mapped import JointObjective, Stack
from ildistil.objectives.pooling import Pool, checked, pooling
from ildistil.objectives.projection import Projection
from ildistil.stages import Step

Estimator = Literal["info_nce", "nce"]


class _Contrast(JointObjective):
    """An objective on one vector of each text: all mapped layers, concatenated and mapped to a few dimensions.

    Args:
        mapping: which layers take part, on either side; default ``All()``. How it pairs them doesn't matter.
        size: number of dimensions that vectors are mapped to.
        temperature: ``T``, between 0.01 and 1000.
        pool: see :class:`CLSMSE`.
    """

    taps = ("hidden",)
    default_mapping = All()

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        size: int = 128,
        temperature: float = 0.07,
        pool: Pool = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        check_count(f"{type(self).__name__}: size", size, most=65_536)
        check_temperature(temperature, f"{type(self).__name__}: temperature")
        if self.mapping.draws:
            raise ObjectiveError(f"{type(self).__name__} concatenates fixed layers; {self.mapping} draws them anew.")
        self.size, self.temperature, self.pool = size, temperature, checked(pool)

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and make a projection of each model."""
        super().build(student, teacher)
        for role, info, layers in zip(("student", "teacher"), self.models, self.layers(), strict=True):
            Projection("always").make(self, [role], info.width and info.width * len(layers), self.size)

    def _vectors(self, student: Activations, teacher: Activations) -> tuple[Tensor, Tensor, Tensor]:
        """Return a vector of length 1 for each example, of both models, and which examples have a token at all."""
        mask = student.stack(self.stack).mask
        vectors = []
        runs = (run.stack(self.stack) for run in (student, teacher))
        for role, run, layers in zip(("student", "teacher"), runs, self.layers(), strict=True):
            hidden, pool = [run.hidden.take(layer) for layer in layers], pooling(self.pool, run)
            same_tokens(mask, hidden[0], axis=1)
            projection = self.projections[role]
            precision = next(projection.parameters()).dtype  # a teacher in half precision has another
            states = [functional.pool(state, mask, pool).to(precision) for state in hidden]
            with functional.full_precision(projection(torch.cat(states, dim=-1))) as (vector,):
                vectors.append(unit(vector))
        return vectors[0], vectors[1], mask.any(1)


class CLSContrast(_Contrast):
    """Contrast of each text with texts of other classes, kept in a memory bank ("Hid-CLS-Contrast").

    Mean over both directions and over examples of ``"info_nce"``, the cross-entropy of picking the right one,
    ``-log( exp(s t / T) / (exp(s t / T) + sum_k exp(s t_k / T)) )``, or of ``"nce"``, which tells right from wrong one
    by one, ``-log h(t) - sum_k log(1 - h(t_k))`` with
    ``h(x) = (exp(s x / T) / Z) / (exp(s x / T) / Z + K / N)``, as the papers of Sun et al. and Tian et al. have it.

    ``s`` and ``t`` are the first token's states (see ``pool``) of all mapped layers of student and teacher,
    concatenated, mapped to ``size`` dimensions and divided by their length; ``t_k`` (for the other direction ``s_k``)
    are the vectors of ``K = negatives`` texts of other classes, drawn from the bank. The bank keeps one vector of each
    model for every text it has met, by the batch's ``row_id``, and moves it by
    ``new = momentum * old + (1 - momentum) * now``. Until it knows texts of other classes, which is in the first step,
    the term is 0. ``Z`` of either direction, ``N`` times the mean of ``exp(s x / T)``, is estimated from the first
    step's texts and then constant; ``N`` cancels.

    Bank and ``Z`` are the same in all processes and in the checkpoint, not in the exported student; the bank grows with
    the texts it meets. Draws depend on ``seed``, step and class only. The other arguments are those of
    :class:`MappedObjective`.

    Args:
        mapping: which layers take part, on either side; default ``All()``. How it pairs them doesn't matter.
        size: number of dimensions that vectors are mapped to.
        temperature: ``T``, between 0.01 and 1000.
        negatives: how many texts of other classes to draw.
        momentum: the old vector's part when the bank learns a new one, from 0 to below 1.
        seed: of the draws.
        estimator: ``"info_nce"`` (CoDIR), or ``"nce"`` (CRD, and the code of Wang et al., which sum both directions).
        pool: see :class:`CLSMSE`.

    Raises:
        ConfigError: an argument is out of range.
        ObjectiveError: the problem has no classes; a batch has no ``row_id`` or no class labels; or ``pool="first"`` of
            a causal model.

    Source: Sun et al., "Contrastive Distillation on Intermediate Representations for Language Model Compression"
    (CoDIR), 2020; Tian et al., "Contrastive Representation Distillation" (CRD), 2020; Wang et al., "How to Distill your
    BERT", 2023.
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
        estimator: Estimator = "info_nce",
        pool: Pool = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, size, temperature, pool, stack, name)
        check_count("CLSContrast: negatives", negatives)
        check_count("CLSContrast: seed", seed, least=0)
        check_number("CLSContrast: momentum", momentum, "from 0 to below 1", lambda old: 0 <= old < 1)
        check_choice("CLSContrast: estimator", estimator, get_args(Estimator))
        self.negatives, self.momentum, self.seed, self.estimator = negatives, momentum, seed, estimator
        self._forget()

    def _forget(self) -> None:
        self._slots: dict[int, int] = {}  # row id -> row of the bank
        self._bank = {"student": torch.empty(0, self.size), "teacher": torch.empty(0, self.size)}
        self._classes = torch.empty(0, dtype=torch.long)
        self._log_normalizers = torch.empty(0)  # of both directions; until there is something to estimate them from
        self._step: int | None = None
        self._learned_before: int | None = None  # number of a step
        self._now: list[Tensor] = []
        self._waiting: list[list[Tensor]] = []

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
        """Note the step, by which texts are drawn."""
        super().begin(step)
        if step.number is None:
            raise ObjectiveError(
                f"{self.name} draws texts anew at every step. Say which it is: distill(batch, Step(number))."
            )
        self._step = step.number

    def learn(self, step: Step) -> None:
        """Learn what was met in the step before; within a step the bank stays, whatever is accumulated."""
        if step.number != self._learned_before:
            self._learn()
        self._learned_before = step.number
        if self.estimator == "nce" and not len(self._log_normalizers):
            self._estimate()

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean of both directions."""
        rows, classes = self._rows(batch)
        s, t, real = self._vectors(student, teacher)
        real = real & (classes >= 0)
        kept = real & (s.detach().isfinite() & t.isfinite()).all(1)  # NaN would stay in the bank for good
        self._now = [rows[kept], classes[kept], s[kept].detach(), t[kept].detach()]
        drawn, drawn_for = self._draw(classes[real])
        allowed = drawn_for == classes[:, None]
        bank = {role: vectors[drawn].to(s.dtype) for role, vectors in self._bank.items()}
        sides = [(s, t, bank["teacher"], allowed, self.temperature), (t, s, bank["student"], allowed, self.temperature)]
        if self.estimator == "info_nce":
            values = [functional.info_nce(*side) for side in sides]
        elif len(self._log_normalizers):
            values = [functional.nce(*side, z) for side, z in zip(sides, self._log_normalizers.to(s), strict=True)]
        else:  # the bank knows no texts of other classes
            values = [0 * side[0].sum(1) for side in sides]
        return functional.example_mean(torch.stack(values).mean(0), real)

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
            "log_normalizers": self._log_normalizers,
            **bank,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the bank of a checkpoint."""
        self._slots = {row: slot for slot, row in enumerate(state_dict["row_ids"].tolist())}
        self._bank = {role: state_dict[role] for role in self._bank}
        self._classes = state_dict["classes"]
        self._waiting = list(state_dict["waiting"])
        self._log_normalizers = state_dict["log_normalizers"]

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
        """Draw texts of other classes for every class; return their rows, and the class they are for."""
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

    def _estimate(self) -> None:
        """Estimate the normalisers from all texts of the bank, once there are two classes."""
        used = len(self._slots)
        classes = self._classes[:used]
        if len(torch.unique(classes)) < 2:
            return
        s, t = (vectors[:used].double() for vectors in self._bank.values())
        drawn, drawn_for = self._draw(classes)
        allowed = drawn_for == classes[:, None]
        sides = (s, t, t[drawn]), (t, s, s[drawn])
        found = [functional.log_normalizer(*side, allowed, self.temperature) for side in sides]
        self._log_normalizers = torch.stack(found)

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
            known = torch.tensor([r in self._slots for r in ids.tolist()], dtype=torch.bool, device=ids.device)[:, None]
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
            self._log_normalizers = self._log_normalizers.to(device)


class CLSInBatchContrast(_Contrast):
    """Contrast of each text with the other texts of its batch, without a memory bank.

    ``-1/2 sum over both directions of log( exp(s_b t_b / T) / sum_c exp(s_b t_c / T) )``, mean over examples ``b``,
    with ``c`` over all examples of the batch. ``s`` and ``t`` are as in :class:`CLSContrast`. Needs neither labels nor
    row ids. The term couples the examples of a batch: it takes in the batches of all processes, and refuses accumulated
    batches. The arguments are those that it shares with :class:`CLSContrast`.

    Raises:
        ConfigError: an argument is out of range.
        ObjectiveError: a width isn't known; or ``pool="first"`` of a causal model.

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
