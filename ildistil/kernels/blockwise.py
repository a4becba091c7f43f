"""Losses on attention scores in plain torch, over blocks of heads and query rows: never all queries by all keys.

The gradient of a row's divergence with respect to the student's scores is ``p_S - p_T``, that of the squared error
``2 (a_S - a_T)``: so one pass gives the loss and the gradients of query and key, and nothing but these is kept for the
backward pass. Where a bias, which examples may share, wants its gradient too, the backward pass goes over the blocks
once more.
"""

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ildistil.attention import Masks, Scores, visible, zeroed
from ildistil.kernels.choice import refuse_second_derivative
from ildistil.kernels.spans import spans

# Elements of one block of scores: on a CPU a few blocks fit into the caches, a GPU wants larger pieces of work.
_BLOCK = 2**20
_LARGE_BLOCK = 2**24
# Rows of a block where each query sees only part of the keys: those that none of the rows sees are left out.
_NARROW = 128

# Scores of student and teacher, a third buffer, what is masked out -> the sum, and its gradient with respect to the
# student's scores. Overwrites the three.
_Compare = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


class _Buffers(threading.local):
    """Where a CPU makes blocks of scores, always in the same place: the first touch of fresh memory takes long."""

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, Tensor] = {}

    def take(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return three blocks of this shape, ``(3, *shape)``, with anything in them."""
        size = 3 * math.prod(shape)
        if like.device.type != "cpu":
            return like.new_empty(3, *shape)
        kept = self._kept.get(like.dtype)
        if kept is None or len(kept) < size:
            with torch.inference_mode(False):  # its tensors couldn't be written to in a training step
                kept = self._kept[like.dtype] = torch.empty(size, dtype=like.dtype)
        return kept[:size].view(3, *shape)


_buffers = _Buffers()


def divergences(student: Scores, teacher: Scores, masks: Masks) -> Tensor:
    """Sum of the rows' Kullback-Leibler divergences, teacher first: ``(batch,)``."""
    return _sums(student, teacher, masks, _divergence)


def squared_errors(student: Scores, teacher: Scores, masks: Masks) -> Tensor:
    """Sum of the squared errors of the scores: ``(batch,)``."""
    return _sums(student, teacher, masks, _squared_error)


def _divergence(s: Tensor, t: Tensor, p: Tensor, blocked: Tensor | None) -> tuple[Tensor, Tensor]:
    if blocked is not None:
        for scores in (s, t):
            # Not -inf: a row without any key would give NaN.
            scores.masked_fill_(blocked, torch.finfo(s.dtype).min / 4)
    # Large scores would be rounded when they are subtracted from each other: their differences to the greatest aren't.
    for scores in (s, t):
        scores.sub_(scores.amax(-1, keepdim=True))
    # sum p_T (t - s) - lse_T + lse_S, where the probability of the greatest score, 0, is exp(-lse).
    p_t = torch.softmax(t, -1, out=p)
    rows = p_t.amax(-1).log()
    # Row by row, not in one product over all: what is common to a row's scores must cancel before rows are added up.
    rows += t.sub_(s).mul_(p_t).sum(-1)
    p_s = torch.softmax(s, -1, out=t)
    rows -= p_s.amax(-1).log()
    return rows.sum(), p_s.sub_(p_t)


def _squared_error(s: Tensor, t: Tensor, _: Tensor, blocked: Tensor | None) -> tuple[Tensor, Tensor]:
    error = s.sub_(t)
    if blocked is not None:
        error.masked_fill_(blocked, 0)
    value = torch.dot(error.view(-1), error.view(-1))
    return value, error.mul_(2)


def _sums(student: Scores, teacher: Scores, masks: Masks, compare: _Compare) -> Tensor:
    with torch.autocast(student.query.device.type, enabled=False):
        student = _with_four_dimensions(student.full_precision())
        teacher = _with_four_dimensions(teacher.detach().to(student.query.dtype))
        sums: Tensor = _Blockwise.apply(  # type: ignore[no-untyped-call]
            student.query, student.key, student.bias, student.scale, student.softcap, teacher, masks, compare
        )
        return sums


def _with_four_dimensions(parts: Scores) -> Scores:
    """Write the dimensions out that a bias leaves to broadcasting."""
    return parts if parts.bias is None else parts._replace(bias=parts.bias[(None,) * (4 - parts.bias.ndim)])


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, bias: Tensor | None, scale: float, softcap: float | None,
        teacher: Scores, masks: Masks, compare: _Compare,
    ) -> Tensor:  # fmt: skip
        student = Scores(query, key, scale, bias, softcap)
        ctx.wanted = ctx.needs_input_grad[:3]
        # Examples may share a bias: its gradient needs the weight of each, which only the backward pass knows.
        ctx.late = ctx.wanted[2]
        if ctx.late:
            ctx.save_for_backward(query, key, bias, teacher.query, teacher.key, teacher.bias)
            ctx.rest = (scale, softcap), (teacher.scale, teacher.softcap), masks, compare
            return _walk(student, teacher, masks, compare)
        grads = _Gradients.zeros(student, ctx.wanted)
        ctx.save_for_backward(*grads[:2])
        return _walk(student, teacher, masks, compare, grads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("A blockwise attention loss")
        nothing = (None,) * 5
        if not ctx.late:
            dq, dk = (None if x is None else x * grad[:, None, None, None] for x in ctx.saved_tensors)
            return dq, dk, None, *nothing
        q_s, k_s, b_s, q_t, k_t, b_t = ctx.saved_tensors
        (scale_s, softcap_s), (scale_t, softcap_t), masks, compare = ctx.rest
        student, teacher = Scores(q_s, k_s, scale_s, b_s, softcap_s), Scores(q_t, k_t, scale_t, b_t, softcap_t)
        grads = _Gradients.zeros(student, ctx.wanted)
        _walk(student, teacher, masks, compare, grads, grad)
        return *grads, *nothing


class _Gradients(NamedTuple):
    """Gradients of what scores are made of; ``None`` where none is wanted."""

    query: Tensor | None
    key: Tensor | None
    bias: Tensor | None

    @classmethod
    def zeros(cls, parts: Scores, wanted: tuple[bool, ...]) -> "_Gradients":
        tensors = zip((parts.query, parts.key, parts.bias), wanted, strict=True)
        return cls(*(torch.zeros_like(x) if wants and x is not None else None for x, wants in tensors))

    def cut(self, block: "_Block", groups: int) -> "_Gradients":
        """Return what belongs to one block."""
        return _Gradients(
            None if self.query is None else self.query[block.of_query],
            None if self.key is None else self.key[block.of_key(groups)],
            None if self.bias is None else block.of_bias(self.bias),
        )


class _Block(NamedTuple):
    """Scores of one example that are made at once."""

    example: int
    heads: slice
    rows: slice
    columns: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        heads, rows, columns = (x.stop - x.start for x in self[1:])
        return heads, rows, columns

    @property
    def of_query(self) -> tuple[int, slice, slice]:
        return self.example, self.heads, self.rows

    def of_key(self, groups: int) -> tuple[int, slice, slice]:
        return self.example, slice(self.heads.start // groups, self.heads.stop // groups), self.columns

    def of_bias(self, bias: Tensor) -> Tensor:
        """Cut it out; a dimension of 1 is shared."""
        place = slice(self.example, self.example + 1), self.heads, self.rows, self.columns
        return bias[tuple(slice(0, 1) if size == 1 else part for part, size in zip(place, bias.shape, strict=True))][0]

    def of_scores(self, x: Scores) -> Scores:
        """Return what the scores of the block are made of, in three dimensions."""
        bias = None if x.bias is None else self.of_bias(x.bias)
        return x._replace(query=x.query[self.of_query], key=x.key[self.of_key(x.groups)], bias=bias)


def _walk(
    student: Scores, teacher: Scores, masks: Masks, compare: _Compare, grads: _Gradients | None = None,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the sum of every example, and add up the gradients, of each example times its weight."""
    rows, query_mask = spans(masks.query_mask, student.query)
    columns, key_mask = spans(masks.key_mask, student.key)
    masks = masks._replace(query_mask=query_mask, key_mask=key_mask)
    student, teacher = (
        x._replace(query=zeroed(x.query, query_mask), key=zeroed(x.key, key_mask)) for x in (student, teacher)
    )
    sums = student.query.new_zeros(len(student.query))
    together = math.lcm(student.groups, teacher.groups)
    for b in range(len(sums)):
        for block, blocked in _blocks(b, rows[b], columns[b], masks, student.query, together):
            s, t, p = _buffers.take(block.shape, student.query)
            parts = block.of_scores(student)
            slope = _write_scores(parts, s)
            _write_scores(block.of_scores(teacher), t)
            value, d = compare(s, t, p, blocked)
            sums[b] += value
            if grads is not None:
                d = d if weights is None else d.mul_(weights[b])
                _accumulate(grads.cut(block, student.groups), parts, d, slope)
    return sums


def _blocks(
    b: int, rows: slice, columns: slice, masks: Masks, query: Tensor, together: int
) -> Iterator[tuple[_Block, Tensor | None]]:
    """Cut an example into blocks of whole rows and of so many heads; yield each with what is masked out in it."""
    n, m, heads = rows.stop - rows.start, columns.stop - columns.start, query.shape[1]
    size = _BLOCK if query.device.type == "cpu" else _LARGE_BLOCK
    if n == 0 or m == 0:
        return
    narrow = masks.causal or masks.window is not None
    high = max(1, min(n, size // (m * together), _NARROW if narrow else n))
    for r in _pieces(rows, high):
        c = _reached(r, columns, masks)
        if c.stop <= c.start:
            continue
        blocked = _blocked(b, r, c, masks, query.device)
        wide = max(1, size // ((r.stop - r.start) * (c.stop - c.start) * together)) * together
        for h in _pieces(slice(0, heads), wide, together):
            yield _Block(b, h, r, c), blocked


def _pieces(whole: slice, length: int, unit: int = 1) -> Iterator[slice]:
    """Cut into pieces of up to this length, as equal as multiples of a unit can be: a short one leaves cores idle."""
    units = (whole.stop - whole.start) // unit
    length = math.ceil(units / math.ceil(units * unit / length)) * unit
    for start in range(whole.start, whole.stop, length):
        yield slice(start, min(start + length, whole.stop))


def _reached(rows: slice, columns: slice, masks: Masks) -> slice:
    """Leave out the keys at both ends that none of the rows reaches."""
    start, stop = columns.start, columns.stop
    if masks.window is not None:
        start, stop = max(start, rows.start - masks.window + 1), min(stop, rows.stop - 1 + masks.window)
    return slice(start, min(stop, rows.stop) if masks.causal else stop)


def _blocked(b: int, rows: slice, columns: slice, masks: Masks, device: torch.device) -> Tensor | None:
    parts = [visible(masks, rows, columns, device)]
    if masks.key_mask is not None:
        parts.append(masks.key_mask[b, columns])
    if masks.query_mask is not None:
        parts.append(masks.query_mask[b, rows, None])
    counted = None
    for part in parts:
        counted = part if counted is None or part is None else counted & part
    return None if counted is None else ~counted


def _write_scores(parts: Scores, out: Tensor) -> Tensor | None:
    """Write the scores of a block; return the slope of the softcap."""
    key = parts.key
    product = out.view(len(key), -1, key.shape[1])
    torch.baddbmm(product, _by_key_head(parts.query, key), key.mT, beta=0, alpha=parts.scale, out=product)
    slope = None
    if parts.softcap is not None:
        out.div_(parts.softcap).tanh_()
        slope = 1 - out.square()
        out.mul_(parts.softcap)
    if parts.bias is not None:
        out.add_(parts.bias)
    return slope


def _by_key_head(x: Tensor, key: Tensor) -> Tensor:
    """(heads, rows, ...) -> (key heads, heads of each * rows, ...)."""
    return x if len(x) == len(key) else x.reshape(len(key), -1, x.shape[-1])


def _accumulate(grads: _Gradients, parts: Scores, d: Tensor, slope: Tensor | None) -> None:
    """Add up the gradients of a block from that of its scores, which is overwritten."""
    dq, dk, db = grads
    if db is not None:
        db += d.sum_to_size(db.shape)
    if slope is not None:
        d.mul_(slope)
    d = _by_key_head(d, parts.key)
    # Products into tensors of their own: into a gradient whose heads lie apart they'd go head by head, twice as slowly.
    if dq is not None:  # a block has all keys of its rows: there is nothing to add to
        torch.mul(torch.bmm(d, parts.key).view_as(dq), parts.scale, out=dq)
    if dk is not None:
        dk.add_(torch.bmm(d.mT, _by_key_head(parts.query, parts.key)), alpha=parts.scale)
