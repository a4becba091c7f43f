"""Learned maps from the student's states to the teacher's width."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ildistil.errors import ObjectiveError

__all__ = ["Projection", "ProjectionOption"]

When = Literal["auto", "always", "never"]


@dataclass(frozen=True)
class Projection:
    """How a student's states come to the teacher's width: a linear map, trained along and never exported.

    Args:
        when: ``"auto"`` where the widths differ, ``"always"`` or ``"never"``.
        shared: one map for all layer pairs, not one for each.
        norm: a layer norm behind the map.
        orthogonal: start from orthonormal columns or rows, which keep lengths and angles, and from no bias.
    """

    when: When = "auto"
    shared: bool = False
    norm: bool = False
    orthogonal: bool = False

    def __post_init__(self) -> None:
        if self.when not in get_args(When):
            raise ObjectiveError(f"projection must be 'auto', 'always' or 'never', got {self.when!r}.")

    def make(self, student: int, teacher: int) -> nn.Module | None:
        """Give the map from one width to another, or ``None`` where there is to be none.

        Raises:
            ObjectiveError: the widths differ and ``when`` is ``"never"``.
        """
        if self.when == "never" and student != teacher:
            raise ObjectiveError(
                f"the student's width is {student}, the teacher's {teacher}. Use projection='auto', which learns a "
                "linear map between them."
            )
        if self.when == "never" or (self.when == "auto" and student == teacher):
            return None
        linear = nn.Linear(student, teacher)
        if self.orthogonal:
            nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
        return nn.Sequential(linear, nn.LayerNorm(teacher)) if self.norm else linear


ProjectionOption = When | Projection
