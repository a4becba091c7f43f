"""Pure losses: tensors in, one value per example out, masks as arguments.

Conventions, everywhere the same:

- ``student`` comes first, ``teacher`` second; the teacher gets no gradient from these functions' callers, but nothing
  here detaches it.
- Every loss returns a tensor of shape ``(batch,)``: the mean *within* each example over what its mask lets count.
  :func:`example_mean` then averages over the examples that have anything to count. This is the reduction of the
  literature (attention losses are divided by the length of *their* sequence), and it makes padding exact.
- Half-precision inputs are computed in float32, float64 stays float64, whatever ``autocast`` says.
- Values are in nats (KL) or squared units of the input (MSE).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "attention_kl",
    "attention_mse",
    "cls_mse",
    "example_mean",
    "full_precision",
    "hidden_cosine",
    "hidden_mse",
    "logits_kl",
    "logits_mse",
    "masked_mean",
]


@contextmanager
def full_precision(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Leave autocast and widen half-precision tensors to float32.

    >>> with full_precision(torch.ones(2, dtype=torch.bfloat16)) as (x,):
    ...     x.dtype
    torch.float32
    """
    device = tensors[0].device.type
    with torch.autocast(device, enabled=False):
        yield tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the examples of the mean over each example's unmasked entries.

    ``1/B' sum_b ( sum_i m_bi v_bi / sum_i m_bi )`` over the ``B'`` examples with any unmasked entry.

    Args:
        values: ``(batch, ...)``.
        mask: boolean, broadcastable to ``values``; true where an entry counts.

    Returns:
        A scalar; zero (with a gradient of zero) when nothing at all is unmasked.

    >>> v = torch.tensor([[1.0, 3.0], [5.0, 100.0], [7.0, 7.0]])
    >>> masked_mean(v, torch.tensor([[True, True], [True, False], [False, False]]))
    tensor(3.5000)
    """
    return example_mean(*_within(values, mask))


def example_mean(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of per-example values over the examples that count.

    Args:
        values: ``(batch,)``.
        counts: ``(batch,)``, boolean or the number of entries behind each value; examples with zero are left out.

    >>> example_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
    tensor(1.5000)
    """
    if counts is None:
        return values.mean()
    present = counts > 0
    return torch.where(present, values, 0).sum() / present.sum().clamp(min=1)


def logits_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the class distributions, teacher first, times the squared temperature.

    ``T^2 KL(softmax(z_T / T) || softmax(z_S / T))``; the factor keeps the size of the gradient independent of ``T``.

    Args:
        student: logits ``(batch, classes)``.
        teacher: logits ``(batch, classes)``.
        temperature: softening ``T > 0``.

    Returns:
        ``(batch,)``, in nats.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.

    >>> logits_kl(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]).log().clamp(min=-1e9))
    tensor([0.6931])
    """
    with full_precision(student, teacher) as (s, t):
        return temperature**2 * _kl(F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1))


def logits_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the logits.

    ``1/C ||z_S - z_T||^2``

    Args:
        student: logits ``(batch, classes)``.
        teacher: logits ``(batch, classes)``.

    Returns:
        ``(batch,)``.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014.

    >>> logits_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
    tensor([5.])
    """
    with full_precision(student, teacher) as (s, t):
        return (s - t).square().mean(-1)


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden states over tokens and features.

    ``1/(n d) sum_i ||h_S,i - h_T,i||^2`` over the ``n`` unmasked tokens of each example.

    Args:
        student: ``(batch, tokens, width)``.
        teacher: ``(batch, tokens, width)``.
        mask: boolean ``(batch, tokens)``, true where a token is real.

    Returns:
        ``(batch,)``.

    Source: Jiao et al., "TinyBERT", 2020 (there without the mask).

    >>> mask = torch.tensor([[True, False]])
    >>> hidden_mse(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0), mask)
    tensor([4.])
    """
    with full_precision(student, teacher) as (s, t):
        return _within((s - t).square().mean(-1), mask)[0]


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cosine distance of hidden states over tokens.

    ``1/n sum_i (1 - cos(h_S,i, h_T,i))`` over the ``n`` unmasked tokens of each example; the distance to a zero vector
    is 1.

    Args:
        student: ``(batch, tokens, width)``.
        teacher: ``(batch, tokens, width)``.
        mask: boolean ``(batch, tokens)``, true where a token is real.

    Returns:
        ``(batch,)``, between 0 and 2.

    Source: Sanh et al., "DistilBERT", 2019.

    >>> hidden_cosine(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), torch.tensor([[True]]))
    tensor([1.])
    """
    with full_precision(student, teacher) as (s, t):
        return _within(1 - F.cosine_similarity(s, t, dim=-1), mask)[0]


