"""Every trainable parameter takes part in every backward pass, as plain ``ddp`` needs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ildistil import distributed


class Reach:
    """Knows which parameters each term reaches, and gives those that the active terms don't reach zero gradients.

    DDP waits for the gradient of every parameter that requires one, and in a stage some have none.
    """

    def __init__(self) -> None:
        self.of: dict[str, set[int]] = {}  # parameters that each term reaches, by id; empty while unknown
        self._attached: list[nn.Parameter] = []

    def attach(self, values: dict[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """Return the values of the terms, of which the first has gradients of zero for what none of them reaches."""
        self._attached = []
        if distributed.world_size() == 1 or not self.of or not torch.is_grad_enabled():
            return values
        reached = set().union(*(self.of.get(name, set()) for name in values))
        self._attached = [p for p in parameters if p.requires_grad and id(p) not in reached]
        first, *others = values
        attached: Tensor = _Attach.apply(values[first], *self._attached)  # type: ignore[no-untyped-call]
        return {first: attached, **{name: values[name] for name in others}}

    def drop(self) -> None:
        """Unset the zero gradients, before the optimiser lets their parameters decay."""
        for parameter in self._attached:
            parameter.grad = None


class _Attach(torch.autograd.Function):
    """Pass a value on, and give zero gradients to parameters that it doesn't depend on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (*gradients, *(torch.zeros_like(p) for p in ctx.saved_tensors))
