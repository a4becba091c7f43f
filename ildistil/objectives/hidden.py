"""Objectives on hidden states."""

from abc import abstractmethod
from typing import Literal

from torch import Tensor, nn

from ildistil import functional
from ildistil.capture import Activations, Sizes
from ildistil.mappings import LayerMapping
from ildistil.objectives.base import LayerObjective, ObjectiveError, same_tokens

__all__ = ["CLSMSE", "HiddenCosine", "HiddenMSE"]

Projection = Literal["auto", "always", "never"]


class _HiddenObjective(LayerObjective):
    """Compares hidden states of mapped layers, after a linear map where the widths differ."""

    taps = ("hidden",)

    def __init__(
        self,
        weight: float = 1.0,
        mapping: LayerMapping | None = None,
        projection: Projection = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, name)
        if projection not in ("auto", "always", "never"):
            raise ObjectiveError(
                f"{type(self).__name__}: projection must be 'auto', 'always' or 'never', got {projection!r}."
            )
        self.projection = projection

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Resolve the mapping and make the projections."""
        super().build(student, teacher)
        if student.width is None or teacher.width is None:
            raise ObjectiveError(
                f"{type(self).__name__} needs the widths of both models, and a config doesn't say them."
            )
        if student.width != teacher.width and self.projection == "never":
            raise ObjectiveError(
                f"{type(self).__name__}: the student's width is {student.width}, the teacher's {teacher.width}. Use "
                "projection='auto', which learns a linear map between them."
            )
        if student.width != teacher.width or self.projection == "always":
            for pair in self.pairs:
                self.projections[_key(pair)] = nn.Linear(student.width, teacher.width)

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Give the loss of one pair."""
        s, t = student.hidden[pair[0]], teacher.hidden[pair[1]]
        same_tokens(s, t, axis=1)
        if _key(pair) in self.projections:
            s = self.projections[_key(pair)](s)
        return functional.example_mean(self.compare(s, t, student.mask), student.mask.sum(1))

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Compare the states of two layers: one value per example."""


class HiddenMSE(_HiddenObjective):
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

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Give the squared error of each example."""
        return functional.hidden_mse(student, teacher, mask)


class HiddenCosine(_HiddenObjective):
    """Cosine distance of the hidden states of mapped layers, over all real tokens.

    ``1/n sum_i (1 - cos(W h_S,i + b, h_T,i))`` for an example of ``n`` tokens; mean over examples, then over pairs.

    Args:
        weight: factor of the term.
        mapping: which student layer learns from which teacher layer; default ``Uniform()`` (DistilBERT: ``Last()``).
        projection: see :class:`HiddenMSE`.
        name: key of the term in logs; default ``hidden_cosine``.

    Raises:
        ObjectiveError: the widths differ and there is no projection.

    Source: Sanh et al., "DistilBERT", 2019.
    """

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Give the distance of each example."""
        return functional.hidden_cosine(student, teacher, mask)


class CLSMSE(_HiddenObjective):
    """Mean squared error of the first token's hidden state in mapped layers ("Hid-CLS"); normalised, it is PKD's.

    ``1/d ||W h_S,1 + b - h_T,1||^2``, or with ``normalize`` ``||h_S,1/||h_S,1|| - h_T,1/||h_T,1|| ||^2``; mean over
    examples, then over pairs. The first token is the first real one, also where padding stands left.

    Args:
        weight: factor of the term.
        mapping: which student layer learns from which teacher layer; default ``Uniform()``. PKD leaves out the last.
        projection: see :class:`HiddenMSE`.
        normalize: compare directions: both states are divided by their length, and the squares summed.
        name: key of the term in logs; default ``cls_mse``.

    Raises:
        ObjectiveError: the widths differ and there is no projection.

    Source: Sun et al., "Patient Knowledge Distillation", 2019; Wang et al., "How to Distill your BERT", 2023.
    """

    def __init__(
        self,
        weight: float = 1.0,
        mapping: LayerMapping | None = None,
        projection: Projection = "auto",
        normalize: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, projection, "cls_mse" if name is None else name)
        self.normalize = normalize

    def compare(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Give the squared error of each example's first token."""
        return functional.cls_mse(student, teacher, mask, self.normalize)


def _key(pair: tuple[int, int]) -> str:
    return f"{pair[0]}_{pair[1]}"
