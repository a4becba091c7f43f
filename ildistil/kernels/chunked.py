"""Losses on a language model's logits, made a few rows at a time: all rows of a vocabulary are large."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Elements of one chunk of logits, on a CPU and elsewhere. On a CPU 2**21 to 2**23 are equally fast, larger ones slower;
# a GPU wants larger matrix products: how large hasn't been measured.
_CHUNK, _CHUNK_ELSEWHERE = 2**22, 2**25


def summed(
    values: Callable[[Tensor, slice], Tensor],
    logits: Callable[[Tensor], Tensor],
    layer: nn.Module,
    states: Tensor,
) -> Tensor:
    """Sum a loss over the rows of ``logits(states)``, of which only one chunk exists at a time.

    ``sum_i values(logits(states_i), i)``. One pass gives the value and the gradients of the states and the layer's
    parameters; nothing of the size of the vocabulary is kept but the parameters' own gradients. Without any row it is
    zero, with gradients of zero.

    Args:
        values: computes the losses ``(rows,)`` of some logits ``(rows, vocabulary)``, and is given which rows they are.
        logits: makes logits of states, row by row.
        layer: has the parameters that it uses, the largest as long as a row of logits.
        states: ``(rows, width)``.

    >>> layer = nn.Linear(2, 3)
    >>> states = torch.randn(5, 2)
    >>> whole = layer(states).logsumexp(-1).sum()
    >>> torch.allclose(summed(lambda logits, rows: logits.logsumexp(-1), layer, layer, states), whole)
    True
    """
    parameters = [p for p in layer.parameters() if p.requires_grad]
    vocabulary = max((len(p) for p in layer.parameters() if p.ndim), default=1)
    rows = max(1, (_CHUNK if states.device.type == "cpu" else _CHUNK_ELSEWHERE) // vocabulary)
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in (states, *parameters))
    value: Tensor = _Summed.apply(values, logits, rows, wants, states, *parameters)  # type: ignore[no-untyped-call]
    return value


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Callable[[Tensor, slice], Tensor], logits: Callable[[Tensor], Tensor], rows: int,
        wants: bool, states: Tensor, *parameters: Tensor,
    ) -> Tensor:  # fmt: skip
        whole = torch.zeros((), device=states.device, dtype=torch.promote_types(states.dtype, torch.float32))
        # Many chunks are added up, which half precision can't.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters if wants]
        of_states = torch.zeros_like(states) if wants else None
        for start in range(0, len(states), rows):
            part = slice(start, min(start + rows, len(states)))
            with torch.set_grad_enabled(wants):
                own = states[part].detach().requires_grad_(wants)
                made = logits(own)
                # A sum over rows may be too large for float16, and no loss scale reaches it here.
                shrink = 32.0 if made.dtype == torch.float16 else 1.0
                value = values(made, part).sum() / shrink
            whole += value.detach() * shrink
            if of_states is not None:
                gradient, *others = torch.autograd.grad(value, [own, *parameters])
                of_states[part] = gradient * shrink
                for sum_, gradient in zip(sums, others, strict=True):
                    sum_.add_(gradient, alpha=shrink)
        gradients = [s.to(p.dtype) for s, p in zip(sums, parameters, strict=False)]
        ctx.save_for_backward(*([] if of_states is None else [of_states, *gradients]))
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("A loss on chunks of logits has no second derivative.")
        return None, None, None, None, *(gradient * grad for gradient in ctx.saved_tensors)
