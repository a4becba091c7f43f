"""Objectives on relations: how tokens' queries, keys or values relate to each other, head by head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ildistil import functional, kernels
from ildistil.attention import Attention, Masks, Scores
from ildistil.capture import Activations, ModelInfo
from ildistil.errors import ObjectiveError
from ildistil.functional.checks import check_count, check_words
from ildistil.mappings import Last, LayerMapping
from ildistil.objectives.attention import take_attention
from ildistil.objectives.base import Weight
from ildistil.objectives.mapped import PairwiseObjective, Stack

_RELATIONS = [f"{left}-{right}" for left in "qkv" for right in "qkv"]


class RelationKL(PairwiseObjective):
    """Kullback-Leibler divergence of relations among queries, keys and values of mapped layers, teacher first.

    For a relation such as ``"q-q"`` the vectors of all heads are joined and cut into ``R`` relation heads of size
    ``d_r``; ``a_ij = x_i y_j / sqrt(d_r)``, and the term is
    ``1/(R n) sum_r sum_i KL(softmax(a_T,ri) || softmax(a_S,ri))`` over the ``n`` real tokens: mean over relations,
    examples and layer pairs (MiniLMv2 sums its three relations: weight 3). Where either model is causal or has a
    window, only tokens are related that may see each other in both. Numbers of heads and widths may differ between the
    models, as long as ``R`` divides both widths. The other arguments are those of :class:`MappedObjective`.

    Args:
        mapping: which student layer learns from which teacher layer; default ``Last()``, as in MiniLM. MiniLMv2 takes
            an upper-middle layer of large teachers: ``Explicit([[-1, 21]])``.
        relations: any of ``q-q``, ``k-k``, ``v-v``, ``q-k`` and so on.
        heads: number ``R`` of relation heads (MiniLMv2: 48 for base models); by default the attention heads, which
            must then be equal.

    Raises:
        ConfigError: ``heads`` is no integer >= 1.
        ObjectiveError: a relation is unknown, the heads differ and ``heads`` isn't given, or it doesn't divide a width.

    Source: Wang et al., "MiniLMv2", 2021.
    """

    taps = ("attention",)
    default_mapping = Last()

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        relations: Sequence[str] = ("q-q", "k-k", "v-v"),
        heads: int | None = None,
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        check_words(f"{type(self).__name__}: relations", relations, _RELATIONS)
        if heads is not None:
            check_count(f"{type(self).__name__}: heads", heads)
        self.relations, self.heads = tuple(relations), heads
        self.vectors = "".join(sorted({part for relation in relations for part in relation if part != "-"}))

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and check that relation heads can be paired."""
        super().build(student, teacher)
        student, teacher = self.models
        if self.heads is None:
            self._check_heads(student.heads, teacher.heads)
            return
        for part in self.vectors:
            widths = [m.value_width if part == "v" else m.attention_width for m in (student, teacher)]
            if any(width and width % self.heads for width in widths):
                raise ObjectiveError(
                    f"{type(self).__name__}: heads={self.heads} must divide the widths of all heads of student "
                    f"({widths[0]}) and teacher ({widths[1]})."
                )

    def _check_heads(self, student: int | None, teacher: int | None) -> None:
        if student is not None and teacher is not None and student != teacher:
            raise ObjectiveError(
                f"{type(self).__name__}: the student has {student} heads, the teacher {teacher}. Set heads to a number "
                "that divides both widths: vectors are then cut into that many relation heads."
            )

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Return the mean over the relations of one pair."""
        s, t = take_attention(pair, student, teacher)
        return torch.stack([self._relation_loss(s, t, relation) for relation in self.relations]).mean()

    def _relation_loss(self, student: Attention, teacher: Attention, relation: str) -> Tensor:
        own, theirs = (self._relation(attention, relation) for attention in (student, teacher))
        self._check_heads(own.heads, theirs.heads)  # a config may not say them
        if self.stack == "cross":
            # Queries and keys are of different texts: each part has its own tokens, and there is no causality.
            rows, columns = (
                student.masks.query_mask if part == "q" else student.masks.key_mask for part in relation[::2]
            )
            masks = Masks(rows, columns)
        else:
            masks = student.masks.both(teacher.masks)
        values = kernels.attention_kl(own, theirs, masks)
        return values.mean() if masks.query_mask is None else functional.example_mean(values, masks.query_mask.sum(1))

    def _relation(self, attention: Attention, relation: str) -> Scores:
        """Return both sides of a relation."""
        left, right = (self._cut(attention, part) for part in relation[::2])
        if left.shape[-1] != right.shape[-1]:
            raise ObjectiveError(
                f"{type(self).__name__}: in {relation!r} the vectors of {relation[0]!r} have {left.shape[-1]} features "
                f"for each head, those of {relation[2]!r} {right.shape[-1]}. Choose relations within one of them."
            )
        return Scores(left, right, left.shape[-1] ** -0.5)

    def _cut(self, attention: Attention, part: str) -> Tensor:
        """(batch, heads, tokens, size) -> (batch, relation heads, tokens, size): join the heads, then cut anew."""
        x = attention.vectors(part)  # kernels never look at padding
        if self.heads is None:
            return x
        if x.shape[1] * x.shape[3] % self.heads:
            raise ObjectiveError(
                f"{type(self).__name__}: heads={self.heads} must divide the width of all heads, which for {part!r} is "
                f"{x.shape[1] * x.shape[3]}."
            )
        # Heads and tokens swap places first: a plain reshape would mix tokens.
        return x.transpose(1, 2).flatten(2).reshape(*x.shape[:1], x.shape[2], self.heads, -1).transpose(1, 2)


class ValueRelationKL(RelationKL):
    """Kullback-Leibler divergence of the value relations of mapped layers, teacher first ("Val-KL").

    ``1/(H n) sum_h sum_i KL(softmax(v_T v_T^T / sqrt(d))_hi || softmax(v_S v_S^T / sqrt(d))_hi)``: :class:`RelationKL`
    with the one relation ``"v-v"``, and with its other arguments.

    Source: Wang et al., "MiniLM", 2020.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        heads: int | None = None,
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, ("v-v",), heads, stack, name)
