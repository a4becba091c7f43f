"""The squared error of attention scores without scores: matrices of head size by head size, in time linear in tokens.

The error ``E = a_S - a_T`` of a head is a sum of two products of tall matrices. With ``c = scale_T / scale_S``::

    E / scale_S = q_S k_S^T - c q_T k_T^T                      where the sizes of the heads differ,
                = (q_S - c q_T) k_S^T + c q_T (k_S - k_T)^T    where they are equal.

The second form's terms are small where both are close. The squared norm of ``A_1 B_1^T + c A_2 B_2^T`` is
``<A_1^T A_1, B_1^T B_1> + 2c <A_1^T A_2, B_1^T B_2> + c^2 <A_2^T A_2, B_2^T B_2>``, and its gradients ``2 E k_S`` and
``2 E^T q_S`` are products with the same small matrices.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ildistil.attention import Masks, Scores, zeroed
from ildistil.functional.reduction import for_each_head
from ildistil.kernels.choice import refuse_second_derivative
from ildistil.kernels.spans import spans

# An example, or all of them, and the spans of its queries and keys.
_Place = tuple[int | slice, slice, slice]
# Below this part of the sum's greatest possible value its terms cancel too much for float32.
_CANCELLED = 1e-2


def suits(student: Scores, teacher: Scores, masks: Masks) -> bool:
    """Return whether the scores are products, and nothing but padding is masked."""
    plain = all(x.bias is None and x.softcap is None for x in (student, teacher))
    return plain and not masks.causal and masks.window is None


def squared_errors(student: Scores, teacher: Scores, masks: Masks) -> Tensor:
    """Sum of the squared errors of the scores: ``(batch,)``.

    On CUDA in float64, so that the host need not wait to learn whether the terms cancel; else only where they do.
    """
    with torch.autocast(student.query.device.type, enabled=False):
        student = student.full_precision()
        teacher = teacher.detach().to(student.query.dtype)
        keys = student.key, teacher.key
        if keys[0].shape[1] != keys[1].shape[1]:  # shared otherwise
            keys = for_each_head(keys[0], student.heads), for_each_head(keys[1], teacher.heads)
        vectors = student.query, keys[0], teacher.query, keys[1]
        ratio, device = teacher.scale / student.scale, student.query.device.type
        if device != "cuda":
            sums, terms = _SquaredError.apply(*vectors, ratio, masks)  # type: ignore[no-untyped-call]
        if device == "cuda" or (device != "mps" and bool((sums < _CANCELLED * terms).any())):
            sums, _ = _SquaredError.apply(*(x.double() for x in vectors), ratio, masks)  # type: ignore[no-untyped-call]
        values: Tensor = (sums.clamp(min=0) * student.scale**2).to(student.query.dtype)
        return values


class _Factors(NamedTuple):
    """The factors of ``E / scale_S = A_1 B_1^T + c A_2 B_2^T`` for one example, or for all at once."""

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    c: float

    @classmethod
    def of(cls, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, ratio: float) -> "_Factors":
        if q_s.shape[-1] == q_t.shape[-1]:
            return cls(torch.sub(q_s, q_t, alpha=ratio), q_t, k_s, k_s - k_t, ratio)
        return cls(q_s, q_t, k_s, k_t, -ratio)

    def grams(self) -> list[Tensor]:
        """Return ``A_i^T A_j`` and ``B_i^T B_j``, both for 11, 12 and 22."""
        return [x.mT @ y for one, two in (self[:2], self[2:4]) for x, y in ((one, one), (one, two), (two, two))]

    def gradients(self, matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return ``E k_S`` and ``E^T q_S``, with whatever factor the matrices have."""
        dq = (self.a1 @ matrices[0]).add_(self.a2 @ matrices[1])
        dk = (self.b1 @ matrices[2]).add_(self.b2 @ matrices[3])
        return dq, dk


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, ratio: float, masks: Masks
    ) -> tuple[Tensor, Tensor]:
        ctx.ratio, ctx.masks = ratio, masks
        factors = [x for _, x in _factors(q_s, k_s, q_t, k_t, ratio, masks)]
        every = zip(*(x.grams() for x in factors), strict=True)
        grams = (torch.stack(x).view(len(q_s), *x[0].shape[-3:]) for x in every)
        norms, sizes, matrices = _combined(*grams, c=factors[0].c)
        ctx.save_for_backward(q_s, k_s, q_t, k_t, *matrices)
        ctx.mark_non_differentiable(sizes)
        return norms, sizes

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The squared error by Gram matrices")
        q_s, k_s, q_t, k_t, *matrices = ctx.saved_tensors
        weighted = [x * (2 * grad[:, None, None, None]) for x in matrices]
        dq, dk = torch.zeros_like(q_s), torch.zeros_like(k_s)
        for (b, rows, columns), factors in _factors(q_s, k_s, q_t, k_t, ctx.ratio, ctx.masks):
            dq[b, :, rows], dk[b, :, columns] = factors.gradients([x[b] for x in weighted])
        return dq, dk, None, None, None, None


def _factors(
    q_s: Tensor, k_s: Tensor, q_t: Tensor, k_t: Tensor, ratio: float, masks: Masks
) -> Iterator[tuple[_Place, _Factors]]:
    """Yield where examples lie and their factors: on a CPU one by one, which spares padding and copies."""
    rows, query_mask = spans(masks.query_mask, q_s)
    columns, key_mask = spans(masks.key_mask, k_s)
    q_s, q_t = (zeroed(x, query_mask) for x in (q_s, q_t))
    k_s, k_t = (zeroed(x, key_mask) for x in (k_s, k_t))
    if q_s.device.type == "cpu":
        places: list[_Place] = list(zip(range(len(q_s)), rows, columns, strict=True))
    else:
        places = [(slice(None), slice(None), slice(None))]
    for b, r, c in places:
        yield (b, r, c), _Factors.of(q_s[b, :, r], k_s[b, :, c], q_t[b, :, r], k_t[b, :, c], ratio)


def _combined(
    a11: Tensor, a12: Tensor, a22: Tensor, b11: Tensor, b12: Tensor, b22: Tensor, *, c: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the squared norms, the sums of their absolute terms, and the matrices of the gradients.

    These are ``B_1^T k_S``, ``c B_2^T k_S``, ``A_1^T q_S`` and ``c A_2^T q_S``, of which ``k_S = B_1``.
    """
    groups = a11.shape[1] // b11.shape[1]
    if groups > 1:
        b11, b12, b22 = (x.repeat_interleave(groups, 1) for x in (b11, b12, b22))
    terms = a11 * b11, (2 * c) * a12 * b12, (c * c) * a22 * b22
    norms, sizes = terms[0].sum((1, 2, 3)), terms[0].abs().sum((1, 2, 3))
    for term in terms[1:]:
        norms, sizes = norms + term.sum((1, 2, 3)), sizes + term.abs().sum((1, 2, 3))
    # q_S is A_1 + c A_2 in the form with differences, where c is positive, and A_1 in the other one.
    a_q = (a11 + c * a12, a12.mT + c * a22) if c > 0 else (a11, a12.mT)
    if groups > 1:
        a_q = (_sum_of_groups(a_q[0], groups), _sum_of_groups(a_q[1], groups))
    return norms, sizes, [b11, c * b12.mT, a_q[0], c * a_q[1]]


def _sum_of_groups(matrices: Tensor, groups: int) -> Tensor:
    return matrices.view(len(matrices), -1, groups, *matrices.shape[2:]).sum(2)
