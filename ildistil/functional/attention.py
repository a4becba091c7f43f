"""Losses on attention scores and distributions."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ildistil.errors import ObjectiveError
from ildistil.functional.checks import Shapes, check_choice
from ildistil.functional.correlation import Total, pearson_distance, unchanged
from ildistil.functional.reduction import for_each_head, full_precision, kl, within

Over = Literal["tokens", "heads"]


def attention_mse(student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor) -> Tensor:
    """Mean squared error of attention scores before the softmax.

    ``1/(H N) sum_h sum_(i,j) (a_S,hij - a_T,hij)^2`` over the ``N`` pairs of a real query and a key it may attend to.

    Args:
        student: scores ``(batch, heads, queries, keys)``, before the softmax.
        teacher: scores ``(batch, heads, queries, keys)``, before the softmax.
        allowed: boolean ``(batch, 1, queries, keys)``, each as long or 1, true where a query may attend to a key.
        query_mask: boolean ``(batch, queries)``, true where the query is a real token.

    Returns:
        ``(batch,)``.

    Raises:
        ObjectiveError: a tensor has another dtype or shape.

    Source: Jiao et al., "TinyBERT", 2020 (there over padded positions too).

    >>> ones = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    >>> attention_mse(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2.0), ones, torch.tensor([[True, True]]))
    tensor([4.])
    """
    _check(student, teacher, allowed, query_mask, equal_heads=True)
    with full_precision(student, teacher) as (s, t):
        counted = allowed & query_mask[:, None, :, None]
        return within(torch.where(counted, s - t, 0).square().mean(1, keepdim=True), counted)[0]


def attention_kl(student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the attention distributions, teacher first.

    ``1/(H n) sum_h sum_i KL(softmax(a_T,hi) || softmax(a_S,hi))`` over the ``n`` real queries of each example. Where
    the numbers of heads differ, heads are merged in probability space: consecutive heads are averaged, after the
    softmax, down to the greatest common divisor of both numbers. Arguments and errors are
    those of :func:`attention_mse`.

    Returns:
        ``(batch,)``, in nats.

    Source: Wang et al., "MiniLM", 2020; Wang et al., "How to Distill your BERT", 2023.

    >>> ones = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    >>> attention_kl(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, -1e9]]]]), ones, torch.tensor([[True]]))
    tensor([0.6931])
    """
    _check(student, teacher, allowed, query_mask)
    with full_precision(student, teacher) as (s, t):
        counted = allowed & query_mask[:, None, :, None]
        return within(kl(*_log_probabilities(counted, s, t)).mean(1), query_mask)[0]


