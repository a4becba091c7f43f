"""Sums and rows of the whole batch, over all processes, for losses that compare examples with each other.

Every process computes the same loss of the whole batch; only its own examples carry a gradient. Data-parallel training
averages gradients over the processes, where these have to be added, so the gradients are multiplied by their number.
"""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "all_reduce_max", "all_reduce_sum", "world_size"]


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor over the processes.

    >>> all_reduce_sum(torch.ones(2))
    tensor([1., 1.])
    """
    if world_size() == 1:
        return tensor
    whole = tensor.detach().clone()
    dist.all_reduce(whole)
    return whole + _for_mean(tensor)


def all_gather(rows: Tensor) -> Tensor:
    """Stack the rows of all processes, which may have different numbers of them, in the order of ranks.

    >>> all_gather(torch.tensor([[1.0], [2.0]]))
    tensor([[1.],
            [2.]])
    """
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = int(torch.cat(counts).max())
    padded = torch.cat([rows.detach(), rows.new_zeros(most - len(rows), *rows.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    whole = [part[: int(count)] for part, count in zip(parts, counts, strict=True)]
    if rows.requires_grad:
        whole[dist.get_rank()] = whole[dist.get_rank()] + _for_mean(rows)
    return torch.cat(whole)


def all_reduce_max(length: int, device: torch.device) -> int:
    """Return the greatest length among the processes."""
    if world_size() == 1:
        return length
    number = torch.tensor([length], device=device)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def _for_mean(tensor: Tensor) -> Tensor:
    """Zero, with the gradient of this process's part for a mean over the processes."""
    return world_size() * (tensor - tensor.detach()) if tensor.requires_grad else torch.zeros_like(tensor)
