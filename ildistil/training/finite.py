"""Refuse steps that aren't finite, with one look for each optimiser step: every look waits for the device."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ildistil import distributed
from ildistil.engine import Terms, all_finite, look_finite
from ildistil.errors import ConfigError, NotFiniteError

__all__ = ["MOST_IN_SUCCESSION", "FiniteSteps", "NonFinite"]

NonFinite = Literal["stop", "skip"]

#: So many skipped steps in succession are no accident: the weights, or all of the data, are spoilt.
MOST_IN_SUCCESSION = 100
# Batches of a step that are kept to find the term by: a long accumulation must not fill the memory.
_KEPT = 8
_REMEDY = "Try a lower learning rate, gradient clipping, or bf16 instead of fp16."


class _Batch(NamedTuple):
    total: Tensor
    terms: dict[str, Tensor]
    rows: Any


class FiniteSteps:
    """Keeps what the batches of a step gave until it is applied, and finds out whether it can be.

    Args:
        non_finite: what happens to a step with a loss or a gradient that isn't finite: ``"stop"`` ends the training,
            ``"skip"`` leaves the step out.

    Attributes:
        skipped: how many steps were left out since the training started or was resumed.

    Raises:
        ConfigError: there is no such choice.
    """

    def __init__(self, non_finite: NonFinite = "stop") -> None:
        if non_finite not in get_args(NonFinite):
            raise ConfigError(f"non_finite must be one of {get_args(NonFinite)}, got {non_finite!r}.")
        self.non_finite = non_finite
        self.skipped = self._in_succession = 0
        self._told = False
        self.abandon()

    def abandon(self) -> None:
        """Forget the batches of a step that never ended."""
        self._waiting: list[_Batch] = []
        self._inputs: deque[dict[str, Tensor]] = deque(maxlen=_KEPT)

    def add(self, terms: Terms, batch: Mapping[str, Any]) -> None:
        """Note the terms of a batch, and what to find a spoilt gradient by."""
        values = {name: value.detach() for name, value in terms.values.items()}
        self._waiting.append(_Batch(terms.total.detach(), values, batch.get("row_id")))
        self._inputs.append({name: value for name, value in batch.items() if isinstance(value, Tensor)})

    def check(
        self,
        gradients: Sequence[Tensor],
        step: int,
        epoch: int,
        spoilt: Callable[[Mapping[str, Tensor]], list[str]],
        scale: Callable[[], float] | None,
    ) -> bool:
        """Look at all losses and gradients of an optimiser step, once.

        Args:
            gradients: what is about to be applied, unscaled.
            step: its number, for the message.
            epoch: its epoch.
            spoilt: names the terms of a batch whose gradient isn't finite.
            scale: the factor of float16 losses; ``None`` where there is none.

        Returns:
            Whether to go on with the step; the same in all processes, since a spoilt part spoils the whole.

        Raises:
            NotFiniteError: a loss or gradient isn't finite in some process, and such steps aren't skipped, or too many
                were.
        """
        batches, inputs = self._waiting, list(self._inputs)
        self.abandon()
        losses = [torch.isfinite(batch.total) for batch in batches]
        if _everywhere(look_finite(gradients), *losses) or _everywhere(all_finite(gradients), *losses):
            self._in_succession = 0
            return True
        lost = bool(losses) and not _everywhere(*losses)
        factor = None if lost or scale is None else scale()
        self.skipped += 1
        if factor is not None and factor > 1:
            return True  # too large for float16 at this scale: the scaler leaves the step out, and lowers the scale
        self._in_succession += 1
        goes_on = self.non_finite == "skip" and self._in_succession < MOST_IN_SUCCESSION
        if goes_on and self._told:
            return False
        rows, what = _of_loss(batches) if lost else _of_gradient(batches, inputs, spoilt)
        ids = f", row ids {rows}" if rows else ""
        found = f"The {'loss' if lost else 'gradient'} is not finite at step {step} (epoch {epoch}{ids}){what}."
        if not goes_on:
            tried = f" It is number {self._in_succession} in succession." if self.non_finite == "skip" else ""
            raise NotFiniteError(f"{found} Nothing of this step was applied.{tried} {_REMEDY}")
        self._told = True
        rank_zero_warn(f"{found} The step is left out; train/skipped_steps counts this one and all later ones.")
        return False


def _everywhere(*flags: Tensor) -> bool:
    """Return whether flags are true in all processes."""
    false = torch.stack([~flag.to(flags[0].device) for flag in flags]).sum()
    return int(distributed.all_reduce_sum(false)) == 0


def _of_loss(batches: Sequence[_Batch]) -> tuple[list[int], str]:
    """Return the rows of the first batch without a finite loss, and the values of its terms."""
    for total, values, rows in batches:
        if not torch.isfinite(total):
            bad = {name: value for name, value in values.items() if not torch.isfinite(value)} or {"total": total}
            return _ids([rows]), ": " + ", ".join(f"{name} = {value.item()}" for name, value in bad.items())
    return [], ": in another process"


def _of_gradient(
    batches: Sequence[_Batch], inputs: Sequence[Mapping[str, Tensor]], spoilt: Callable[..., list[str]]
) -> tuple[list[int], str]:
    """Run the batches again, and return the rows of those with a spoilt gradient, and whose gradients these are."""
    # All batches, in all processes alike: terms that compare the examples of a batch wait for each other.
    found: list[list[str]] = []
    for batch in inputs:
        try:
            found.append(spoilt(batch))
        except Exception:  # for want of memory, say: what was found before must not be lost for it
            found.append([])
    if names := sorted({name for each in found for name in each}):
        rows = [batch.get("row_id") for batch, each in zip(inputs, found, strict=True) if each]
        return _ids(rows), f", while the loss is. It is the gradient of: {', '.join(names)}"
    here = " of this process" if distributed.world_size() > 1 else ""
    why = f", while the loss is. Which term's it is isn't known: the last batches{here}, run again, show none"
    return _ids([batch.rows for batch in batches]), why


def _ids(rows: Sequence[Any]) -> list[int]:
    return [number for each in rows if isinstance(each, Tensor) for number in each.tolist()]