def attention_output(scores: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Average the values by the attention probabilities, and join the heads.

    ``softmax(a_hi) v_h`` for each query ``i``, the heads ``h`` side by side.

    Args:
        scores: ``(batch, heads, queries, keys)``, before the softmax.
        value: ``(batch, value heads, keys, size)``; fewer heads than in the scores are shared among them.
        allowed: boolean ``(batch, 1, queries, keys)``, each as long or 1, true where a query may attend to a key.

    Returns:
        ``(batch, queries, heads * size)``.

    Raises:
        ObjectiveError: a tensor has another dtype or shape.

    >>> ones = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    >>> attention_output(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0], [3.0]]]]), ones)
    tensor([[[2.]]])
    """
    shapes = Shapes().floats("batch heads queries keys", scores=scores)
    shapes.floats("batch value_heads keys size", value=value).masks("batch? 1 queries? keys?", allowed=allowed)
    if scores.shape[1] % value.shape[1]:
        raise ObjectiveError(f"{scores.shape[1]} heads can't share the values of {value.shape[1]}.")
    with full_precision(scores, value) as (a, v):
        v = torch.where(allowed.any(2).unsqueeze(-1), for_each_head(v, a.shape[1]), 0)  # 0 times NaN is NaN
        return (_log_probabilities(allowed, a)[0].exp() @ v).transpose(1, 2).flatten(2)


def attention_dist(
    student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor, over: Over = "tokens"
) -> tuple[Tensor, Tensor]:
    """Pearson distance of attention probabilities, over the keys of a query or over the heads of a pair of tokens.

    Over tokens ``1/(H n) sum_h sum_i (1 - corr_j(p_S,hij, p_T,hij))``, over heads
    ``1/N sum_(i,j) (1 - corr_h(p_S,hij, p_T,hij))``, of those correlations that are defined: at least two entries,
    which the teacher does not hold equal. Numbers of heads that differ are merged as in :func:`attention_kl`. ``over``
    is ``"tokens"`` or ``"heads"``; the other arguments are those of :func:`attention_mse`.

    Returns:
        The mean distance of each example, ``(batch,)``, between 0 and 2, and of how many correlations it is the mean,
        ``(batch,)``: where that is 0, so is the mean, and the example should not count.

    Raises:
        ConfigError: ``over`` is none of these.
        ObjectiveError: a tensor has another dtype or shape.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022; on attention in the code of Wang et
    al., "How to Distill your BERT", 2023.

    >>> ones = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    >>> scores = torch.tensor([[[[0.0, 1.0]]]])
    >>> distance, count = attention_dist(scores, -scores, ones, torch.tensor([[True]]))
    >>> distance.round(decimals=4), count
    (tensor([2.]), tensor([1]))
    """
    check_choice("over", over, get_args(Over))
    _check(student, teacher, allowed, query_mask)
    with full_precision(student, teacher) as (s, t):
        counted = (allowed & query_mask[:, None, :, None]).expand(len(s), 1, *s.shape[2:])
        p, q = (x.exp() for x in _log_probabilities(counted, s, t))
        return within(*pearson_distance(p, q, counted, -1 if over == "tokens" else 1))


def attention_dist_over_batch(
    student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor, total: Total = unchanged
) -> Tensor:
    """Pearson distance of attention probabilities over the sentences of a batch.

    ``1 - corr_b(p_S,bhij, p_T,bhij)``, mean over heads and pairs of positions ``i, j`` where it is defined. Positions
    are counted from each sentence's first real token, so that padding has no influence. Arguments and errors are
    those of :func:`attention_mse`, of self-attention, and ``total``, which extends a sum over the batch over further
    processes; they must have as many positions.

    Returns:
        A scalar, between 0 and 2.

    Source: the code of Wang et al., "How to Distill your BERT", 2023.

    >>> ones = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    >>> scores = torch.tensor([[[[0.0, 1.0], [2.0, 0.0]]], [[[1.0, 0.0], [0.0, 0.0]]]])
    >>> mask = torch.ones(2, 2, dtype=torch.bool)
    >>> attention_dist_over_batch(scores, scores, ones, mask).abs().round(decimals=4)
    tensor(0.)
    """
    _check(student, teacher, allowed, query_mask)
    with full_precision(student, teacher) as (s, t):
        counted = (allowed & query_mask[:, None, :, None]).expand(len(s), 1, *s.shape[2:])
        # Real tokens first, in their order.
        order = (~query_mask).int().argsort(dim=1, stable=True)[:, None, :]
        p, q = (_reordered(x.exp(), order) for x in _log_probabilities(counted, s, t))
        counted = _reordered(counted, order)
        distance, defined = pearson_distance(p, q, counted, 0, total)
        return distance.sum() / defined.sum().clamp(min=1)


def _check(student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor, equal_heads: bool = False) -> None:
    shapes = Shapes().floats("batch heads queries keys", student=student)
    shapes.floats(f"batch {'' if equal_heads else 'teacher_'}heads queries keys", teacher=teacher)
    shapes.masks("batch? 1 queries? keys?", allowed=allowed).masks("batch queries", query_mask=query_mask)


def _reordered(maps: Tensor, order: Tensor) -> Tensor:
    rows, columns = order.unsqueeze(-1).expand(maps.shape), order.unsqueeze(-2).expand(maps.shape)
    return maps.gather(2, rows).gather(3, columns)


def _log_probabilities(allowed: Tensor, *scores: Tensor) -> list[Tensor]:
    """Return the logarithms of each map's probabilities, with heads merged until all have the same number."""
    heads, found = math.gcd(*(x.shape[1] for x in scores)), []
    for x in scores:
        # Not -inf: a row without any allowed key would give NaN, and its gradient too, although it never counts.
        log_p = F.log_softmax(torch.where(allowed, x, torch.finfo(x.dtype).min / 4), -1)
        merged = x.shape[1] // heads
        if merged > 1:
            log_p = log_p.reshape(len(x), heads, merged, *x.shape[2:]).logsumexp(2) - math.log(merged)
        found.append(log_p)
    return found
