"""Losses on attention scores that never hold a map of all queries by all keys.

They give the same values and gradients as :mod:`ildistil.functional`, from queries and keys instead of scores:

- :func:`attention_kl` goes over blocks of heads and query rows. The gradient of a row's divergence with respect to the
  student's scores is ``p_S - p_T``, so one pass gives the loss and the gradients of query and key; nothing but these is
  kept for the backward pass.
- :func:`attention_mse` needs no scores at all: ``||A B^T||^2 = <A^T A, B^T B>`` with ``A = [Q_S, -Q_T]`` and
  ``B = [K_S, K_T]``, for each head two matrices of the size of its head dimensions.

Both are exact under padding, wherever it stands.
"""

from typing import Any

import torch
from torch import Tensor

from ildistil.functional import full_precision

__all__ = ["attention_kl", "attention_mse", "suits"]

# Elements of one block of scores: a few of these blocks fit into the caches of a core.
_BLOCK = 2**19


def suits(tensor: Tensor) -> bool:
    """Tell whether going over blocks pays: on a CPU; a GPU wants larger pieces of work at once."""
    return tensor.device.type == "cpu"


def attention_kl(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    query_mask: Tensor,
    key_mask: Tensor,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the attention distributions, teacher first, block by block.

    ``1/(H n) sum_h sum_i KL(softmax(q_T,hi k_T^T) || softmax(q_S,hi k_S^T))`` over the ``n`` real queries.

    Args:
        student: queries ``(batch, heads, queries, size)``, scaled, and keys ``(batch, heads, keys, size)``.
        teacher: the same, perhaps of another size; gets no gradient.
        query_mask: boolean ``(batch, queries)``, true where the query is a real token.
        key_mask: boolean ``(batch, keys)``, true where the key is a real token.
        causal: queries attend to no later position.
        window: queries attend to fewer than this many positions away.

    Returns:
        ``(batch,)``, in nats.

    >>> q, k, real = torch.ones(1, 1, 1, 1), torch.tensor([[[[0.0], [0.0]]]]), torch.tensor([[True, True]])
    >>> attention_kl((q, k), (q, torch.tensor([[[[0.0], [-1e9]]]])), real[:, :1], real)
    tensor([0.6931])
    """
    with full_precision(*student, *teacher) as (q_s, k_s, q_t, k_t):
        masks = query_mask, key_mask, causal, window
        values: Tensor = _BlockwiseKL.apply(  # type: ignore[no-untyped-call]
            q_s, k_s, q_t.detach(), k_t.detach(), *masks
        )
        return values


class _BlockwiseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, query_mask: Tensor, key_mask: Tensor,
        causal: bool, window: int | None,
    ) -> Tensor:  # fmt: skip
        wants = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        dq, dk = (torch.zeros_like(x) if wants else None for x in (q_s, k_s))
        values = q_s.new_zeros(len(q_s))
        for b in range(len(q_s)):
            # Only the span that holds real tokens: padding costs nothing.
            rows, columns = _span(query_mask[b]), _span(key_mask[b])
            if rows.start == rows.stop:
                continue
            vectors = q_s[b, :, rows], k_s[b, :, columns], q_t[b, :, rows], k_t[b, :, columns]
            real, keys = query_mask[b, rows], key_mask[b, columns]
            out = None if dq is None or dk is None else (dq[b, :, rows], dk[b, :, columns])
            values[b] = _example(vectors, real, keys, causal, window, rows.start - columns.start, out)
        ctx.save_for_backward(*(() if dq is None or dk is None else (dq, dk)))
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The blockwise attention loss has no second derivative. Use ildistil.functional.attention_kl."
            )
        dq, dk = ctx.saved_tensors
        grad = grad[:, None, None, None]
        return dq * grad, dk * grad, None, None, None, None, None, None


def _span(mask: Tensor) -> slice:
    real = mask.nonzero()
    return slice(int(real[0]), int(real[-1]) + 1) if len(real) else slice(0, 0)


def _example(
    vectors: tuple[Tensor, Tensor, Tensor, Tensor], real: Tensor, keys: Tensor, causal: bool, window: int | None,
    offset: int, out: tuple[Tensor, Tensor] | None,
) -> Tensor:  # fmt: skip
    """Give the divergence of one example, and write the gradients of its queries and keys."""
    q_s, k_s, q_t, k_t = vectors
    heads, n, _ = q_s.shape
    m = k_s.shape[1]
    rows = max(1, min(n, _BLOCK // m))
    group = max(1, min(heads, _BLOCK // (rows * m)))
    everywhere = bool(keys.all()) and not causal and window is None
    real_rows = None if bool(real.all()) else real.to(q_s.dtype)
    value = q_s.new_zeros(())
    for start in range(0, n, rows):
        r = slice(start, start + rows)
        blocked = None if everywhere else ~_allowed(keys, r, n, m, causal, window, offset)
        counted = None if real_rows is None else real_rows[r]
        for first in range(0, heads, group):
            h = slice(first, first + group)
            part, d = _block(q_s[h, r], k_s[h], q_t[h, r], k_t[h], blocked, counted)
            value += part
            if out is not None:
                out[0][h, r] = d @ k_s[h]
                out[1][h] += d.mT @ q_s[h, r]
    weight = 1 / (heads * int(real.sum()))
    if out is not None:
        out[0].mul_(weight)
        out[1].mul_(weight)
    return value * weight


def _block(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, blocked: Tensor | None, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Give the sum of the rows' divergences, and its gradient with respect to the student's scores."""
    s, t = q_s @ k_s.mT, q_t @ k_t.mT
    for scores in (s, t):
        if blocked is not None:
            scores.masked_fill_(blocked, torch.finfo(scores.dtype).min / 4)
        scores.sub_(scores.amax(-1, keepdim=True))
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    # The greatest score is 0, so its probability is one over the sum that the softmax divided by.
    rows = p_t.amax(-1).log() - p_s.amax(-1).log()
    weighted = p_t if counted is None else p_t * counted[:, None]
    value = torch.dot(weighted.reshape(-1), t.sub_(s).reshape(-1))
    value = value + (rows if counted is None else rows * counted).sum()
    d = p_s.sub_(p_t)
    return value, d if counted is None else d.mul_(counted[:, None])


def _allowed(keys: Tensor, rows: slice, n: int, m: int, causal: bool, window: int | None, offset: int) -> Tensor:
    distance = torch.arange(rows.start, min(rows.stop, n), device=keys.device)[:, None] + offset
    distance = distance - torch.arange(m, device=keys.device)
    allowed = keys.expand_as(distance)
    if causal:
        allowed = allowed & (distance >= 0)
    return allowed if window is None else allowed & (distance.abs() < window)


def attention_mse(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], query_mask: Tensor, key_mask: Tensor
) -> Tensor:
    """Mean squared error of attention scores, in time linear in the number of tokens.

    ``1/(H N) sum_h <A_h^T A_h, B_h^T B_h>`` over the ``N`` pairs of a real query and a real key, with
    ``A_h = [q_S,h, -q_T,h]`` and ``B_h = [k_S,h, k_T,h]``. Where both heads have one size, the same product is written
    ``A_h = [q_S,h - q_T,h, q_T,h]`` and ``B_h = [k_S,h, k_S,h - k_T,h]``, whose terms are small where student and
    teacher are close. Where the terms of the sum cancel all the same, it is taken in float64.

    Args:
        student: queries ``(batch, heads, queries, size)``, scaled, and keys ``(batch, heads, keys, size)``.
        teacher: the same, perhaps of another size.
        query_mask: boolean ``(batch, queries)``, true where the query is a real token.
        key_mask: boolean ``(batch, keys)``, true where the key is a real token.

    Returns:
        ``(batch,)``.

    >>> q, k, real = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), torch.tensor([[True, True]])
    >>> attention_mse((q, k), (q, 3 * k), real, real)
    tensor([4.])
    """
    with full_precision(*student, *teacher) as (q_s, k_s, q_t, k_t):
        products = _products(q_s, k_s, q_t, k_t, query_mask, key_mask)
        sums = products.sum((1, 2, 3))
        if bool((sums.detach() < 1e-2 * products.detach().abs().sum((1, 2, 3))).any()):
            products = _products(q_s.double(), k_s.double(), q_t.double(), k_t.double(), query_mask, key_mask)
            sums = products.sum((1, 2, 3)).to(q_s.dtype)
        pairs = query_mask.sum(1) * key_mask.sum(1) * q_s.shape[1]
        return sums.clamp(min=0) / pairs.clamp(min=1)


def _products(q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, query_mask: Tensor, key_mask: Tensor) -> Tensor:
    """Multiply both Gram matrices of every head, entry by entry."""
    if q_s.shape[-1] == q_t.shape[-1]:
        queries, keys = torch.cat([q_s - q_t, q_t], -1), torch.cat([k_s, k_s - k_t], -1)
    else:
        queries, keys = torch.cat([q_s, -q_t], -1), torch.cat([k_s, k_t], -1)
    queries = torch.where(query_mask[:, None, :, None], queries, 0)
    keys = torch.where(key_mask[:, None, :, None], keys, 0)
    return (queries.mT @ queries) * (keys.mT @ keys)
