"""Refuse losses that aren't finite, with one look for each optimiser step: every look waits for the device."""

from typing import Any

import torch
from torch import Tensor

from ildistil import distributed
from ildistil.engine import Terms
from ildistil.errors import NotFiniteError

__all__ = ["FiniteLosses"]


class FiniteLosses:
    """Keeps the losses of the batches that aren't applied yet."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, dict[str, Tensor], Any]] = []  # total, terms, row ids

    def abandon(self) -> None:
        """Forget the batches of a step that never ended."""
        self._waiting = []

    def add(self, terms: Terms, rows: Any) -> None:
        """Note the terms of a batch, and its row ids for the message."""
        values = {name: value.detach() for name, value in terms.values.items()}
        self._waiting.append((terms.total.detach(), values, rows))

    def check(self, step: int, epoch: int) -> None:
        """Look at all batches of an optimiser step.

        Args:
            step: its number, for the message.
            epoch: its epoch.

        Raises:
            NotFiniteError: a total isn't finite, in any process: all stop together, since the others would apply the
                gradients that this one has spoilt.
        """
        batches, self._waiting = self._waiting, []
        if not batches:
            return  # a step that a subclass makes by itself
        finite = torch.stack([torch.isfinite(total) for total, _, _ in batches])
        if distributed.all_reduce_sum((~finite).sum()) == 0:
            return
        which, what = "", "in another process"
        for total, values, rows in batches:
            if not torch.isfinite(total):
                which = f", row ids {rows.tolist()}" if isinstance(rows, Tensor) else ""
                bad = {name: value for name, value in values.items() if not torch.isfinite(value)} or {"total": total}
                what = ", ".join(f"{name} = {value.item()}" for name, value in bad.items())
                break
        raise NotFiniteError(
            f"The loss is not finite at step {step} (epoch {epoch}{which}): {what}. Nothing of this step was applied. "
            "Try a lower learning rate, gradient clipping, or bf16 instead of fp16."
        )
