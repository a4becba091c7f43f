"""Objectives on attention: head by head, before or after the softmax."""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ildistil import distributed, functional, kernels
from ildistil.attention import Attention
from ildistil.capture import Activations, ModelInfo
from ildistil.errors import ObjectiveError
from ildistil.functional.checks import check_choice, check_words
from ildistil.mappings import LayerMapping
from ildistil.objectives.base import Count, Weight, same_tokens
from ildistil.objectives.mapped import PairwiseObjective, Stack
from ildistil.objectives.projection import ProjectionOption
from ildistil.objectives.states import StateObjective

Heads = Literal["equal", "merge"]
Over = Literal["tokens", "heads", "sentences"]


def take_attention(pair: tuple[int, int], student: Activations, teacher: Activations) -> tuple[Attention, Attention]:
    """Take the attention of a pair of layers, which must be of the same tokens."""
    s, t = student.attention.take(pair[0]), teacher.attention.take(pair[1])
    same_tokens(s.query, t.query, axis=2)
    same_tokens(s.key, t.key, axis=2)
    return s, t


class _AttentionObjective(PairwiseObjective):
    """An objective on attention, head by head."""

    taps = ("attention",)
    vectors = "qk"
    heads: Heads = "equal"

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping and check that heads can be paired."""
        super().build(student, teacher)
        self._check_heads(*(info.heads for info in self.models))

    def _check_heads(self, student: int | None, teacher: int | None) -> None:
        if self.heads == "equal" and None not in (student, teacher) and student != teacher:
            raise ObjectiveError(
                f"{type(self).__name__} compares attention head by head; the student has {student} heads, the teacher "
                f"{teacher}. Give the student {teacher} heads, or use AttentionKL(heads='merge'), "
                "RelationKL(heads=...) or HiddenMSE, which don't need equal heads."
            )

    def attention(
        self, pair: tuple[int, int], student: Activations, teacher: Activations
    ) -> tuple[Attention, Attention]:
        """Take the attention of a pair of layers, whose heads can be paired."""
        s, t = take_attention(pair, student, teacher)
        self._check_heads(s.heads, t.heads)  # a config may not say them
        return s, t

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Return the masked loss of one pair."""
        return self.compare(*self.attention(pair, student, teacher))

    @abstractmethod
    def compare(self, student: Attention, teacher: Attention) -> Tensor:
        """Compare two layers: a scalar."""

    def describe(self) -> str:
        """Return the pairs, and the number of heads after merging."""
        s, t = (info.heads or 1 for info in self.models)
        merged = "" if s == t else f", {s} and {t} heads merged to {math.gcd(s, t)}"
        return super().describe() + merged


class AttentionMSE(_AttentionObjective):
    """Mean squared error of the attention scores of mapped layers, before the softmax ("Att-MSE").

    ``1/(H N) sum_h sum_(i,j) (a_S,hij - a_T,hij)^2`` over the ``N`` pairs of a real query and a key it may attend to;
    mean over examples, then over layer pairs. Captured before dropout, under any attention implementation.
    The arguments are those of :class:`MappedObjective`.

    Raises:
        ObjectiveError: the models have different numbers of heads.

    Source: Jiao et al., "TinyBERT", 2020; Wang et al., "How to Distill your BERT", 2023.
    """

    def compare(self, student: Attention, teacher: Attention) -> Tensor:
        """Return the mean over examples of the squared error."""
        values = kernels.attention_mse(student.scores, teacher.scores, student.masks.both(teacher.masks))
        return functional.example_mean(values, student.real().sum(1))


