"""What only runs tell of a model: its causality, where its head pools, and which label its logits predict."""

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ildistil.capture.layout import Layout, States
from ildistil.capture.trial import Trial, depends_on_later_tokens, pooled_states, predicts_next_token, undisturbed
from ildistil.errors import ModelRunError
from ildistil.functional.pooling import Pooling


class Behaviour:
    """Learns about a model, each thing once, by trial runs on one row of a batch."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str | None, list[nn.Module]],
        states: States,
        layout: Layout,
    ) -> None:
        self.model, self._layers, self._states, self._layout = model, layers, states, layout
        self._causal: dict[str | None, bool] = {}
        self._pooling: dict[str | None, Pooling | None] = {}
        self.next_token: bool | None = None  # whether the logits at a position predict the token after it
        self.why_not_known = "no run with its logits was long enough to tell"
        self.is_settled = False  # whether next_token needs no further trial

    def is_causal(self, stack: str | None, layer: int, inputs: Mapping[str, Any], real: Tensor) -> bool | None:
        """Return whether a stack, of which a layer is recorded, is causal; ``None`` if that isn't known."""
        names = ("decoder_input_ids", "labels") if stack == "decoder" else ("input_ids",)
        name = next((name for name in names if isinstance(inputs.get(name), Tensor)), None)
        if stack not in self._causal and layer > 0 and name is not None and inputs[name].shape == real.shape:

            def states(inputs: Mapping[str, Any]) -> Tensor:
                state = self._states(inputs, (stack, layer))
                return state.movedim(self._layout.token_dimension(stack), 1)

            with undisturbed(self.model), suppress(ModelRunError):  # it may not run on a single row
                depends = depends_on_later_tokens(states, Trial.of(inputs, real), name)
                if depends is not None:
                    self._causal[stack] = not depends
        return self._causal.get(stack)

    def pooling(self, stack: str | None, layer: int, inputs: Mapping[str, Any], real: Tensor) -> Pooling:
        """Return which state of a stack stands for a whole example."""
        if stack not in self._pooling and stack in (None, "decoder") and stack in self._layers:
            last, trial = self._layers[stack][-1], Trial.of(inputs, real)
            with undisturbed(self.model), suppress(ModelRunError):
                if trial.tells:
                    tokens = self._layout.token_dimension(stack)
                    self._pooling[stack] = pooled_states(self.model, last, trial, tokens)
        found = self._pooling.get(stack)
        # Without a head of classes; a decoder's first state sees all that the encoder read.
        return found or ("last" if stack is None and self.is_causal(stack, layer, inputs, real) else "first")

    def learn_next_token(self, inputs: Mapping[str, Any], real: Tensor, output: Any) -> None:
        """Learn which label a row of logits predicts, where there is a row for each token; inputs have no labels."""
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            return
        found: bool | str | None = f"its logits are of the shape {tuple(logits.shape)}, not of its tokens"
        if logits.ndim == 3 and logits.shape[:2] == real.shape:
            with undisturbed(self.model):
                trial = Trial.of(inputs, real, repeats=False)  # rows of equal tokens have like logits
                found = predicts_next_token(self.model, trial, logits.shape[-1])
        if isinstance(found, str):
            self.why_not_known = found
        self.next_token = found if isinstance(found, bool) else None
        self.is_settled = found is not None


class TriedTraits:
    """Traits of one stack that are found when they are asked for."""

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
