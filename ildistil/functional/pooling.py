"""One vector for each example, of the states of its tokens."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ildistil.functional.checks import Shapes, check_choice
from ildistil.functional.reduction import full_precision

Pooling = Literal["first", "last", "mean"]


def first_token(states: Tensor, mask: Tensor) -> Tensor:
    """Take the state of each example's first real token, wherever the padding stands.

    Arguments, what it returns and raises are as in :func:`pool`.

    >>> first_token(torch.tensor([[[9.0], [1.0], [2.0]]]), torch.tensor([[False, True, True]]))
    tensor([[1.]])
    """
    _check(states, mask)
    return _at(mask.int().argmax(1), states, mask)


def last_token(states: Tensor, mask: Tensor) -> Tensor:
    """Take the state of each example's last real token, wherever the padding stands.

    Arguments, what it returns and raises are as in :func:`pool`.

    >>> last_token(torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[True, True, False]]))
    tensor([[2.]])
    """
    _check(states, mask)
    return _at(mask.shape[1] - 1 - mask.flip(1).int().argmax(1), states, mask)


def token_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Average the states of each example's real tokens.

    Arguments, what it returns and raises are as in :func:`pool`.

    >>> token_mean(torch.tensor([[[9.0], [1.0], [2.0]]]), torch.tensor([[False, True, True]]))
    tensor([[1.5000]])
    """
    _check(states, mask)
    with full_precision(states) as (x,):
        return torch.where(mask.unsqueeze(-1), x, 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Make one vector for each example, of its first token, its last one, or the mean of all.

    Args:
        states: ``(batch, tokens, width)``.
        mask: boolean ``(batch, tokens)``, true where a token is real.
        pooling: ``"first"``, ``"last"`` or ``"mean"``.

    Returns:
        ``(batch, width)``; zeros for an example without a real token.

    Raises:
        ConfigError: there is no such pooling.
        ObjectiveError: a tensor has another dtype or shape.

    >>> pool(torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[True, True, False]]), "last")
    tensor([[2.]])
    """
    check_choice("pooling", pooling, _POOLINGS)
    return _POOLINGS[pooling](states, mask)


_POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "first": first_token, "last": last_token, "mean": token_mean,
}  # fmt: skip


def _check(states: Tensor, mask: Tensor) -> None:
    Shapes().floats("batch tokens width", states=states).masks("batch tokens", mask=mask)


def _at(positions: Tensor, states: Tensor, mask: Tensor) -> Tensor:
    chosen = states[torch.arange(len(mask), device=mask.device), positions]
    return torch.where(mask.any(1, keepdim=True), chosen, 0)