def cls_mse(student: Tensor, teacher: Tensor, mask: Tensor, normalize: bool = False) -> Tensor:
    """Squared error of the first real token's hidden state.

    ``1/d ||h_S,1 - h_T,1||^2``; with ``normalize`` ``||h_S,1 / ||h_S,1|| - h_T,1 / ||h_T,1|| ||^2``.

    Args:
        student: ``(batch, tokens, width)``.
        teacher: ``(batch, tokens, width)``.
        mask: boolean ``(batch, tokens)``; the first true column is the first token, wherever the padding stands.
        normalize: compare directions.

    Returns:
        ``(batch,)``.

    Source: Sun et al., "Patient Knowledge Distillation", 2019 (normalised).

    >>> states = torch.tensor([[[9.0, 9.0], [1.0, 3.0]]])
    >>> cls_mse(torch.zeros(1, 2, 2), states, torch.tensor([[False, True]]))
    tensor([5.])
    """
    with full_precision(student, teacher) as (s, t):
        rows, first = torch.arange(len(mask), device=mask.device), mask.int().argmax(1)
        s, t = s[rows, first], t[rows, first]
        if normalize:
            return (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).square().sum(-1)
        return (s - t).square().mean(-1)


def attention_mse(student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor) -> Tensor:
    """Mean squared error of attention scores before the softmax.

    ``1/(H N) sum_h sum_(i,j) (a_S,hij - a_T,hij)^2`` over the ``N`` pairs of a real query and a key it may attend to.

    Args:
        student: scores ``(batch, heads, queries, keys)``.
        teacher: scores ``(batch, heads, queries, keys)``.
        allowed: boolean ``(batch, 1, queries, keys)``, true where a query may attend to a key.
        query_mask: boolean ``(batch, queries)``, true where the query is a real token.

    Returns:
        ``(batch,)``.

    Source: Jiao et al., "TinyBERT", 2020 (there over padded positions too).

    >>> ones = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    >>> attention_mse(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2.0), ones, torch.tensor([[True, True]]))
    tensor([4.])
    """
    with full_precision(student, teacher) as (s, t):
        counted = allowed & query_mask[:, None, :, None]
        return _within(torch.where(counted, s - t, 0).square().mean(1, keepdim=True), counted)[0]


def attention_kl(student: Tensor, teacher: Tensor, allowed: Tensor, query_mask: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the attention distributions, teacher first.

    ``1/(H n) sum_h sum_i KL(softmax(a_T,hi) || softmax(a_S,hi))`` over the ``n`` real queries of each example.

    Args:
        student: scores ``(batch, heads, queries, keys)``, before the softmax.
        teacher: scores ``(batch, heads, queries, keys)``, before the softmax.
        allowed: boolean ``(batch, 1, queries, keys)``, true where a query may attend to a key.
        query_mask: boolean ``(batch, queries)``, true where the query is a real token.

    Returns:
        ``(batch,)``, in nats.

    Source: Wang et al., "MiniLM", 2020; Wang et al., "How to Distill your BERT", 2023.

    >>> ones = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    >>> attention_kl(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, -1e9]]]]), ones, torch.tensor([[True]]))
    tensor([0.6931])
    """
    with full_precision(student, teacher) as (s, t):
        # Not -inf: a row without any allowed key would give NaN, and its gradient too, although it never counts.
        floor = torch.finfo(s.dtype).min / 4
        log_s = F.log_softmax(torch.where(allowed, s, floor), -1)
        log_t = F.log_softmax(torch.where(allowed, t, floor), -1)
        return _within(_kl(log_s, log_t).mean(1), query_mask)[0]


def _kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    return (log_t.exp() * (log_t - log_s)).sum(-1)


def _within(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each example's unmasked entries, and their number."""
    mask = mask.expand_as(values).flatten(1)
    counts = mask.sum(1)
    # where, not a product: whatever stands in masked places, NaN included, must not reach the sum or its gradient.
    sums = torch.where(mask, values.flatten(1), 0).sum(1)
    return sums / counts.clamp(min=1), counts
