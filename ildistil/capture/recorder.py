"""The records of one model's runs."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ildistil.attention import Attention, Masks, Scores
from ildistil.capture.taps import Tap
from ildistil.errors import CaptureError

Key = tuple[str | None, int]  # a stack and a layer of it
PaddingMasks = dict[str | None, tuple[Tensor | None, Tensor | None]]  # of queries and of keys, by stack
# What transformers passes to attention functions beside the tensors that doesn't change the scores.
_HARMLESS = {
    "dropout", "is_causal", "sliding_window", "softcap", "position_bias", "position_ids", "use_cache", "cache",
    "cache_position", "past_key_values", "output_attentions", "output_hidden_states", "return_dict", "deterministic",
    "layer_idx", "target_dtype", "num_items_in_batch", "encoder_hidden_states", "token_type_ids", "logits_to_keep",
}  # fmt: skip


class StopForward(BaseException):
    """Everything wanted is recorded, and the rest of the model need not run; no ``except Exception`` holds it up."""


@dataclass
class Records:
    """What one run leaves.

    Attributes:
        hidden: states by stack and layer, as the layers gave them.
        given: what the next layer was given in their place, in runs that are verified.
        attention: attention by stack and layer.
        masks_passed: what the model passed to it as a mask.
        modules: outputs by path.
        head_states: what the output layer over the vocabulary was given.
        layers_run: how many layers of each stack ran.
    """

    hidden: dict[Key, Tensor] = field(default_factory=dict)
    given: dict[Key, Tensor] = field(default_factory=dict)
    attention: dict[Key, Attention] = field(default_factory=dict)
    masks_passed: dict[Key, Any] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    head_states: Tensor | None = None
    layers_run: dict[str | None, int] = field(default_factory=dict)


class Recorder:
    """Records one model's runs. Plain records, ints, dicts and flags, which torch.compile can trace through."""

    def __init__(self, wanted: Iterable[Tap]) -> None:
        self.paths: set[str] = set()
        self.active = self.verify = self.stops = False
        self.stack: str | None = None
        self.layer = self.calls = 0
        self.masks: PaddingMasks = {}
        self.parts: dict[str, Tensor] = {}
        self.records = Records()
        self._want(wanted)

    def _want(self, wanted: Iterable[Tap]) -> None:
        layered = [tap for tap in wanted if tap.layer is not None]
        self.wanted_hidden = {(tap.stack, tap.layer) for tap in layered if tap.name == "hidden"}
        self.wanted_attention = {(tap.stack, tap.layer): tap.parts for tap in layered if tap.name == "attention"}
        self.wanted_names = {tap.name for tap in wanted}
        self.wants_head = bool({"logits", "loss"} & self.wanted_names)

    def start(self, wanted: frozenset[Tap], masks: PaddingMasks, verify: bool, stops: bool) -> None:
        """Begin a run: ``verify`` records also what only checks need, ``stops`` ends it once everything is recorded."""
        self._want(wanted)
        self.active, self.verify, self.stops, self.masks = True, verify, stops, masks
        self.records.layers_run = dict.fromkeys(masks, 0)

    def stop(self) -> Records:
        """End a run, and return its records."""
        records, self.records = self.records, Records()
        self.active, self.layer, self.calls, self.masks, self.parts = False, 0, 0, {}, {}
        return records

    def hook_layer(self, layer: nn.Module, end: nn.Module, stack: str | None, number: int | None) -> list[Any]:
        """Hook a layer, whose output is that of ``end``; it has no number where modules run several times."""
        before = functools.partial(self._before_layer, stack, number)
        after = functools.partial(self._after_layer, stack)
        return [layer.register_forward_pre_hook(before, with_kwargs=True), end.register_forward_hook(after)]

    def _before_layer(
        self, stack: str | None, number: int | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self.active:
            return
        # By call order, not by index: ALBERT runs one module L times.
        run = self.records.layers_run
        run[stack] += 1
        self.stack, self.layer, self.calls = stack, run[stack], 0
        if number not in (None, self.layer):
            raise CaptureError(
                f"Layer {number} ran as layer {self.layer}. Switch off whatever skips layers (layerdrop, early exit)."
            )
        before = (stack, self.layer - 1)
        if before in self.wanted_hidden and (self.layer == 1 or self.verify):
            state = layer_states(args[0] if args else kwargs.get("hidden_states"), module)
            if self.layer == 1:
                self.records.hidden[before] = state
                self._stop_if_enough()
            else:
                self.records.given[before] = state

    def _after_layer(self, stack: str | None, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.active:
            return
        place, self.layer = (stack, self.layer), 0  # what attends from here on belongs to no layer
        if place in self.wanted_hidden:
            self.records.hidden[place] = layer_states(output, module)
            self._stop_if_enough()

    def before_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Record what the output layer over the vocabulary is given: the hook before it."""
        if self.active and self.wants_head:
            self.records.head_states = args[0] if args else next(iter(kwargs.values()))
            self._stop_if_enough()

    def _stop_if_enough(self) -> None:
        found = self.records
        if not self.stops or (self.wants_head and found.head_states is None):
            return
        if len(found.hidden) == len(self.wanted_hidden) and len(found.attention) == len(self.wanted_attention):
            raise StopForward

    def module_hook(self, path: str) -> Callable[..., None]:
        """Make the hook of a module that is tapped by its path."""
        self.paths.add(path)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.active and path in self.wanted_names:
                self.records.modules[path] = output

        return hook

    def record_part(self, name: str, value: Tensor) -> None:
        """Record a part of an attention, the first of its name: DeBERTa may project positions by the same module."""
        self.parts.setdefault(name, value)

    def take_parts(self) -> dict[str, Tensor]:
        """Return the recorded parts and forget them."""
        parts, self.parts = self.parts, {}
        return parts

    def record_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None,
        kwargs: dict[str, Any], unknown: str | None = None,
    ) -> None:  # fmt: skip
        """Record the attention of the layer that runs; the second one of a decoder's layer looks at the encoder."""
        if not self.active:
            return
        self.calls += 1
        stack = "cross" if self.stack == "decoder" and self.calls == 2 else self.stack
        place = (stack, self.layer)
        if place not in self.wanted_attention:
            return
        if place in self.records.attention:
            raise CaptureError(f"Layer {self.layer} runs several attentions; only self-attention is understood.")
        strange = [name for name, v in kwargs.items() if v is not None and v is not False and name not in _HARMLESS]
        if strange:
            raise CaptureError(
                f"{type(module).__name__} passes {strange} to its attention, which may change the scores and is not "
                "understood. Use hidden-state objectives for this model."
            )
        causal = kwargs.get("is_causal")
        query_mask, key_mask = self.masks[stack]
        parts = self.wanted_attention[place]
        kept = {part: x if part in parts else unread(x) for part, x in zip("qkv", (query, key, value), strict=True)}
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        raw = Scores(kept["q"], kept["k"], scale, kwargs.get("position_bias"), kwargs.get("softcap"))
        causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
        masks = Masks(query_mask, key_mask, causal, kwargs.get("sliding_window"))
        self.records.attention[place] = Attention(raw, masks, kept["v"], unknown)
        if mask is None or isinstance(mask, Tensor) or self.verify:
            self.records.masks_passed[place] = mask
        self._stop_if_enough()


def unread(vectors: Tensor) -> Tensor:
    """Return a placeholder for vectors that nothing reads: not a number, so that no loss on them is finite."""
    return vectors.new_full((), torch.nan).expand(vectors.shape)


def layer_states(value: Any, module: nn.Module) -> Tensor:
    """Return the states among what a layer is given or gives: the first one of several."""
    while not isinstance(value, Tensor) and isinstance(value, list | tuple | Mapping) and len(value):
        value = next(iter(value.values())) if isinstance(value, Mapping) else value[0]
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"The layers ({type(module).__name__}) are given, or give, no states: {type(value).__name__}. Tap modules "
            "by their paths instead."
        )
    if value.is_nested:
        raise CaptureError(
            "The layers give nested tensors. Build the TransformerEncoder with enable_nested_tensor=False."
        )
    return value
