"""Learned maps from the student's states to the teacher's width."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ildistil.errors import ObjectiveError
from ildistil.functional.checks import check_flag
from ildistil.objectives.base import Objective

When = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Projection:
    """How a student's states come to the teacher's width: a linear map, trained along and never exported.

    Args:
        when: ``"auto"`` where the widths differ, ``"always"`` or ``"never"``.
        shared: one map for all layer pairs, not one for each.
        norm: a layer norm behind the map.
        orthogonal: start from orthonormal columns or rows, which keep lengths and angles, and from no bias.

    Raises:
        ObjectiveError: ``when`` is none of these.
    """

    when: When = "auto"
    shared: bool = False
    norm: bool = False
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.when, str) or self.when not in get_args(When):
            raise ObjectiveError(f"projection must be 'auto', 'always' or 'never', got {self.when!r:.80}.")
        for name in ("shared", "norm", "orthogonal"):
            check_flag(f"projection: {name}", getattr(self, name))

    def make(self, objective: Objective, keys: Iterable[str], student: int | None, teacher: int | None) -> None:
        """Make the projections of an objective, one for each key, from the student's width to the teacher's, if any.

        Raises:
            ObjectiveError: a width isn't known, or the widths differ and ``when`` is ``"never"``.
        """
        name = type(objective).__name__
        if student is None or teacher is None:
            raise ObjectiveError(f"{name} needs the widths of both models, and a config doesn't say them.")
        if self.when == "never" and student != teacher:
            raise ObjectiveError(
                f"{name}: the student's width is {student}, the teacher's {teacher}. Use projection='auto', which "
                "learns a linear map between them."
            )
        if self.when == "always" or student != teacher:
            for key in sorted(keys):
                objective.projections[key] = self._map(student, teacher)

    def _map(self, student: int, teacher: int) -> nn.Module:
        linear = nn.Linear(student, teacher)
        if self.orthogonal:
            nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
        return nn.Sequential(linear, nn.LayerNorm(teacher)) if self.norm else linear

    def key(self, pair: tuple[int, int], draws: bool = False) -> str:
        """Name the map of a pair: the pair's own, or the student layer's where teacher layers are drawn."""
        if self.shared:
            return "shared"
        return str(pair[0]) if draws else f"{pair[0]}_{pair[1]}"


def project(projections: nn.ModuleDict, key: str, states: Tensor, mask: Tensor) -> Tensor:
    """Apply the map of a key, if there is one, to states ``(batch, ..., width)`` with a mask ``(batch, ...)``."""
    if key not in projections:
        return states
    linear = next(module for module in projections[key].modules() if isinstance(module, nn.Linear))
    if states.shape[-1] != linear.in_features:
        raise ObjectiveError(
            f"The student's states are {states.shape[-1]} wide; by its config it would be {linear.in_features}."
        )
    # What is masked, NaN included, must not reach the map's gradient.
    states = torch.where(mask.unsqueeze(-1), states, 0)
    if not torch.is_autocast_enabled(states.device.type):  # a mean of half-precision states is wider than the map
        states = states.to(linear.weight.dtype)
    projected: Tensor = projections[key](states)
    return projected


def option(projection: "ProjectionOption") -> Projection:
    """Return the whole option for its short form."""
    return projection if isinstance(projection, Projection) else Projection(projection)


ProjectionOption = When | Projection
