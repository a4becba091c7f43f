"""Objectives that compare mapped layers pair by pair."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ildistil.capture import Activations
from ildistil.objectives.mapped import MappedObjective


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
