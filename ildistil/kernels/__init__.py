"""Losses on attention, from what scores are made of; in ``chunked``, losses that never hold a vocabulary's logits.

The one place that chooses how a loss is computed; all backends give the values and gradients of
:mod:`ildistil.functional`:

- :func:`attention_kl` goes over blocks of heads and query rows, in plain torch or as Triton kernels. The gradient of a
  row's divergence with respect to the student's scores is ``p_S - p_T``: there is no need to keep any map.
- :func:`attention_mse` needs no scores at all where these are products and only padding is masked: matrices of the size
  of a head say it all, in time linear in the number of tokens. Else it goes over blocks too.
- :func:`attention_dist`, :func:`attention_dist_over_batch`, :func:`attention_output`, and numbers of heads that differ,
  make whole maps.

All are exact under padding, wherever it stands, whatever stands there. :class:`use` sets the backend. The Triton
kernels are tested in Triton's interpreter; how fast they are on a GPU hasn't been measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ildistil import functional
from ildistil.attention import Masks, Scores, allowed_map, real_tokens, score_map
from ildistil.functional.attention import Over
from ildistil.functional.checks import Shapes
from ildistil.functional.correlation import Total, unchanged
from ildistil.functional.reduction import widened
from ildistil.kernels import blockwise, gram
from ildistil.kernels.choice import Backend, choose_backend, is_short, triton_suits, use
from ildistil.kernels.spans import pairs

__all__ = [
    "Backend",
    "Masks",
    "Scores",
    "attention_dist",
    "attention_dist_over_batch",
    "attention_kl",
    "attention_mse",
    "attention_output",
    "use",
]


def attention_kl(student: Scores, teacher: Scores, masks: Masks = Masks()) -> Tensor:  # noqa: B008
    """Kullback-Leibler divergence of the attention distributions, teacher first, without score maps.

    ``1/(H n) sum_h sum_i KL(softmax(a_T,hi) || softmax(a_S,hi))`` over the ``n`` real queries of each example. Numbers
    of heads that differ are merged as in :func:`ildistil.functional.attention_kl`, from whole maps.

    Args:
        student: what the student's scores are made of; queries, keys and bias may want gradients.
        teacher: the same of the teacher, whose head size may differ; gets no gradient.
        masks: which scores count.

    Returns:
        ``(batch,)``, in nats.

    Raises:
        KernelError: a backend was asked for that can't run here, see :class:`use`.
        ObjectiveError: a tensor has another dtype or shape.

    >>> import torch
    >>> q, k = torch.ones(1, 1, 1, 1), torch.tensor([[[[0.0], [0.0]]]])
    >>> attention_kl(Scores(q, k), Scores(q, torch.tensor([[[[0.0], [-1e9]]]])))
    tensor([0.6931])
    """
    _check(student, teacher, masks)
    same_heads = student.heads == teacher.heads
    backend = choose_backend(student, has_triton_kernel=same_heads and triton_suits(student, teacher))
    if backend == "plain" or not same_heads:
        return functional.attention_kl(*_maps(student, teacher, masks))
    if backend == "triton":
        from ildistil.kernels.triton_kl import divergences  # Triton need not be installed
    else:
        from ildistil.kernels.blockwise import divergences
    sums: Tensor = divergences(student, teacher, masks)
    return sums / (student.heads * real_tokens(masks.query_mask, student.query).sum(1)).clamp(min=1)


def attention_mse(student: Scores, teacher: Scores, masks: Masks = Masks()) -> Tensor:  # noqa: B008
    """Mean squared error of attention scores, in time linear in the number of tokens wherever that is possible.

    ``1/(H N) sum_h sum_(i,j) (a_S,hij - a_T,hij)^2`` over the ``N`` pairs of a real query and a key it may attend to.
    The arguments, and what it raises, are those of :func:`attention_kl`, with equal numbers of heads.

    Returns:
        ``(batch,)``, in squared units of the scores.

    >>> import torch
    >>> q, k = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1)
    >>> attention_mse(Scores(q, k), Scores(q, 3 * k))
    tensor([4.])
    """
    _check(student, teacher, masks, equal_heads=True)
    linear = gram.suits(student, teacher, masks)
    if choose_backend(student, linear=linear) == "plain":
        if linear and is_short(student):  # where scores are nearly the same, as exact as by Gram matrices
            wide = _maps(student.to(torch.float64), teacher.to(torch.float64), masks)
            return functional.attention_mse(*wide).to(widened(student.query).dtype)
        return functional.attention_mse(*_maps(student, teacher, masks))
    sums: Tensor = (gram if linear else blockwise).squared_errors(student, teacher, masks)
    return sums / (student.heads * pairs(student, masks)).clamp(min=1)


def attention_dist(
    student: Scores,
    teacher: Scores,
    masks: Masks = Masks(),  # noqa: B008
    over: Over = "tokens",
) -> tuple[Tensor, Tensor]:
    """Pearson distance of attention probabilities, see :func:`ildistil.functional.attention_dist`.

    The arguments are those of :func:`attention_kl`, and ``over``, which is ``"tokens"`` or ``"heads"``.

    Returns:
        The mean distance of each example, and of how many correlations it is the mean, both ``(batch,)``.
    """
    _check(student, teacher, masks)
    return functional.attention_dist(*_maps(student, teacher, masks), over)


def attention_dist_over_batch(
    student: Scores,
    teacher: Scores,
    masks: Masks = Masks(),  # noqa: B008
    positions: int = 0,
    total: Total = unchanged,
) -> Tensor:
    """Pearson distance over the batch, see :func:`ildistil.functional.attention_dist_over_batch`, a scalar.

    The arguments are those of :func:`attention_kl`, and for several processes the number of ``positions`` to fill up
    to, the same in all, and ``total``, which extends a sum over them.
    """
    _check(student, teacher, masks)
    s, t, allowed, real = _maps(student, teacher, masks)
    more = max(0, positions - s.shape[-1])
    s, t, allowed = (F.pad(x, (0, more, 0, more)) for x in (s, t, allowed))
    return functional.attention_dist_over_batch(s, t, allowed, F.pad(real, (0, more)), total)


def attention_output(scores: Scores, value: Tensor, masks: Masks = Masks()) -> Tensor:  # noqa: B008
    """Average the values by the attention probabilities, see :func:`ildistil.functional.attention_output`.

    Args:
        scores: what the scores are made of.
        value: ``(batch, value heads, keys, size)``.
        masks: which scores count.

    Returns:
        ``(batch, queries, heads * size)``.
    """
    _check(scores, scores, masks)
    return functional.attention_output(score_map(scores, masks), value, allowed_map(scores.query, scores.key, masks))


def _check(student: Scores, teacher: Scores, masks: Masks, equal_heads: bool = False) -> None:
    """Refuse what would be broadcast, or compared halfway."""
    shapes = Shapes()
    for side, scores, heads in (
        ("student", student, "heads"),
        ("teacher", teacher, "heads" if equal_heads else "heads_t"),
    ):
        shapes.floats(f"batch {heads} queries size_{side}", **{f"{side}.query": scores.query})
        shapes.floats(f"batch key_heads_{side} keys size_{side}", **{f"{side}.key": scores.key})
    for name, mask, tokens in (("query_mask", masks.query_mask, "queries"), ("key_mask", masks.key_mask, "keys")):
        if mask is not None:
            shapes.masks(f"batch {tokens}", **{name: mask})


def _maps(student: Scores, teacher: Scores, masks: Masks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scores of both, what both may attend to, and which queries are real."""
    allowed, real = allowed_map(student.query, student.key, masks), real_tokens(masks.query_mask, student.query)
    return score_map(student, masks), score_map(teacher.detach(), masks), allowed, real
