"""The runs of one model."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import PreTrainedModel

from ildistil.attention import Attention
from ildistil.capture import families
from ildistil.capture.activations import Activations, Layers
from ildistil.capture.attention import divert, give_back, goes_through_interface, note_into
from ildistil.capture.head import LazyLogits, agrees, is_token_labels, output_layer
from ildistil.capture.info import ModelInfo, find_stacks, unwrapped
from ildistil.capture.inputs import decoder_mask, full_mask, model_inputs, token_mask, without_labels
from ildistil.capture.recorder import Key, PaddingMasks, Recorder, StopForward
from ildistil.capture.taps import Role, Tap, merged
from ildistil.errors import CaptureError, IldistilError, ModelRunError

__all__ = ["Capture"]


class Capture:
    """Runs one model while recording the wanted taps.

    Args:
        model: any module; for the ``attention`` tap a transformers model that uses ``AttentionInterface``, or one of
            the families that are read otherwise (MPNet, DeBERTa).
        wanted: the taps that may be recorded.
        role: ``"student"`` or ``"teacher"``, for messages, and because a teacher gets no labels.

    Raises:
        CaptureError: the model can't give a wanted tap; says why and what to do.

    The hooks are registered here, once, so make the capture before the model is compiled. They record only during
    :meth:`__call__`: validation, export and the recomputation of checkpointed layers cost nothing. :meth:`close`
    removes them.

    A run stops as soon as all that is wanted is recorded: after the attention's queries and keys of the deepest layer,
    after its hidden states, or before a language model's output layer, whose logits are large. It runs to the end where
    the output or a module is wanted, where the model was compiled by somebody else (see :meth:`compile`) or is sharded.
    """

    def __init__(self, model: nn.Module, wanted: Iterable[Tap], role: Role = "student") -> None:
        self.model, self.role = model, role
        self.info = ModelInfo.of(model)
        self.wanted = merged(wanted)
        self._verified: set[Tap] = set()
        self._recorder = Recorder(self.wanted)
        self._layers: dict[str | None, list[nn.Module]] = {}
        self._handles: list[Any] = []
        self._previous_attention: str | None = None
        self._run = self._run_model
        self._compiled = False
        # What is known of the output layer from runs that were verified: does it make the logits, and they the loss?
        self._output_layer: nn.Module | None = None
        self._agrees: dict[str, bool] = {}
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def __call__(
        self, batch: Mapping[str, Any], *, wanted: Iterable[Tap] | None = None, verify: bool = False
    ) -> Activations:
        """Run the model on a batch.

        The first run of a tap checks its attention mask, for those who never make a dry run.

        Args:
            batch: a mapping; what the model's ``forward`` does not name is left out.
            wanted: the taps to record this time, some of those the capture was made for; ``None``: all of them.
            verify: check that the masks the model passes to its attention are those that were understood, in any case.

        Raises:
            CaptureError: something wanted did not arrive, or the capture was not made for it.
        """
        taps = self._of_this_run(wanted)
        verify = verify or not taps <= self._verified
        self._verified |= taps
        # As plain code, or a compiled model would be compiled once more for it.
        with torch.compiler.set_stance("force_eager") if verify and self.is_compiled else nullcontext():
            return self._recorded(batch, taps, verify)

    def _recorded(self, batch: Mapping[str, Any], wanted: frozenset[Tap], verify: bool) -> Activations:
        self._refuse_reentrant_checkpointing()
        recorder, masks, inputs = self._recorder, self._masks(batch), self.inputs(batch, wanted)
        stops = not verify and self._may_stop(wanted, batch)
        recorder.start(wanted, masks, verify, stops)
        try:
            # A checkpointed layer that is left halfway must be recomputed whole: torch doesn't know where it ended.
            with note_into(recorder), set_checkpoint_early_stop(False) if stops else nullcontext():
                output = self._run(inputs)
        except (IldistilError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a model raises: it is not ours, and the batch may be made up
            raise self._failed(inputs, error) from error
        else:
            hidden, attention, modules = dict(recorder.hidden), dict(recorder.attention), dict(recorder.modules)
            states, masks_passed = recorder.head_states, dict(recorder.masks_passed)
        finally:
            recorder.stop()
        self._check_complete(wanted, hidden, attention, modules, stopped=output is None)
        lazy_logits = self._lazy_logits(states, batch)
        for place, mask in masks_passed.items():
            self._check_mask(place, attention[place], mask)
        # A first batch may have had no label: then a later one tells.
        unknown = {"logits", "loss"} & {tap.name for tap in wanted} - self._agrees.keys()
        if lazy_logits is not None and output is not None and (verify or (unknown and not self.is_compiled)):
            self._agrees = agrees(lazy_logits, output, self._agrees)
        if all(tap.layer is not None for tap in wanted):
            output = None  # the same whether the run stopped or not
        made_later = lazy_logits if output is None else None
        return self._activations(batch, masks, hidden, attention, modules, output, made_later)

    def compile(self, **options: Any) -> None:
        """Compile the run, with the options of ``torch.compile``; what isn't wanted of the model is left out of it."""
        self._run = torch.compile(self._run_model, **options)
        self._compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether the model runs compiled, by :meth:`compile` or by somebody else."""
        return self._compiled or _is_compiled(self.model)

    def _run_model(self, inputs: dict[str, Any]) -> Any:
        try:
            return self.model(**inputs)
        except StopForward:
            return None

    def _failed(self, inputs: Mapping[str, Any], error: Exception) -> ModelRunError:
        shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in inputs.items()}
        return ModelRunError(
            f"The {self.role} {self.info.name} failed on a batch of {shapes}: {type(error).__name__}: {error}"
        )

    def _may_stop(self, wanted: frozenset[Tap], batch: Mapping[str, Any]) -> bool:
        """Tell whether everything wanted is recorded on the way, and nothing needs the model's end."""
        for tap in wanted:
            labelled = tap.name != "loss" or is_token_labels(batch.get("labels"))
            if tap.layer is None and not (labelled and self._agrees.get(tap.name)):
                return False
        # An exception would break the graph of a model that somebody else compiled, and leave shards gathered.
        return bool(wanted) and not (_is_compiled(self.model) or self._sharded)

    @cached_property
    def _sharded(self) -> bool:
        # Looked at once, in the first run that may stop: models are sharded before they train.
        return _is_sharded(self.model)

    def _lazy_logits(self, states: Tensor | None, batch: Mapping[str, Any]) -> LazyLogits | None:
        if states is None or self._output_layer is None:
            return None
        labels, device = batch.get("labels"), states.device.type
        fitting = is_token_labels(labels) and labels.shape == states.shape[:-1]
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return LazyLogits(states, self._output_layer, labels if fitting else None, self.info.next_token, autocast)

    def inputs(self, batch: Mapping[str, Any], wanted: frozenset[Tap] | None = None) -> dict[str, Any]:
        """Select what the model's ``forward`` knows; labels only where the model's own loss is wanted."""
        model = unwrapped(self.model)
        inputs = model_inputs(model, batch)
        labelled = Tap("loss") in (self.wanted if wanted is None else wanted)
        return inputs if labelled else without_labels(model, inputs)

    def close(self) -> None:
        """Remove the hooks and give the model its attention implementation back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        model = unwrapped(self.model)
        if self._previous_attention is not None and isinstance(model, PreTrainedModel):
            give_back(model, self._previous_attention)
            self._previous_attention = None

    def _of_this_run(self, wanted: Iterable[Tap] | None) -> frozenset[Tap]:
        if wanted is None:
            return self.wanted
        taps, known = merged(wanted), {tap.place: set(tap.parts) for tap in self.wanted}
        if unknown := sorted(str(tap) for tap in taps if tap.place not in known or set(tap.parts) - known[tap.place]):
            raise CaptureError(
                f"The capture of the {self.role} was not made for {', '.join(unknown)}; it was made for "
                f"{', '.join(sorted(map(str, self.wanted))) or 'nothing'}. Name all taps when it is made."
            )
        return taps

    def _attach(self) -> None:
        model, recorder = unwrapped(self.model), self._recorder
        if recorder.wanted_hidden or recorder.wanted_attention:
            self._layers = self._find_layers(model)
            for stack, layers in self._layers.items():
                once = len(layers) == self._depth(stack)  # ALBERT runs one module several times
                for number, layer in enumerate(layers, start=1):
                    self._handles += recorder.hook_layer(layer, stack, number if once else None)
        if recorder.wanted_attention:
            self._attach_attention(model)
        if recorder.wants_head:
            self._output_layer = output_layer(model)
            if self._output_layer is not None:
                self._handles.append(
                    self._output_layer.register_forward_pre_hook(recorder.before_head, with_kwargs=True)
                )
        modules = dict(model.named_modules())
        for path in {tap.name for tap in self.wanted} - {"hidden", "attention", "logits", "loss"}:
            if path not in modules:
                raise CaptureError(
                    f"The {self.role} {self.info.name} has no module {path!r}. A tap is 'hidden', 'attention', "
                    f"'logits', 'loss' or a module's path; at the top are {[n for n, _ in model.named_children()]}."
                )
            self._handles.append(modules[path].register_forward_hook(recorder.module_hook(path)))

    def _find_layers(self, model: nn.Module) -> dict[str | None, list[nn.Module]]:
        """Find the stacks, and check that every wanted layer belongs to one."""
        for tap in self.wanted:
            if tap.layer is not None:
                self.info.stack(tap.stack)
            if tap.name == "hidden" and tap.stack == "cross":
                raise CaptureError(
                    "The stack 'cross' has attention only. The decoder's hidden states come from stack='decoder'."
                )
        stacks = find_stacks(model)
        if not all(stacks.values()):
            raise CaptureError(
                f"The {self.role} {self.info.name} has no single stack of layers to number 1..L. Tap its modules by "
                "their paths instead."
            )
        return stacks

    def _attach_attention(self, model: nn.Module) -> None:
        if isinstance(model, PreTrainedModel) and goes_through_interface(model):
            self._previous_attention = divert(model)
            return
        layers = [layer for stack in self._layers.values() for layer in stack]
        handles = families.attach(layers, self._recorder)
        if not handles:
            raise CaptureError(
                f"The attention of the {self.role} {self.info.name} can't be captured: it does not go through "
                "transformers' AttentionInterface, nor is it of a family that is read otherwise (MPNet, DeBERTa). Use "
                "hidden-state objectives, or tap its modules by path."
            )
        self._handles += handles

    def _refuse_reentrant_checkpointing(self) -> None:
        for layer in (layer for stack in self._layers.values() for layer in stack):
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if function is not None and getattr(function, "keywords", {}).get("use_reentrant"):
                raise CaptureError(
                    f"The {self.role} uses reentrant gradient checkpointing, which gives captured tensors wrong "
                    "gradients. Enable it with gradient_checkpointing_enable(), whose default is not reentrant."
                )

    def _masks(self, batch: Mapping[str, Any]) -> PaddingMasks:
        """Give the real queries and the real keys of every stack."""
        tokens = token_mask(batch)
        if not self.info.stacks:
            return {None: (tokens, tokens)}
        decoder = decoder_mask(unwrapped(self.model), batch)
        # The model hides no key of its decoder unless it is told: padding comes last there, behind causality.
        keys = token_mask(batch, "decoder_attention_mask")
        return {"encoder": (tokens, tokens), "decoder": (decoder, keys), "cross": (decoder, tokens)}

    def _check_complete(
        self,
        wanted: frozenset[Tap],
        hidden: Mapping[Key, Tensor],
        attention: Mapping[Key, Attention],
        modules: Mapping[str, Any],
        stopped: bool,
    ) -> None:
        recorder = self._recorder
        for stack in (
            set() if stopped else {stack for stack, _ in recorder.wanted_hidden | recorder.wanted_attention.keys()}
        ):
            layers, depth = recorder.layers_run["decoder" if stack == "cross" else stack], self._depth(stack)
            if layers != depth:
                where = "" if stack is None else f" (stack {stack!r})"
                raise CaptureError(
                    f"The {self.role} {self.info.name} ran {layers} layers, its depth is {depth}{where}. "
                    "Switch off whatever skips layers (layerdrop, early exit)."
                )
        missing = [Tap("hidden", k, stack) for stack, k in recorder.wanted_hidden - hidden.keys()]
        missing += [Tap("attention", k, stack) for stack, k in recorder.wanted_attention.keys() - attention.keys()]
        missing += [t for t in wanted if t.name in recorder.paths and t.name not in modules]
        if missing:
            remedy = (
                "Its attention does not go through transformers' AttentionInterface; use hidden-state objectives, or "
                "tap its modules by path."
                if any(tap.name == "attention" for tap in missing)
                else "Check that its forward really runs this module."
            )
            names = ", ".join(sorted(map(str, missing)))
            raise CaptureError(f"The {self.role} {self.info.name} did not give {names}. {remedy}")

    def _check_mask(self, place: Key, record: Attention, passed: Tensor) -> None:
        if passed.ndim != 4:
            return  # a flash kernel got the two-dimensional mask itself
        real, masks = record.real()[:, None, :, None], record.masks
        understood = record.allowed_map() & real
        passed = passed if passed.dtype == torch.bool else passed > torch.finfo(passed.dtype).min / 2
        if not torch.equal(understood, (passed & real).expand_as(understood)):
            raise CaptureError(
                f"{Tap('attention', place[1], place[0])} of the {self.role} {self.info.name} uses a mask that is not "
                f"its padding mask{', causality' if masks.causal else ''}{' and window' if masks.window else ''}. "
                "Attention objectives would compare maps the model never makes; use hidden-state objectives for this "
                "model."
            )

    def _depth(self, stack: str | None) -> int:
        return self.info.stack(stack).depth

    def _activations(
        self,
        batch: Mapping[str, Any],
        masks: PaddingMasks,
        hidden: Mapping[Key, Tensor],
        attention: Mapping[Key, Attention],
        modules: dict[str, Any],
        output: Any,
        lazy_logits: LazyLogits | None,
    ) -> Activations:
        stacks: dict[str | None, Activations] = {}
        for stack, (mask, _) in masks.items():
            states = {layer: state for (of, layer), state in hidden.items() if of == stack}
            records = {layer: record for (of, layer), record in attention.items() if of == stack}
            if mask is None:
                mask = full_mask(batch, states.values(), (record.real() for record in records.values()))
            prefix, depth = "" if stack is None else f"{stack}.", self._depth(stack)
            stacks[stack] = Activations(
                Layers(states, depth, f"{prefix}hidden"),
                Layers(records, depth, f"{prefix}attention"),
                mask,
                output,
                modules,
                lazy_logits=lazy_logits,
            )
        if None in stacks:
            return stacks[None]
        named = {stack: seen for stack, seen in stacks.items() if stack is not None}
        none: tuple[Layers[Tensor], Layers[Attention]] = (Layers({}, 0, "hidden"), Layers({}, 0, "attention"))
        return Activations(*none, named["decoder"].mask, output, modules, named, lazy_logits)


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _is_sharded(model: nn.Module) -> bool:
    """Whether parameters are gathered for the time of a module's run, which an exception would end too soon."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import, and rarely needed

    sharded = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return sharded or any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # DeepSpeed's third stage
