"""Precision, and how values become one number."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ildistil.errors import ObjectiveError
from ildistil.functional.checks import Shapes


@contextmanager
def full_precision(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Leave autocast and widen half-precision tensors to float32.

    >>> with full_precision(torch.ones(2, dtype=torch.bfloat16)) as (x,):
    ...     x.dtype
    torch.float32
    """
    device = tensors[0].device.type
    with torch.autocast(device, enabled=False):
        yield tuple(map(widened, tensors))


def widened(x: Tensor) -> Tensor:
    """Widen half precision to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the examples of the mean over each example's unmasked entries.

    ``1/B' sum_b ( sum_i m_bi v_bi / sum_i m_bi )`` over the ``B'`` examples with any unmasked entry.

    Args:
        values: ``(batch, ...)``.
        mask: boolean, as many dimensions, each as long or 1 but the first; true where an entry counts.

    Returns:
        A scalar; zero (with a gradient of zero) when nothing at all is unmasked.

    Raises:
        ObjectiveError: a tensor has another dtype or shape.

    >>> v = torch.tensor([[1.0, 3.0], [5.0, 100.0], [7.0, 7.0]])
    >>> masked_mean(v, torch.tensor([[True, True], [True, False], [False, False]]))
    tensor(3.5000)
    """
    axes = [f"axis{i}" for i in range(1, values.ndim)]
    shapes = Shapes().floats(" ".join(["batch", *axes]), values=values)
    shapes.masks(" ".join(["batch", *(f"{axis}?" for axis in axes)]), mask=mask)
    return example_mean(*within(values, mask))


def example_mean(values: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of per-example values over the examples that count.

    Args:
        values: ``(batch,)``.
        counts: ``(batch,)``, boolean or the number of entries behind each value; examples with zero are left out.

    Returns:
        A scalar; zero (with a gradient of zero) when no example counts.

    Raises:
        ObjectiveError: a tensor has another shape, or values are no floating-point numbers.

    >>> example_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
    tensor(1.5000)
    """
    Shapes().floats("batch", values=values)
    if counts is None:
        return values.sum() / max(1, len(values))
    if counts.shape != values.shape:
        raise ObjectiveError(f"counts must be of shape (batch) = ({len(values)}), got {tuple(counts.shape)}.")
    present = counts > 0
    return torch.where(present, values, 0).sum() / present.sum().clamp(min=1)


def within(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of each example's unmasked entries, and their number."""
    mask = mask.expand_as(values).flatten(1)
    counts = mask.sum(1)
    # where, not a product: whatever stands in masked places, NaN included, must not reach the sum. For their gradient
    # callers mask what the values are made of, too: behind a NaN even a gradient of zero becomes NaN.
    sums = torch.where(mask, values.flatten(1), 0).sum(1)
    return sums / counts.clamp(min=1), counts


def unit(vectors: Tensor) -> Tensor:
    """Divide vectors by their length; zero vectors stay zero, with a gradient that is not huge.

    >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / torch.where(length > 0, length, 1)


def for_each_head(vectors: Tensor, heads: int) -> Tensor:
    """Repeat the vectors ``(batch, fewer heads, ...)`` that consecutive heads share (grouped-query attention)."""
    groups = heads // vectors.shape[1]
    return vectors if groups == 1 else vectors.repeat_interleave(groups, dim=1)


def kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return ``sum t (log t - log s)`` over the last dimension."""
    return (log_t.exp() * (log_t - log_s)).sum(-1)
