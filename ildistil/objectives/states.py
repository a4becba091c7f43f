"""Objectives on states, one vector for each token of each layer."""

import torch
from torch import Tensor

from ildistil import functional
from ildistil.capture import Activations, ModelInfo
from ildistil.mappings import LayerMapping
from ildistil.objectives.base import Weight, same_tokens
from ildistil.objectives.mapped import PairwiseObjective, Stack
from ildistil.objectives.projection import ProjectionOption, option, project


class StateObjective(PairwiseObjective):
    """An objective on the states of mapped layers, token by token, after a linear map where the widths differ.

    By default these are hidden states; a subclass that compares others overrides :meth:`states` and :meth:`width`.

    Args:
        projection: see :class:`HiddenMSE`.

    Attributes:
        kinds: what is compared of a layer: the term is the mean over them.
    """

    taps = ("hidden",)
    kinds: tuple[str, ...] = ("hidden",)

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        projection: ProjectionOption = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        self.projection = option(projection)

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Return how far the states of two layers are apart, one value per example: by default the squared error."""
        return functional.hidden_mse(student, teacher, mask)

    def states(self, activations: Activations, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Return the states of a layer, ``(batch, tokens, width)``, and which are real, for each of the kinds."""
        return [(activations.hidden.take(layer), activations.mask)]

    def width(self, info: ModelInfo, kind: str) -> int | None:
        """Return the width of the states of a kind."""
        return info.width

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and make the projections."""
        super().build(student, teacher)
        for kind in self.kinds:
            widths = (self.width(info, kind) for info in self.models)
            self.projection.make(self, {self.key(pair, kind) for pair in self.pairs}, *widths)

    def key(self, pair: tuple[int, int], kind: str) -> str:
        """Name the map of a pair."""
        key = self.projection.key(pair, self.mapping.draws)
        return key if len(self.kinds) == 1 else f"{kind}_{key}"

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Return the mean over the kinds of one pair."""
        losses = []
        own, theirs = self.states(student, pair[0]), self.states(teacher, pair[1])
        for kind, (s, mask), (t, _) in zip(self.kinds, own, theirs, strict=True):
            same_tokens(s, t, axis=1)
            s = project(self.projections, self.key(pair, kind), s, mask)
            losses.append(functional.example_mean(self.compare(s, t, mask), mask.sum(1)))
        return torch.stack(losses).mean()