class AttentionKL(_AttentionObjective):
    """Kullback-Leibler divergence of the attention distributions of mapped layers, teacher first ("Att-KL").

    ``1/(H n) sum_h sum_i KL(softmax(a_T,hi) || softmax(a_S,hi))`` over the ``n`` real queries of an example; mean over
    examples, then over layer pairs, in nats. Captured before dropout, under any attention implementation.
    The other arguments are those of :class:`MappedObjective`.

    Args:
        heads: what to do where the numbers of heads differ: refuse (``"equal"``), or ``"merge"``: average consecutive
            heads of both models in probability space, down to the greatest common divisor of both numbers.

    Raises:
        ObjectiveError: the models have different numbers of heads, and they are not to be merged.

    Source: Wang et al., "MiniLM", 2020; Wang et al., "How to Distill your BERT", 2023.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        heads: Heads = "equal",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        check_choice("AttentionKL: heads", heads, get_args(Heads))
        self.heads = heads

    def compare(self, student: Attention, teacher: Attention) -> Tensor:
        """Return the mean over examples of the divergence."""
        values = kernels.attention_kl(student.scores, teacher.scores, student.masks.both(teacher.masks))
        return functional.example_mean(values, student.real().sum(1))


class AttentionDIST(_AttentionObjective):
    """Pearson distance of the attention probabilities of mapped layers, over tokens, heads or sentences.

    ``1 - corr(p_S, p_T)`` over the keys of each query (``"tokens"``), over the heads of each pair of tokens
    (``"heads"``) or over the sentences of a batch at each head and pair of positions (``"sentences"``), then the mean
    over the correlations of an example, its layer pairs, and the examples. Correlations that aren't defined, of fewer
    than two entries or where the teacher's are all equal, don't count, nor does an example that has no other.
    ``"sentences"`` couples the examples of a batch: the term then takes in the batches of all processes, and refuses
    accumulated batches; it needs self-attention. The other arguments are those of :class:`MappedObjective`.

    Args:
        over: ``"tokens"``, ``"heads"`` or ``"sentences"``.
        heads: see :class:`AttentionKL`.

    Raises:
        ObjectiveError: the models have different numbers of heads, and they are not to be merged.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022; on attention in the code of Wang et
    al., "How to Distill your BERT", 2023.
    """

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        over: Over = "tokens",
        heads: Heads = "equal",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, stack, name)
        check_choice("AttentionDIST: heads", heads, get_args(Heads))
        check_choice("AttentionDIST: over", over, get_args(Over))
        if (over, stack) == ("sentences", "cross"):
            raise ObjectiveError("AttentionDIST: over='sentences' compares positions of self-attention, not 'cross'.")
        self.heads, self.over = heads, over
        self.batch_coupled = over == "sentences"
        self._counted: Tensor | None = None

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping, and check that there is something to correlate."""
        super().build(student, teacher)
        heads = [info.heads for info in self.models if info.heads is not None]
        if self.over == "heads" and math.gcd(*heads) == 1:
            raise ObjectiveError(
                f"AttentionDIST: over='heads' correlates the heads that both models have, and of {heads} one is left "
                "after merging. Use over='tokens'."
            )

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean distance over the examples with a defined correlation."""
        if self.over == "sentences":
            return super().loss(student, teacher, batch)
        student, teacher = student.stack(self.stack), teacher.stack(self.stack)
        found = []
        for pair in self.pairs:
            s, t = self.attention(pair, student, teacher)
            found.append(kernels.attention_dist(s.scores, t.scores, s.masks.both(t.masks), self.over))
        values, counts = (torch.stack(x) for x in zip(*found, strict=True))
        defined = (counts > 0).sum(0)
        self._counted = (defined > 0).sum()
        return functional.example_mean(values.sum(0) / defined.clamp(min=1), defined)

    def compare(self, student: Attention, teacher: Attention) -> Tensor:
        """Return the mean distance over the sentences of all processes."""
        masks, tokens = student.masks.both(teacher.masks), student.query.shape[2]
        positions = distributed.all_reduce_max(tokens, student.query.device)
        total = distributed.all_reduce_sum
        return kernels.attention_dist_over_batch(student.scores, teacher.scores, masks, positions, total)

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Count:
        """Return the number of examples that had a defined correlation in the last :meth:`loss`."""
        return super().count(student, batch) if self._counted is None else Count(self._counted)

    def describe(self) -> str:
        """Return the pairs, and what the correlation runs over."""
        return f"{super().describe()}, over {self.over}"


class AttentionOutputMSE(StateObjective):
    """Mean squared error of what the attention of mapped layers gives: the values, averaged by the probabilities.

    ``1/(n d) sum_i ||W c_S,i + b - c_T,i||^2`` with ``c_i = [softmax(a_hi) v_h for all heads h]``, before the layer's
    output projection and without dropout; mean over examples, then over layer pairs. The arguments are those of
    :class:`HiddenMSE`.

    Raises:
        ObjectiveError: the widths differ and there is no projection.
    """

    taps = ("attention",)

    def width(self, info: ModelInfo, kind: str) -> int | None:
        """Return the width of the values of all heads together."""
        return info.value_width

    def states(self, activations: Activations, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Recompute the output from query, key and value."""
        attention = activations.attention.take(layer)
        return [(kernels.attention_output(attention.scores, attention.value, attention.masks), activations.mask)]


class QKVMSE(StateObjective):
    """Mean squared error of the queries, keys and values of mapped layers themselves.

    ``1/(n d) sum_i ||W x_S,i + b - x_T,i||^2`` with ``x`` the vectors of all heads of a token side by side, after
    rotary embedding; mean over the parts, examples and layer pairs. Unlike relations it asks for the same vectors,
    which is sensible where the student started from the teacher's layers. The other arguments are those of
    :class:`HiddenMSE`.

    Args:
        parts: any of ``"q"``, ``"k"`` and ``"v"``.
        projection: see :class:`HiddenMSE`; a map for each part.

    Raises:
        ObjectiveError: the widths differ and there is no projection; or a part is unknown.

    Source: compare Wang et al., "MiniLMv2", 2021, who found relations among them better.
    """

    taps = ("attention",)

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        parts: Sequence[str] = ("q", "k", "v"),
        projection: ProjectionOption = "auto",
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, mapping, projection, stack, name)
        check_words("QKVMSE: parts", parts, ("q", "k", "v"))
        self.kinds, self.vectors = tuple(parts), "".join(parts)

    def width(self, info: ModelInfo, kind: str) -> int | None:
        """Return the width of all heads together."""
        return info.value_width if kind == "v" else info.attention_width

    def states(self, activations: Activations, layer: int) -> list[tuple[Tensor, Tensor]]:
        """Join the heads; keys and values have the tokens that are attended to, which in cross attention are others."""
        attention = activations.attention.take(layer)
        return [(attention.vectors(part).transpose(1, 2).flatten(2), attention.real(part)) for part in self.kinds]
