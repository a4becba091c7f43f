"""The divergence of attention distributions as Triton kernels: nothing larger than queries and keys is ever written.

The forward pass keeps for every row of either model the greatest score and the logarithm of the sum behind the softmax;
from these the backward pass recomputes the probabilities tile by tile: once by rows for the gradient of the queries,
once by columns for that of the keys. Half-precision vectors are widened when they are loaded.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ildistil.attention import Masks, Scores
from ildistil.kernels.choice import refuse_second_derivative

# The first axis of a grid, the one that may be long, counts batch times heads.
# Rows and columns of a tile, and stages of loading, by the size of the heads: large ones need more shared memory.
_TILES = {64: (64, 2), 128: (32, 1), 256: (16, 1)}


def divergences(student: Scores, teacher: Scores, masks: Masks) -> Tensor:
    """Sum of the rows' Kullback-Leibler divergences, teacher first: ``(batch,)``."""
    with torch.autocast(student.query.device.type, enabled=False):
        student, teacher = (x._replace(query=_dense(x.query), key=_dense(x.key)) for x in (student, teacher.detach()))
        rest = tuple(student.detach()[2:])
        sums: Tensor = _Divergences.apply(student.query, student.key, rest, teacher, masks)
        return sums


def _dense(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, rest: Any, teacher: Scores, masks: Masks) -> Tensor:
        batch, heads, queries, _ = query.shape
        rows = query.new_empty(5, batch, heads, queries, dtype=torch.float32)
        tile, arguments = _arguments(Scores(query, key, *rest), teacher, masks)
        with _device(query):
            _row_kernel[(batch * heads, triton.cdiv(queries, tile))](**arguments, rows=rows, row_count=rows[0].numel())
        ctx.save_for_backward(query, key, teacher.query, teacher.key, rows[:4])
        ctx.rest = rest, teacher[2:], masks
        return rows[4].sum((1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The Triton attention loss")
        q_s, k_s, q_t, k_t, rows = ctx.saved_tensors
        rest_s, rest_t, masks = ctx.rest
        tile, arguments = _arguments(Scores(q_s, k_s, *rest_s), Scores(q_t, k_t, *rest_t), masks)
        arguments |= {"rows": rows, "row_count": rows[0].numel(), "weights": grad.float().contiguous()}
        batch, heads, queries, _ = q_s.shape
        dq = dk = None
        with _device(q_s):
            if ctx.needs_input_grad[0]:
                dq = torch.empty_like(q_s)
                grid = (batch * heads, triton.cdiv(queries, tile))
                _query_kernel[grid](**arguments, out=dq, **_strides("out", dq))
            if ctx.needs_input_grad[1]:
                dk = torch.empty_like(k_s)
                grid = (batch * k_s.shape[1], triton.cdiv(k_s.shape[2], tile))
                _key_kernel[grid](**arguments, out=dk, **_strides("out", dk))
        return dq, dk, None, None, None


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_{axis}": stride for axis, stride in zip("bhn", x.stride(), strict=False)}


def _arguments(student: Scores, teacher: Scores, masks: Masks) -> tuple[int, dict[str, Any]]:
    """Return the size of a tile, and the arguments of all kernels."""
    batch, heads, queries, _ = student.query.shape
    keys = student.key.shape[2]
    found: dict[str, Any] = {"heads": heads, "queries": queries, "keys": keys}
    for side, parts in (("s", student), ("t", teacher)):
        size = parts.query.shape[-1]
        found |= {f"size_{side}": size, f"width_{side}": max(16, triton.next_power_of_2(size))}
        found |= {f"group_{side}": parts.groups, f"scale_{side}": parts.scale}
        found |= {f"q_{side}": parts.query, f"k_{side}": parts.key, f"softcap_{side}": parts.softcap}
        found |= _strides(f"q_{side}", parts.query) | _strides(f"k_{side}", parts.key)
        bias = None if parts.bias is None else parts.bias.expand(batch, heads, queries, keys)
        found |= {f"bias_{side}": bias}
        found |= {f"bias_{side}_{axis}": 0 if bias is None else bias.stride(i) for i, axis in enumerate("bhnm")}
        # tf32 holds what half precision holds: products of such vectors are exact.
        half = parts.query.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"
        found[f"precision_{side}"] = "tf32" if half else "ieee"
    for name, mask in (("query_mask", masks.query_mask), ("key_mask", masks.key_mask)):
        found[name] = None if mask is None else mask.to(torch.int8).contiguous()
    tile, stages = next(x for width, x in _TILES.items() if max(found["width_s"], found["width_t"]) <= width)
    return tile, found | {"causal": masks.causal, "window": masks.window, "tile": tile, "num_stages": stages}


@triton.jit
def _at(x, b, h, stride_b, stride_h):
    return x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def _vectors(at, stride, positions, real, size: tl.constexpr, width: tl.constexpr):
    """Load vectors as float32, zeros for what isn't real."""
    columns = tl.arange(0, width)
    inside = real[:, None] & (columns < size)[None, :]
    places = at + positions[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(at, stride, positions, limit, values, size: tl.constexpr, width: tl.constexpr):
    columns = tl.arange(0, width)
    inside = (positions < limit)[:, None] & (columns < size)[None, :]
    places = at + positions[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(places, values.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _real(mask, b, positions, limit):
    real = positions < limit
    if mask is not None:
        real = real & (tl.load(mask + b * limit + positions, mask=real, other=0) != 0)
    return real


@triton.jit
def _seen(i, j, real_keys, causal: tl.constexpr, window):
    """Return which keys the queries may attend to."""
    distance = i[:, None] - j[None, :]
    seen = real_keys[None, :] & (i >= 0)[:, None]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window) & (distance > -window)
    return seen


@triton.jit
def _scores(
    q, k, scale, softcap, bias, bias_b, bias_h, bias_n, bias_m, b, h, i, j, seen, queries, keys,
    precision: tl.constexpr,
):  # fmt: skip
    """Return the scores of a tile, and the slope of the softcap."""
    x = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    slope = tl.zeros_like(x) + 1.0
    if softcap is not None:
        tanh = 1 - 2 / (tl.exp(2 * x / softcap) + 1)
        slope = 1 - tanh * tanh
        x = softcap * tanh
    if bias is not None:
        at = _at(bias, b, h, bias_b, bias_h) + i[:, None].to(tl.int64) * bias_n + j[None, :].to(tl.int64) * bias_m
        x += tl.load(at, mask=(i < queries)[:, None] & (j < keys)[None, :], other=0.0).to(tl.float32)
    # Not -inf: a row without any key would give NaN.
    return tl.where(seen, x, -1e30), slope


@triton.jit
def _first_key(i, window):
    return 0 if window is None else tl.maximum(0, i - window + 1)


@triton.jit
def _last_key(i, keys, causal: tl.constexpr, window):
    """Return the end of the keys that the queries before ``i`` see."""
    if causal:
        keys = tl.minimum(keys, i)
    elif window is not None:
        keys = tl.minimum(keys, i + window - 1)
    return keys


@triton.jit
def _row_kernel(
    q_s, q_s_b, q_s_h, q_s_n, k_s, k_s_b, k_s_h, k_s_n, bias_s, bias_s_b, bias_s_h, bias_s_n, bias_s_m,
    q_t, q_t_b, q_t_h, q_t_n, k_t, k_t_b, k_t_h, k_t_n, bias_t, bias_t_b, bias_t_h, bias_t_n, bias_t_m,
    query_mask, key_mask, heads, queries, keys, group_s, group_t, scale_s, scale_t, softcap_s, softcap_t, window,
    rows, row_count,
    causal: tl.constexpr, size_s: tl.constexpr, width_s: tl.constexpr, size_t: tl.constexpr, width_t: tl.constexpr,
    tile: tl.constexpr, precision_s: tl.constexpr, precision_t: tl.constexpr,
):  # fmt: skip
    """Write for each row of student and teacher the greatest score and the log of the sum, and the row's divergence."""
    b, h = tl.program_id(0) // heads, tl.program_id(0) % heads
    start = tl.program_id(1) * tile
    i = start + tl.arange(0, tile)
    real = _real(query_mask, b, i, queries)
    at_k_s, at_k_t = _at(k_s, b, h // group_s, k_s_b, k_s_h), _at(k_t, b, h // group_t, k_t_b, k_t_h)
    own = _vectors(_at(q_s, b, h, q_s_b, q_s_h), q_s_n, i, real, size_s, width_s)
    theirs = _vectors(_at(q_t, b, h, q_t_b, q_t_h), q_t_n, i, real, size_t, width_t)
    top_s = tl.full([tile], -1e30, tl.float32)
    top_t = tl.full([tile], -1e30, tl.float32)
    sum_s = tl.zeros([tile], tl.float32)
    sum_t = tl.zeros([tile], tl.float32)
    # sum_j exp(t - top_t) ((t - top_t) - (s - top_s)): with both tops taken off nothing large is subtracted.
    difference = tl.zeros([tile], tl.float32)
    for first in range(_first_key(start, window), _last_key(start + tile, keys, causal, window), tile):
        j = first + tl.arange(0, tile)
        real_keys = _real(key_mask, b, j, keys)
        seen = _seen(i, j, real_keys, causal, window)
        own_k = _vectors(at_k_s, k_s_n, j, real_keys, size_s, width_s)
        s, _ = _scores(
            own, own_k, scale_s, softcap_s, bias_s, bias_s_b, bias_s_h, bias_s_n, bias_s_m,
            b, h, i, j, seen, queries, keys, precision_s,
        )  # fmt: skip
        their_k = _vectors(at_k_t, k_t_n, j, real_keys, size_t, width_t)
        t, _ = _scores(
            theirs, their_k, scale_t, softcap_t, bias_t, bias_t_b, bias_t_h, bias_t_n, bias_t_m,
            b, h, i, j, seen, queries, keys, precision_t,
        )  # fmt: skip
        new_s, new_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(t, 1))
        s -= new_s[:, None]
        t -= new_t[:, None]
        shrink = tl.exp(top_t - new_t)
        difference = shrink * (difference - sum_t * ((new_t - top_t) - (new_s - top_s)))
        difference += tl.sum(tl.exp(t) * (t - s), 1)
        sum_s = sum_s * tl.exp(top_s - new_s) + tl.sum(tl.exp(s), 1)
        sum_t = sum_t * shrink + tl.sum(tl.exp(t), 1)
        top_s, top_t = new_s, new_t
    # A tile may see no key at all.
    sum_s, sum_t = tl.maximum(sum_s, 1e-30), tl.maximum(sum_t, 1e-30)
    at = rows + tl.program_id(0).to(tl.int64) * queries + i
    inside = i < queries
    tl.store(at, top_s, mask=inside)
    tl.store(at + row_count, tl.log(sum_s), mask=inside)
    tl.store(at + 2 * row_count, top_t, mask=inside)
    tl.store(at + 3 * row_count, tl.log(sum_t), mask=inside)
    divergence = difference / sum_t - tl.log(sum_t) + tl.log(sum_s)
    tl.store(at + 4 * row_count, tl.where(real, divergence, 0.0), mask=inside)


@triton.jit
def _difference(s, t, slope, rows, row_count, bh, i, queries, real):
    """Return the gradient of the divergence with respect to a tile of the student's products, without their scale."""
    at, inside = rows + bh.to(tl.int64) * queries + i, i < queries
    top_s = tl.load(at, mask=inside, other=0.0)
    log_s = tl.load(at + row_count, mask=inside, other=0.0)
    top_t = tl.load(at + 2 * row_count, mask=inside, other=0.0)
    log_t = tl.load(at + 3 * row_count, mask=inside, other=0.0)
    p_s = tl.exp((s - top_s[:, None]) - log_s[:, None])
    p_t = tl.exp((t - top_t[:, None]) - log_t[:, None])
    return tl.where(real[:, None], (p_s - p_t) * slope, 0.0)


@triton.jit
def _query_kernel(
    q_s, q_s_b, q_s_h, q_s_n, k_s, k_s_b, k_s_h, k_s_n, bias_s, bias_s_b, bias_s_h, bias_s_n, bias_s_m,
    q_t, q_t_b, q_t_h, q_t_n, k_t, k_t_b, k_t_h, k_t_n, bias_t, bias_t_b, bias_t_h, bias_t_n, bias_t_m,
    query_mask, key_mask, heads, queries, keys, group_s, group_t, scale_s, scale_t, softcap_s, softcap_t, window,
    rows, row_count, weights, out, out_b, out_h, out_n,
    causal: tl.constexpr, size_s: tl.constexpr, width_s: tl.constexpr, size_t: tl.constexpr, width_t: tl.constexpr,
    tile: tl.constexpr, precision_s: tl.constexpr, precision_t: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the student's queries."""
    bh = tl.program_id(0)
    b, h = bh // heads, bh % heads
    start = tl.program_id(1) * tile
    i = start + tl.arange(0, tile)
    real = _real(query_mask, b, i, queries)
    at_k_s, at_k_t = _at(k_s, b, h // group_s, k_s_b, k_s_h), _at(k_t, b, h // group_t, k_t_b, k_t_h)
    own = _vectors(_at(q_s, b, h, q_s_b, q_s_h), q_s_n, i, real, size_s, width_s)
    theirs = _vectors(_at(q_t, b, h, q_t_b, q_t_h), q_t_n, i, real, size_t, width_t)
    found = tl.zeros([tile, width_s], tl.float32)
    for first in range(_first_key(start, window), _last_key(start + tile, keys, causal, window), tile):
        j = first + tl.arange(0, tile)
        real_keys = _real(key_mask, b, j, keys)
        seen = _seen(i, j, real_keys, causal, window)
        their_k = _vectors(at_k_t, k_t_n, j, real_keys, size_t, width_t)
        t, _ = _scores(
            theirs, their_k, scale_t, softcap_t, bias_t, bias_t_b, bias_t_h, bias_t_n, bias_t_m,
            b, h, i, j, seen, queries, keys, precision_t,
        )  # fmt: skip
        own_k = _vectors(at_k_s, k_s_n, j, real_keys, size_s, width_s)
        s, slope = _scores(
            own, own_k, scale_s, softcap_s, bias_s, bias_s_b, bias_s_h, bias_s_n, bias_s_m,
            b, h, i, j, seen, queries, keys, precision_s,
        )  # fmt: skip
        d = _difference(s, t, slope, rows, row_count, bh, i, queries, real)
        found += tl.dot(d, own_k, input_precision=precision_s)
    found *= scale_s * tl.load(weights + b)
    _store(_at(out, b, h, out_b, out_h), out_n, i, queries, found, size_s, width_s)


@triton.jit
def _key_kernel(
    q_s, q_s_b, q_s_h, q_s_n, k_s, k_s_b, k_s_h, k_s_n, bias_s, bias_s_b, bias_s_h, bias_s_n, bias_s_m,
    q_t, q_t_b, q_t_h, q_t_n, k_t, k_t_b, k_t_h, k_t_n, bias_t, bias_t_b, bias_t_h, bias_t_n, bias_t_m,
    query_mask, key_mask, heads, queries, keys, group_s, group_t, scale_s, scale_t, softcap_s, softcap_t, window,
    rows, row_count, weights, out, out_b, out_h, out_n,
    causal: tl.constexpr, size_s: tl.constexpr, width_s: tl.constexpr, size_t: tl.constexpr, width_t: tl.constexpr,
    tile: tl.constexpr, precision_s: tl.constexpr, precision_t: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the student's keys, added up over the heads that share them."""
    key_heads = heads // group_s
    b, key_head = tl.program_id(0) // key_heads, tl.program_id(0) % key_heads
    start = tl.program_id(1) * tile
    j = start + tl.arange(0, tile)
    real_keys = _real(key_mask, b, j, keys)
    own_k = _vectors(_at(k_s, b, key_head, k_s_b, k_s_h), k_s_n, j, real_keys, size_s, width_s)
    found = tl.zeros([tile, width_s], tl.float32)
    # Queries see backwards as keys are seen forwards; causal ones not before the key itself.
    stop = queries if window is None else tl.minimum(queries, start + tile + window - 1)
    for member in range(group_s):
        h = key_head * group_s + member
        at_q_s, at_q_t = _at(q_s, b, h, q_s_b, q_s_h), _at(q_t, b, h, q_t_b, q_t_h)
        at_k_t = _at(k_t, b, h // group_t, k_t_b, k_t_h)
        their_k = _vectors(at_k_t, k_t_n, j, real_keys, size_t, width_t)
        for first in range(start if causal else _first_key(start, window), stop, tile):
            i = first + tl.arange(0, tile)
            real = _real(query_mask, b, i, queries)
            seen = _seen(i, j, real_keys, causal, window)
            their_q = _vectors(at_q_t, q_t_n, i, real, size_t, width_t)
            t, _ = _scores(
                their_q, their_k, scale_t, softcap_t, bias_t, bias_t_b, bias_t_h, bias_t_n, bias_t_m,
                b, h, i, j, seen, queries, keys, precision_t,
            )  # fmt: skip
            own_q = _vectors(at_q_s, q_s_n, i, real, size_s, width_s)
            s, slope = _scores(
                own_q, own_k, scale_s, softcap_s, bias_s, bias_s_b, bias_s_h, bias_s_n, bias_s_m,
                b, h, i, j, seen, queries, keys, precision_s,
            )  # fmt: skip
            d = _difference(s, t, slope, rows, row_count, b * heads + h, i, queries, real)
            found += tl.dot(tl.trans(d), own_q, input_precision=precision_s)
    found *= scale_s * tl.load(weights + b)
    _store(_at(out, b, key_head, out_b, out_h), out_n, j, keys, found, size_s, width_s)
