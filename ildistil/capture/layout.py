"""The layout of hidden states: layers may give ``(batch, tokens, width)`` or ``(tokens, batch, width)``."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ildistil.capture.inputs import main_input
from ildistil.capture.recorder import Key, PaddingMasks
from ildistil.capture.taps import Tap
from ildistil.capture.trial import Trial, undisturbed
from ildistil.errors import CaptureError

# Runs a model on some inputs, and returns the states of a layer as the layer gave them.
States = Callable[[Mapping[str, Any], Key], Tensor]


class Layout:
    """Learns once for each stack of a model which dimension of its states is the batch, and puts it first."""

    def __init__(
        self, model: nn.Module, name: str, layers: Mapping[str | None, list[nn.Module]], states: States
    ) -> None:
        self.model, self.name, self._states = model, name, states
        # torch's own attention says which dimension is which.
        attention = {stack: getattr(found[0], "self_attn", None) for stack, found in layers.items() if found}
        self._said = {
            stack for stack, a in attention.items() if isinstance(a, nn.MultiheadAttention) and not a.batch_first
        }
        self._tokens_first: dict[str | None, bool] = dict.fromkeys(self._said, True)

    def token_dimension(self, stack: str | None) -> int:
        """Return which dimension of a layer's states is the tokens, as far as is known."""
        return 0 if self._tokens_first.get(stack) else 1

    def arranged(
        self, hidden: Mapping[Key, Tensor], masks: PaddingMasks, inputs: Mapping[str, Any]
    ) -> dict[Key, Tensor]:
        """Return hidden states as ``(batch, tokens, width)``, whatever the layout of the layers that gave them."""
        found: dict[Key, Tensor] = {}
        for place, state in hidden.items():
            mask = masks[place[0]][0]
            rows, tokens = self._rows(place[0], inputs), None
            if mask is not None:
                rows, tokens = mask.shape
            first = self._are_tokens_first(place, state, rows, tokens, inputs)
            found[place] = state.transpose(0, 1) if first else state
        for stack in masks:
            lengths = {state.shape[1] for place, state in found.items() if place[0] == stack}
            if len(lengths) > 1:
                raise CaptureError(
                    f"The layers of the {self.name} have different numbers of tokens: {sorted(lengths)}. Map layers of "
                    "one length only, or tap its modules by their paths."
                )
        return found

    def _rows(self, stack: str | None, inputs: Mapping[str, Any]) -> int:
        return main_input(self.model, inputs).shape[1 if stack in self._said else 0]

    def _are_tokens_first(
        self, place: Key, state: Tensor, rows: int, tokens: int | None, inputs: Mapping[str, Any]
    ) -> bool:
        known = self._tokens_first.get(place[0])
        straight, turned = (
            state.ndim == 3 and state.shape[a] == rows and tokens in (None, state.shape[1 - a]) for a in (0, 1)
        )
        if not (straight and known is not True) and not (turned and known is not False):
            raise self._misfit(place, state, rows, tokens)
        if known is not None or state.shape[:2] == (1, 1):
            return bool(known)
        ids = main_input(self.model, inputs)
        counted = tokens is not None or (not ids.is_floating_point() and ids.shape[1] == state.shape[0])
        if turned and (straight or not counted):
            turned = self._is_turned_in_a_trial(place, state, rows, inputs)
        self._tokens_first[place[0]] = turned
        return turned

    def _is_turned_in_a_trial(self, place: Key, state: Tensor, rows: int, inputs: Mapping[str, Any]) -> bool:
        """Return whether one row alone is in the second dimension: a batch may have as many rows as tokens."""
        if rows > 1:
            trial = Trial.of(inputs, torch.ones(rows, 1, dtype=torch.bool, device=state.device))
            if trial.rows != 1:
                raise CaptureError(
                    f"{Tap('hidden', place[1], place[0])} of the {self.name} has the shape {tuple(state.shape)}, of "
                    "which either dimension may be the batch. Begin with a batch of another number of rows."
                )
            with undisturbed(self.model):
                state = self._states(trial.inputs, place)
        if state.ndim != 3 or 1 not in state.shape[:2]:
            raise self._misfit(place, state, 1, None)
        return state.shape[0] != 1

    def _misfit(self, place: Key, state: Tensor, rows: int, tokens: int | None) -> CaptureError:
        of = "" if tokens is None else f" of {tokens} tokens"
        return CaptureError(
            f"{Tap('hidden', place[1], place[0])} of the {self.name} has the shape {tuple(state.shape)}, which is not "
            f"(batch, tokens, width) for a batch of {rows} rows{of}: the model makes other tokens of its input, or "
            "pads it. Leave attention_mask out if nothing is padded, pad to the length that the model works with "
            "(pad_to_multiple_of), or tap its modules by their paths."
        )
