"""Pearson's correlation along one dimension, with a mask."""

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]


def unchanged(tensor: Tensor) -> Tensor:
    """Sum over one process only."""
    return tensor


def pearson_distance(
    student: Tensor, teacher: Tensor, mask: Tensor, dim: int, total: Total = unchanged
) -> tuple[Tensor, Tensor]:
    """One minus Pearson's correlation of the unmasked entries along a dimension.

    Where there are fewer than two entries, or the teacher's are all equal, no correlation is defined; where only the
    student's are all equal, the distance is 1. The mask is broadcastable; ``total`` extends a sum along ``dim`` over
    further processes. Return the distances, between 0 and 2 (0 where undefined), and where they are defined.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 9.0])
    >>> distance, defined = pearson_distance(x, -x, torch.tensor([True, True, True, False]), 0)
    >>> round(distance.item(), 4), defined.item()
    (2.0, True)
    """
    mask = mask.expand_as(student)
    student, teacher = (torch.where(mask, x, 0) for x in (student, teacher))
    count = total(mask.sum(dim).to(student.dtype))
    size = count.clamp(min=1)

    def summed(values: Tensor) -> Tensor:
        return total(torch.where(mask, values, 0).sum(dim))

    # Shifted by a constant near the mean, which changes no correlation, so that the sums of squares don't cancel. The
    # exact mean is subtracted below: every sum is linear in the entries, as sums over processes need for gradients.
    s = student - (summed(student.detach()) / size).unsqueeze(dim)
    t = teacher - (summed(teacher.detach()) / size).unsqueeze(dim)
    sum_s, sum_t = summed(s), summed(t)
    covariance = summed(s * t) - sum_s * sum_t / size
    var_s = summed(s * s) - sum_s * sum_s / size
    var_t = summed(t * t) - sum_t * sum_t / size
    tiny = (8 * torch.finfo(s.dtype).eps) ** 2
    varies_s = var_s > tiny * summed(student.detach().square()) + torch.finfo(s.dtype).tiny
    varies_t = var_t > tiny * summed(teacher.detach().square()) + torch.finfo(s.dtype).tiny
    # The inner where keeps the square root's infinite gradient at zero out of the backward pass.
    norm = torch.where(varies_s, var_s, 1).sqrt() * torch.where(varies_t, var_t, 1).sqrt()
    correlation = torch.where(varies_s, covariance / norm, 0)
    defined = (count >= 2) & varies_t
    return torch.where(defined, 1 - correlation, 0), defined
