"""What only runs tell of a model: the layout of its states, its causality, and which label its logits predict."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ildistil.capture.activations import Pooling
from ildistil.capture.inputs import main_input
from ildistil.capture.recorder import Key, PaddingMasks
from ildistil.capture.taps import Tap
from ildistil.capture.trial import Trial, depends_on_later_tokens, pooled_states, predicts_next_token, undisturbed
from ildistil.errors import CaptureError, ModelRunError

__all__ = ["Behaviour", "TriedTraits"]


class Behaviour:
    """Learns from a model's runs, each thing once, where need be by trial runs on one row of a batch.

    Args:
        model: the module itself, without ``torch.compile``'s wrapper.
        name: what messages call it.
        layers: the modules that give the states of each stack's layers.
        states: runs it on some inputs, and returns the states of a layer as the layer gave them.

    Attributes:
        next_token: whether the logits at a position predict the token after it; ``None`` where that isn't known.
        why_not_known: why it isn't.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: Mapping[str | None, list[nn.Module]],
        states: Callable[[Mapping[str, Any], Key], Tensor],
    ) -> None:
        self.model, self.name, self._layers, self._states = model, name, layers, states
        # torch's own attention says which dimension is which.
        attention = {stack: getattr(found[0], "self_attn", None) for stack, found in layers.items() if found}
        self._said = {
            stack for stack, a in attention.items() if isinstance(a, nn.MultiheadAttention) and not a.batch_first
        }
        self._tokens_first: dict[str | None, bool] = dict.fromkeys(self._said, True)
        self._causal: dict[str | None, bool] = {}
        self._pooling: dict[str | None, Pooling | None] = {}
        self.next_token: bool | None = None
        self.why_not_known = "no run with its logits was long enough to tell"
        self.is_settled = False  # whether next_token needs no further trial

    # Layout

    def arranged(
        self, hidden: Mapping[Key, Tensor], masks: PaddingMasks, inputs: Mapping[str, Any]
    ) -> dict[Key, Tensor]:
        """Return hidden states as ``(batch, tokens, width)``, whatever the layout of the layers.

        Args:
            hidden: the states as the layers gave them.
            masks: the real tokens of every stack.
            inputs: what the model was given.

        Raises:
            CaptureError: their shape is not that of the batch.
        """
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
        if turned and (straight or tokens is None):
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

    # Trials

    def is_causal(self, stack: str | None, layer: int, inputs: Mapping[str, Any], real: Tensor) -> bool | None:
        """Return whether a stack is causal; ``None`` where that isn't known, as of a model that reads no token ids.

        Args:
            stack: the stack.
            layer: a layer of it that may be recorded.
            inputs: what the model was given.
            real: the real tokens of the stack.
        """
        names = ("decoder_input_ids", "labels") if stack == "decoder" else ("input_ids",)
        name = next((name for name in names if isinstance(inputs.get(name), Tensor)), None)
        if stack not in self._causal and layer > 0 and name is not None and inputs[name].shape == real.shape:

            def states(inputs: Mapping[str, Any]) -> Tensor:
                state = self._states(inputs, (stack, layer))
                return state.transpose(0, 1) if self._tokens_first.get(stack) else state

            with undisturbed(self.model), suppress(ModelRunError):  # it may not run on a single row
                depends = depends_on_later_tokens(states, Trial.of(inputs, real), name)
                if depends is not None:
                    self._causal[stack] = not depends
        return self._causal.get(stack)

    def pooling(self, stack: str | None, layer: int, inputs: Mapping[str, Any], real: Tensor) -> Pooling:
        """Return which state of a stack stands for a whole example; the arguments are those of :meth:`is_causal`."""
        if stack not in self._pooling and stack in (None, "decoder") and stack in self._layers:
            last = self._layers[stack][-1]
            with undisturbed(self.model), suppress(ModelRunError):
                tokens = 0 if self._tokens_first.get(stack) else 1
                self._pooling[stack] = pooled_states(self.model, last, Trial.of(inputs, real), tokens)
        found = self._pooling.get(stack)
        # Without a head of classes; a decoder's first state sees all that the encoder read.
        return found or ("last" if stack is None and self.is_causal(stack, layer, inputs, real) else "first")

    def learn_next_token(self, inputs: Mapping[str, Any], real: Tensor, output: Any) -> None:
        """Learn which label a row of logits predicts, where there is a row for each token.

        Args:
            inputs: what the model is given without labels.
            real: the real tokens to which the logits belong.
            output: what the model gave.
        """
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            return
        found: bool | str | None = f"its logits are of the shape {tuple(logits.shape)}, not of its tokens"
        if logits.ndim == 3 and logits.shape[:2] == real.shape:
            with undisturbed(self.model):
                found = predicts_next_token(self.model, Trial.of(inputs, real), logits.shape)
        if isinstance(found, str):
            self.why_not_known = found
        self.next_token = found if isinstance(found, bool) else None
        self.is_settled = found is not None


class TriedTraits:
    """Traits of one stack that are found when they are asked for; the arguments are those of :class:`Behaviour`."""

    def __init__(
        self, behaviour: Behaviour, stack: str | None, layer: int, inputs: Mapping[str, Any], real: Tensor
    ) -> None:
        self._behaviour, self._arguments = behaviour, (stack, layer, inputs, real)
        device = real.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._precision = partial(torch.autocast, device, dtype=dtype, enabled=dtype is not None)

    @property
    def causal(self) -> bool | None:
        """Whether no token's state depends on a later token."""
        with self._precision():
            return self._behaviour.is_causal(*self._arguments)

    @property
    def pooling(self) -> Pooling:
        """Which state stands for a whole example."""
        with self._precision():
            return self._behaviour.pooling(*self._arguments)
