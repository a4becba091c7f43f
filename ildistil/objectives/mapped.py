"""Objectives on mapped layers: which student layer learns from which teacher layer."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ildistil.capture import Activations, ModelInfo, Role, Tap
from ildistil.errors import ObjectiveError
from ildistil.mappings import LayerMapping, Pairs, Uniform
from ildistil.objectives.base import LOWEST, Count, Objective, Weight
from ildistil.stages import Step

Stack = Literal["encoder", "decoder", "cross"]


class MappedObjective(Objective):
    """An objective on layers that a mapping pairs; how it compares them is up to the subclass.

    The other arguments are those of :class:`Objective`.

    Args:
        mapping: which student layer learns from which teacher layer; ``Uniform()`` unless the objective says otherwise.
        stack: which layers of an encoder-decoder: ``"encoder"``, ``"decoder"`` or, for attention, ``"cross"``.

    Attributes:
        default_mapping: the mapping where none is given.
        vectors: what is read of an attention, any of queries, keys and values (``"qkv"``); all by default.
        models: info of the chosen stack of student and teacher, known from :meth:`build` on.
        pairs: the (student layer, teacher layer) pairs of the current step, known from :meth:`build` on.

    Raises:
        ObjectiveError: the mapping is none, or the stack is unknown.
    """

    default_mapping: ClassVar[LayerMapping] = Uniform()
    vectors: str = ""
    models: tuple[ModelInfo, ModelInfo]

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if mapping is not None and not isinstance(mapping, LayerMapping):
            raise ObjectiveError(
                f"{type(self).__name__}: mapping must be a LayerMapping, such as mappings.Uniform() or "
                f"mappings.Explicit([[1, 4], [2, 8]]); got {mapping!r}."
            )
        if stack not in (None, *get_args(Stack)):
            raise ObjectiveError(
                f"{type(self).__name__}: stack must be 'encoder', 'decoder' or 'cross', got {stack!r}."
            )
        self.mapping = self.default_mapping if mapping is None else mapping
        self.stack = stack
        self.pairs: Pairs = []

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping for these two models."""
        self.models = student.stack(self.stack), teacher.stack(self.stack)
        self.pairs = self._pairs(0)

    def begin(self, step: Step) -> None:
        """Draw the layers of a step, where the mapping is one that draws."""
        if self.mapping.draws:
            if step.number is None:
                raise ObjectiveError(
                    f"{self.name} draws its layers anew at every step. Say which it is: distill(batch, Step(number))."
                )
            self.pairs = self._pairs(step.number)

    def _pairs(self, step: int) -> Pairs:
        return self.mapping.at(step).pairs(*self.models, lowest=LOWEST[self.taps[0]])

    def reads(self, role: Role, info: ModelInfo) -> list[Tap]:
        """Return the mapped layers, one tap for each that :meth:`loss` takes: one of each pair."""
        return [self.tap(pair[role == "teacher"]) for pair in self.pairs]

    def may_read(self, role: Role, info: ModelInfo) -> list[Tap]:
        """Return all layers that may be drawn, where the mapping is one that draws."""
        if not self.mapping.draws:
            return self.reads(role, info)
        drawn = self.mapping.drawable(*(model.depth for model in self.models))
        return [self.tap(layer) for layer in sorted({pair[role == "teacher"] for pair in drawn})]

    def tap(self, layer: int) -> Tap:
        """Return the tap of a layer."""
        return Tap(self.taps[0], layer, self.stack, self.vectors)

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Count:
        """Return the number of examples with a token in the chosen stack."""
        return super().count(student.stack(self.stack), batch)

    def layers(self) -> tuple[list[int], list[int]]:
        """Return the mapped layers of the student, and those of the teacher, whichever belong together."""
        return sorted({s for s, _ in self.pairs}), sorted({t for _, t in self.pairs})

    def describe(self) -> str:
        """Return the pairs, student layer first."""
        stack = "" if self.stack is None else f"{self.stack} "
        if self.mapping.draws:
            return f"{stack}{len(self.pairs)} pairs drawn at each step"
        return stack + " ".join(f"{s}<-{t}" for s, t in self.pairs)


class PairwiseObjective(MappedObjective):
    """An objective on pairs of layers: the mean over the pairs of :meth:`pair_loss`."""

    @abstractmethod
    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Return the scalar loss of one (student layer, teacher layer) pair.

        It takes the pair's layers once each: ``student.hidden.take(pair[0])``, ``teacher.hidden.take(pair[1])``.
        """

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean over the pairs."""
        student, teacher = student.stack(self.stack), teacher.stack(self.stack)
        return torch.stack([self.pair_loss(pair, student, teacher) for pair in self.pairs]).mean()


class JointObjective(MappedObjective):
    """An objective on all mapped layers of either side together; how the mapping pairs them doesn't matter."""

    def reads(self, role: Role, info: ModelInfo) -> list[Tap]:
        """Return each mapped layer once."""
        return [self.tap(layer) for layer in self.layers()[role == "teacher"]]

    def describe(self) -> str:
        """Return the layers of both sides."""
        student, teacher = (" ".join(map(str, layers)) for layers in self.layers())
        return f"[{student}]<-[{teacher}]"
