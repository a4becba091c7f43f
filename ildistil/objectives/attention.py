"""Objectives on attention: head by head, before or after the softmax."""

from abc import abstractmethod

from torch import Tensor

from ildistil import functional
from ildistil.capture import Activations, Sizes
from ildistil.objectives.base import LayerObjective, ObjectiveError, same_tokens

__all__ = ["AttentionKL", "AttentionMSE"]


class _AttentionObjective(LayerObjective):
    taps = ("attention",)

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Resolve the mapping and check that heads can be paired."""
        super().build(student, teacher)
        if student.heads != teacher.heads:
            raise ObjectiveError(
                f"{type(self).__name__} compares attention head by head; the student has {student.heads} heads, the "
                f"teacher {teacher.heads}. Give the student {teacher.heads} heads, or use "
                "RelationKL(heads=...) or HiddenMSE, which don't need equal heads."
            )

    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Give the masked loss of one pair."""
        s, t = student.attention[pair[0]], teacher.attention[pair[1]]
        same_tokens(s.query, t.query, axis=2)
        same_tokens(s.key, t.key, axis=2)
        allowed = s.allowed()
        if (s.causal, s.window) != (t.causal, t.window):
            allowed = allowed & t.allowed()
        queries = s.real_queries()
        values = self.compare(s.scores(), t.scores(), allowed, queries)
        return functional.example_mean(values, queries.sum(1))

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor) -> Tensor:
        """Compare the scores of two layers: one value per example."""


class AttentionMSE(_AttentionObjective):
    """Mean squared error of the attention scores of mapped layers, before the softmax ("Att-MSE").

    ``1/(H N) sum_h sum_(i,j) (a_S,hij - a_T,hij)^2`` over the ``N`` pairs of a real query and a key it may attend to;
    mean over examples, then over layer pairs. Captured before dropout, under any attention implementation.

    Args:
        weight: factor of the term.
        mapping: which student layer learns from which teacher layer; default ``Uniform()``.
        name: key of the term in logs; default ``attention_mse``.

    Raises:
        ObjectiveError: the models have different numbers of heads.

    Source: Jiao et al., "TinyBERT", 2020; Wang et al., "How to Distill your BERT", 2023.
    """

    def compare(self, student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor) -> Tensor:
        """Give the squared error of each example."""
        return functional.attention_mse(student, teacher, allowed, query_mask)


class AttentionKL(_AttentionObjective):
    """Kullback-Leibler divergence of the attention distributions of mapped layers, teacher first ("Att-KL").

    ``1/(H n) sum_h sum_i KL(softmax(a_T,hi) || softmax(a_S,hi))`` over the ``n`` real queries of an example; mean over
    examples, then over layer pairs, in nats. Captured before dropout, under any attention implementation.

    Args:
        weight: factor of the term.
        mapping: which student layer learns from which teacher layer; default ``Uniform()``.
        name: key of the term in logs; default ``attention_kl``.

    Raises:
        ObjectiveError: the models have different numbers of heads.

    Source: Wang et al., "MiniLM", 2020; Wang et al., "How to Distill your BERT", 2023.
    """

    def compare(self, student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor) -> Tensor:
        """Give the divergence of each example."""
        return functional.attention_kl(student, teacher, allowed, query_mask)
