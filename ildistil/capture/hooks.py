"""The hooks of a captured model."""

from typing import Any

from torch import nn

from ildistil.capture import families
from ildistil.capture.head import output_layer
from ildistil.capture.info import ModelInfo
from ildistil.capture.interface import goes_through_interface
from ildistil.capture.layers import find_stacks
from ildistil.capture.recorder import Recorder
from ildistil.capture.taps import Tap
from ildistil.errors import CaptureError


class Hooks:
    """Attaches a recorder to a model, for the taps that may be wanted of it.

    Attributes:
        layers: the hooked layers of each stack.
        ends: the modules that give the layers' states, mostly the layers.
        output_layer: the layer that makes the logits, if it is hooked.
    """

    def __init__(
        self, model: nn.Module, info: ModelInfo, name: str, wanted: frozenset[Tap], recorder: Recorder
    ) -> None:
        self.model, self.info, self.name, self.wanted, self.recorder = model, info, name, wanted, recorder
        self.layers: dict[str | None, list[nn.Module]] = {}
        self.ends: dict[str | None, list[nn.Module]] = {}
        self.output_layer: nn.Module | None = None
        self._handles: list[Any] = []
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def refuse_reentrant_checkpointing(self) -> None:
        """Refuse a model whose layers are checkpointed in a way that gives captured tensors wrong gradients."""
        for layer in (layer for layers in self.layers.values() for layer in layers):
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if function is not None and getattr(function, "keywords", {}).get("use_reentrant"):
                raise CaptureError(
                    f"The {self.name} uses reentrant gradient checkpointing, which gives captured tensors wrong "
                    "gradients. Enable it with gradient_checkpointing_enable(), whose default is not reentrant."
                )

    def _attach(self) -> None:
        model, recorder = self.model, self.recorder
        if any(tap.layer is not None for tap in self.wanted):
            self._attach_layers()
        if any(tap.name == "attention" for tap in self.wanted):
            self._attach_attention()
        if recorder.wants_head:
            self.output_layer = output_layer(model)
            if self.output_layer is not None:
                self._handles.append(
                    self.output_layer.register_forward_pre_hook(recorder.before_head, with_kwargs=True)
                )
        modules = dict(model.named_modules())
        for path in {tap.name for tap in self.wanted} - {"hidden", "attention", "logits", "loss"}:
            if path not in modules:
                raise CaptureError(
                    f"The {self.name} has no module {path!r}. A tap is 'hidden', 'attention', 'logits', 'loss' or a "
                    f"module's path; at the top are {[n for n, _ in model.named_children()]}."
                )
            self._handles.append(modules[path].register_forward_hook(recorder.module_hook(path)))

    def _attach_layers(self) -> None:
        for tap in self.wanted:
            if tap.layer is not None:
                self.info.stack(tap.stack)
            if tap.name == "hidden" and tap.stack == "cross":
                raise CaptureError(
                    "The stack 'cross' has attention only. The decoder's hidden states come from stack='decoder'."
                )
        self.layers = find_stacks(self.model)
        if not all(self.layers.values()):
            raise CaptureError(
                f"The {self.name} has no single stack of layers to number 1..L. Tap its modules by their paths instead."
            )
        for stack, layers in self.layers.items():
            self.ends[stack] = families.layer_ends(self.model, layers)
            once = len(layers) == self.info.stack(stack).depth  # ALBERT runs one module several times
            for number, (layer, end) in enumerate(zip(layers, self.ends[stack], strict=True), start=1):
                self._handles += self.recorder.hook_layer(layer, end, stack, number if once else None)

    def _attach_attention(self) -> None:
        if goes_through_interface(self.model):
            return
        layers = [layer for layers in self.layers.values() for layer in layers]
        handles = families.attach(layers, self.recorder)
        if not handles:
            raise CaptureError(
                f"The attention of the {self.name} can't be captured: it does not go through "
                "transformers' AttentionInterface, nor is it of a family that is read otherwise (MPNet, DeBERTa). Use "
                "hidden-state objectives, or tap its modules by path."
            )
        self._handles += handles
