"""Losses on hidden states."""

import torch
from torch import Tensor

from ildistil.functional.checks import Shapes
from ildistil.functional.correlation import Total, unchanged
from ildistil.functional.pooling import first_token
from ildistil.functional.reduction import full_precision, unit, within


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of hidden states over tokens and features.

    ``1/(n d) sum_i ||h_S,i - h_T,i||^2`` over the ``n`` unmasked tokens of each example.

    Args:
        student: ``(batch, tokens, width)``.
        teacher: ``(batch, tokens, width)``.
        mask: boolean ``(batch, tokens)``, true where a token is real.

    Returns:
        ``(batch,)``.

    Raises:
        ObjectiveError: a tensor has another dtype or shape.

    Source: Jiao et al., "TinyBERT", 2020 (there without the mask).

    >>> mask = torch.tensor([[True, False]])
    >>> hidden_mse(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 2.0), mask)
    tensor([4.])
    """
    _check(student, teacher, mask)
    with full_precision(student, teacher) as (s, t):
        return within(torch.where(mask.unsqueeze(-1), s - t, 0).square().mean(-1), mask)[0]


def hidden_cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cosine distance of hidden states over tokens.

    ``1/n sum_i (1 - cos(h_S,i, h_T,i))`` over the ``n`` unmasked tokens of each example; the distance to a zero vector
    is 1. Arguments and errors are those of :func:`hidden_mse`.

    Returns:
        ``(batch,)``, between 0 and 2.

    Source: Sanh et al., "DistilBERT", 2019.

    >>> hidden_cosine(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]]), torch.tensor([[True]]))
    tensor([1.])
    """
    _check(student, teacher, mask)
    with full_precision(student, teacher) as (s, t):
        s, t = (unit(torch.where(mask.unsqueeze(-1), x, 0)) for x in (s, t))
        return within(1 - (s * t).sum(-1), mask)[0]


def cls_mse(student: Tensor, teacher: Tensor, mask: Tensor, normalize: bool = False) -> Tensor:
    """Squared error of the first real token's hidden state.

    ``1/d ||h_S,1 - h_T,1||^2``; with ``normalize`` ``||h_S,1 / ||h_S,1|| - h_T,1 / ||h_T,1|| ||^2``. The first token is
    the first one that the mask lets count. Other arguments and errors are those of :func:`hidden_mse`.

    Returns:
        ``(batch,)``.

    Source: Sun et al., "Patient Knowledge Distillation", 2019 (normalised).

    >>> states = torch.tensor([[[9.0, 9.0], [1.0, 3.0]]])
    >>> cls_mse(torch.zeros(1, 2, 2), states, torch.tensor([[False, True]]))
    tensor([5.])
    """
    _check(student, teacher, mask)
    with full_precision(student, teacher) as (s, t):
        s, t = first_token(s, mask), first_token(t, mask)
        if normalize:
            return (unit(s) - unit(t)).square().sum(-1)
        return (s - t).square().mean(-1)


def hidden_cka(student: Tensor, teacher: Tensor, mask: Tensor, total: Total = unchanged) -> Tensor:
    """One minus the linear centred kernel alignment of the hidden states of all real tokens of a batch.

    ``1 - ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F)`` with the tokens as rows of ``X`` (student) and ``Y`` (teacher),
    the mean row subtracted. Computed in feature space: nothing of size tokens x tokens is made.

    Args:
        student: ``(batch, tokens, width)``.
        teacher: ``(batch, tokens, width)``; the widths may differ.
        mask: boolean ``(batch, tokens)``, true where a token is real.
        total: extends a sum over the batch over further processes.

    Returns:
        A scalar, between 0 and 1; 0 where all of the teacher's states are equal, 1 where only the student's are.

    Raises:
        ObjectiveError: a tensor has another dtype or shape.

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", 2019.

    >>> states = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    >>> hidden_cka(states, 3 * states, torch.tensor([[True, True, False]])).abs().round(decimals=4)
    tensor(0.)
    """
    shapes = Shapes().floats("batch tokens width", student=student)
    shapes.floats("batch tokens teacher_width", teacher=teacher).masks("batch tokens", mask=mask)
    with full_precision(student, teacher) as (s, t):
        keep = mask.unsqueeze(-1)
        count = total(mask.sum().to(s.dtype)).clamp(min=1)
        s, t = (torch.where(keep, x, 0).flatten(0, 1) for x in (s, t))
        raw_s, raw_t = (total(x.detach().square().sum()) for x in (s, t))
        # A constant shift near the mean keeps the sums from cancelling; the exact mean goes off in the Gram matrices,
        # which are sums over tokens, as sums over processes need for gradients.
        row = mask.flatten().unsqueeze(-1).to(s.dtype)
        s, t = ((x - total(x.detach().sum(0)) / count) * row for x in (s, t))
        # States that are all equal leave no more than the rounding errors of their mean.
        var_s, var_t = (total(x.detach().square().sum()) for x in (s, t))
        rounding = (8 * torch.finfo(s.dtype).eps) ** 2
        varies_s, varies_t = var_s > rounding * raw_s, var_t > rounding * raw_t
        # The ratio doesn't know the scale; states of large norm would overflow in the fourth power.
        s, t = s / torch.where(varies_s, var_s, 1).sqrt(), t / torch.where(varies_t, var_t, 1).sqrt()
        sum_s, sum_t = total(s.sum(0)), total(t.sum(0))

        def gram(x: Tensor, y: Tensor, sum_x: Tensor, sum_y: Tensor) -> Tensor:
            return (total(x.T @ y) - torch.outer(sum_x, sum_y) / count).square().sum()

        cross, own, theirs = gram(s, t, sum_s, sum_t), gram(s, s, sum_s, sum_s), gram(t, t, sum_t, sum_t)
        # Where both vary, the traces are 1, and these at least 1 / width.
        similarity = cross / (torch.where(varies_s, own, 1) * torch.where(varies_t, theirs, 1)).sqrt()
        return torch.where(varies_t, 1 - torch.where(varies_s, similarity, 0), 0)


def _check(student: Tensor, teacher: Tensor, mask: Tensor) -> None:
    Shapes().floats("batch tokens width", student=student, teacher=teacher).masks("batch tokens", mask=mask)
