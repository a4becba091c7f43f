"""Objectives on states, one vector for each token of each layer."""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from ildistil import functional
from ildistil.capture import Activations, ModelInfo
from ildistil.errors import ObjectiveError
from ildistil.mappings import LayerMapping
from ildistil.objectives.base import LayerObjective, Stack, Weight, same_tokens
from ildistil.objectives.projection import Projection, ProjectionOption

__all__ = ["StateObjective"]


class StateObjective(LayerObjective):
    """Compares the states of mapped layers, token by token, after a linear map where the widths differ.

    Attributes:
        parts: what is compared of a layer: the term is the mean over them.
    """

    one_pair_at_a_time = True
    parts: tuple[str, ...] = ("hidden",)

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        projection: ProjectionOption = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        self.projection = projection if isinstance(projection, Projection) else Projection(projection)

    @abstractmethod
    def state(self, activations: Activations, layer: int, part: str) -> Tensor:
        """Take the states of a layer, ``(batch, tokens, width)``."""

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Compare the states of two layers: one value per example."""

    def width(self, sizes: ModelInfo) -> int | None:
        """Give the width of the states."""
        return sizes.width

    def token_mask(self, activations: Activations, layer: int, part: str) -> Tensor:
        """Tell which of the tokens are real: boolean, ``(batch, tokens)``."""
        return activations.mask

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and make the projections."""
        super().build(student, teacher)
        widths = tuple(self.width(sizes) for sizes in self.sizes)
        self.make_projections({self.key(pair, part) for pair in self.pairs for part in self.parts}, *widths)

    def make_projections(self, keys: Iterable[str], student: int | None, teacher: int | None) -> None:
        """Make the map of each key from the student's width to the teacher's.

        Raises:
            ObjectiveError: a width isn't known, or the widths differ and there is to be no map.
        """
        if student is None or teacher is None:
            raise ObjectiveError(
                f"{type(self).__name__} needs the widths of both models, and a config doesn't say them."
            )
        for key in sorted(keys):
            try:
                made = self.projection.make(student, teacher)
            except ObjectiveError as error:
                raise ObjectiveError(f"{type(self).__name__}: {error}") from error
            if made is not None:
                self.projections[key] = made

    def key(self, pair: tuple[int, int], part: str) -> str:
        """Name the map of a pair: the pair's own, or the student layer's where teacher layers are drawn."""
        what = "shared" if self.projection.shared else str(pair[0]) if self.mapping.draws else f"{pair[0]}_{pair[1]}"
        return what if len(self.parts) == 1 else f"{part}_{what}"

    def projected(self, key: str, states: Tensor, mask: Tensor) -> Tensor:
        """Apply the map of a key, if there is one; what is masked, NaN included, must not reach its gradient."""
        if key not in self.projections:
            return states
        result: Tensor = self.projections[key](torch.where(mask.unsqueeze(-1), states, 0))
        return result

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Give the loss of one pair."""
        losses = [self._part_loss(pair, part, student, teacher) for part in self.parts]
        return sum(losses[1:], start=losses[0]) / len(losses)

    def _part_loss(self, pair: tuple[int, int], part: str, student: Activations, teacher: Activations) -> Tensor:
        s, t = self.state(student, pair[0], part), self.state(teacher, pair[1], part)
        same_tokens(s, t, axis=1)
        mask = self.token_mask(student, pair[0], part)
        s = self.projected(self.key(pair, part), s, mask)
        return functional.example_mean(self.compare(s, t, mask), mask.sum(1))
