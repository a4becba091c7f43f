"""Objectives on hidden states."""

from typing import Literal

from torch import Tensor, nn

from ildistil import functional
from ildistil.capture import Activations, Sizes
from ildistil.mappings import LayerMapping
from ildistil.objectives.base import LayerObjective, ObjectiveError, same_tokens

__all__ = ["HiddenMSE"]


class HiddenMSE(LayerObjective):
    """Mean squared error of the hidden states of mapped layers, over all real tokens ("Hid-Seq").

    ``1/(n d) sum_i ||W h_S,i + b - h_T,i||^2`` for an example of ``n`` tokens and a teacher of width ``d``; mean over
    examples, then over pairs. Layer 0, the embedding output, can be mapped too.

    Args:
        weight: factor of the term.
        mapping: which student layer learns from which teacher layer; default ``Uniform()``.
        projection: whether a linear map takes the student's states to the teacher's width: ``"auto"`` where the
            widths differ, ``"always"``, or ``"never"``. One map for each pair, trained along.
        name: key of the term in logs; default ``hidden_mse``.

    Raises:
        ObjectiveError: the widths differ and there is no projection.

    Source: Jiao et al., "TinyBERT", 2020; Wang et al., "How to Distill your BERT", 2023.
    """

    taps = ("hidden",)

    def __init__(
        self,
        weight: float = 1.0,
        mapping: LayerMapping | None = None,
        projection: Literal["auto", "always", "never"] = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, name)
        if projection not in ("auto", "always", "never"):
            raise ObjectiveError(f"HiddenMSE: projection must be 'auto', 'always' or 'never', got {projection!r}.")
        self.projection = projection

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Resolve the mapping and make the projections."""
        super().build(student, teacher)
        if student.width is None or teacher.width is None:
            raise ObjectiveError("HiddenMSE needs the widths of both models, and a config doesn't say them.")
        if student.width != teacher.width and self.projection == "never":
            raise ObjectiveError(
                f"HiddenMSE: the student's width is {student.width}, the teacher's {teacher.width}. Use "
                "projection='auto', which learns a linear map between them."
            )
        if student.width != teacher.width or self.projection == "always":
            for pair in self.pairs:
                self.projections[_key(pair)] = nn.Linear(student.width, teacher.width)

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Give the masked mean squared error of one pair."""
        s, t = student.hidden[pair[0]], teacher.hidden[pair[1]]
        same_tokens(s, t, axis=1)
        if _key(pair) in self.projections:
            s = self.projections[_key(pair)](s)
        return functional.example_mean(functional.hidden_mse(s, t, student.mask), student.mask.sum(1))


def _key(pair: tuple[int, int]) -> str:
    return f"{pair[0]}_{pair[1]}"
