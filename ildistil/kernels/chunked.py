"""Losses on a language model's logits, made a few rows at a time: all rows of a vocabulary are large."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["summed"]

# Elements of one chunk of logits, on a CPU and elsewhere. On a CPU 2**21 to 2**23 are equally fast, larger ones slower;
# a GPU wants larger matrix products: how large hasn't been measured.
_CHUNK, _CHUNK_ELSEWHERE = 2**22, 2**25


def summed(values: Callable[[Tensor, slice], Tensor], layer: nn.Module, states: Tensor, vocabulary: int) -> Tensor:
    """Sum a loss over the rows of ``layer(states)``, of which only one chunk exists at a time.

    ``sum_i values(layer(states_i), i)``. One pass gives the value and the gradients of the states and the layer's
    parameters; nothing of the size of the vocabulary is kept but the parameters' own gradients.

    Args:
        values: gives the losses ``(rows,)`` of some rows of logits ``(rows, vocabulary)``; also told which rows.
        layer: makes logits of states, row by row.
        states: ``(rows, width)``.
        vocabulary: number of logits of a row; decides how many rows make a chunk.

    Returns:
        A scalar; zero (with gradients of zero) where there is no row.

    >>> layer = nn.Linear(2, 3)
    >>> states = torch.randn(5, 2)
    >>> whole = layer(states).logsumexp(-1).sum()
    >>> torch.allclose(summed(lambda logits, rows: logits.logsumexp(-1), layer, states, 3), whole)
    True
    """
    parameters = [p for p in layer.parameters() if p.requires_grad]
    rows = max(1, (_CHUNK if states.device.type == "cpu" else _CHUNK_ELSEWHERE) // vocabulary)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (states, *parameters))
    value: Tensor = _Summed.apply(values, layer, rows, wants, states, *parameters)  # type: ignore[no-untyped-call]
    return value


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Callable[[Tensor, slice], Tensor], layer: nn.Module, rows: int, wants: bool,
        states: Tensor, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        whole = torch.zeros((), device=states.device, dtype=torch.promote_types(states.dtype, torch.float32))
        gradients = [torch.zeros_like(x) for x in (states, *parameters)] if wants else []
        for start in range(0, len(states), rows):
            part = slice(start, min(start + rows, len(states)))
            with torch.set_grad_enabled(wants):
                own = states[part].detach().requires_grad_(wants)
                value = values(layer(own), part).sum()
            whole += value.detach()
            if wants:
                of_states, *others = torch.autograd.grad(value, [own, *parameters])
                gradients[0][part] = of_states
                for sum_, gradient in zip(gradients[1:], others, strict=True):
                    sum_ += gradient
        ctx.save_for_backward(*gradients)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("A loss on chunks of logits has no second derivative.")
        return None, None, None, None, *(gradient * grad for gradient in ctx.saved_tensors)
