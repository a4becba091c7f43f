"""The runs of one model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from ildistil.capture.activations import Activations, Layers
from ildistil.capture.behaviour import Behaviour, TriedTraits
from ildistil.capture.checks import MaskCheck, check_attention_shapes, check_between_layers, check_complete
from ildistil.capture.head import LazyLogits, agrees, is_token_labels
from ildistil.capture.hooks import Hooks
from ildistil.capture.info import ModelInfo
from ildistil.capture.inputs import decoder_mask, encoder_mask, main_input, model_inputs, token_mask, without_labels
from ildistil.capture.interface import recording
from ildistil.capture.layers import coders, unwrapped
from ildistil.capture.layout import Layout
from ildistil.capture.recorder import Key, PaddingMasks, Recorder, Records, StopForward
from ildistil.capture.taps import Role, Tap, merged
from ildistil.errors import CaptureError, IldistilError, ModelRunError


class Capture:
    """Runs one model while recording the wanted taps.

    Args:
        model: any module; for the ``attention`` tap a transformers model that uses ``AttentionInterface``, or one of
            the families that are read otherwise (MPNet, DeBERTa).
        wanted: the taps that may be recorded.
        role: ``"student"`` or ``"teacher"``, for messages, and because a teacher gets no labels.

    Raises:
        CaptureError: the model can't give a wanted tap; the message names the remedy.

    The hooks are registered here, once, so make the capture before the model is compiled. They record only during
    :meth:`__call__`: validation, export and the recomputation of checkpointed layers cost nothing. :meth:`close`
    removes them.

    A run stops as soon as all that is wanted is recorded: after the attention's queries and keys of the deepest layer,
    after its hidden states, or before a language model's output layer, whose logits are large. It runs to the end where
    the output or a module is wanted, where the model was compiled by somebody else (see :meth:`compile`) or is sharded.

    >>> from transformers import BertConfig, BertModel
    >>> tiny = BertConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    >>> capture = Capture(BertModel(tiny), {Tap("hidden", 2), Tap("attention", 1)})
    >>> seen = capture({"input_ids": torch.tensor([[1, 2, 3]])})
    >>> seen.hidden[2].shape, seen.attention[1].query.shape
    (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 4]))
    >>> capture.close()
    """

    def __init__(self, model: nn.Module, wanted: Iterable[Tap], role: Role = "student") -> None:
        self.model, self.role = model, role
        self.info = ModelInfo.of(model)
        self.wanted = merged(wanted)
        self._name = f"{role} {self.info.name}"
        self._verified: set[Tap | frozenset[str]] = set()
        self._recorder = Recorder(self.wanted)
        self._check_masks = MaskCheck(self._name)
        self._run = self._run_model
        self._compiled = False
        # What is known of the output layer from runs that were verified: does it make the logits, and they the loss?
        self._agrees: dict[str, bool] = {}
        self._hooks = Hooks(unwrapped(model), self.info, self._name, self.wanted, self._recorder)
        self._layout = Layout(unwrapped(model), self._name, self._hooks.ends, self._states)
        self._behaviour = Behaviour(unwrapped(model), self._hooks.ends, self._states, self._layout)

    def __call__(
        self, batch: Mapping[str, Any], *, wanted: Iterable[Tap] | None = None, verify: bool = False
    ) -> Activations:
        """Run the model on a batch.

        The first run of a tap, and the first one with other inputs, is verified, for those who never make a dry run.

        Args:
            batch: a mapping; what the model's ``forward`` does not name is left out.
            wanted: the taps to record this time, some of those the capture was made for; ``None``: all of them.
            verify: run the model to its end, plainly, and check all that is assumed of it, in any case.

        Returns:
            What was recorded, hidden states as ``(batch, tokens, width)`` whatever the layers' layout.

        Raises:
            CaptureError: something wanted did not arrive or is not what it is taken for, or the capture was not made
                for it.
            ModelRunError: the model itself failed on the batch.
        """
        taps = self._of_this_run(wanted)
        inputs = self.inputs(batch, taps)
        new = taps | {frozenset(name for name, value in inputs.items() if value is not None)}
        verify = verify or not new <= self._verified
        self._verified |= new
        # As plain code, or a compiled model would be compiled once more for it.
        with torch.compiler.set_stance("force_eager") if verify and self.is_compiled else nullcontext():
            return self._recorded(batch, inputs, taps, verify)

    def _recorded(
        self, batch: Mapping[str, Any], inputs: dict[str, Any], wanted: frozenset[Tap], verify: bool
    ) -> Activations:
        self._hooks.refuse_reentrant_checkpointing()
        masks = self._masks(batch)
        stops = not verify and self._may_stop(wanted, batch)
        output, records = self._records(self._run, inputs, wanted, masks, verify, stops)
        check_complete(self._name, self._recorder, records, None if output is None else self._depths)
        if verify:
            check_between_layers(self._name, records)
        records.hidden = self._layout.arranged(records.hidden, masks, inputs)
        if records.attention:
            rows = len(main_input(unwrapped(self.model), inputs))
            check_attention_shapes(self._name, records.attention, masks, rows)
        self._check_masks(records.attention, records.masks_passed, verify)
        real = {stack: self._real(stack, mask, records, inputs) for stack, (mask, _) in masks.items()}
        names = {tap.name for tap in wanted}
        makes_logits = bool({"logits", "loss"} & names) and output is not None and (verify or not self.is_compiled)
        if makes_logits and not self._behaviour.is_settled:
            tokens = real["decoder" if self.info.stacks else None]
            self._behaviour.learn_next_token(self.inputs(batch, frozenset()), tokens, output)
        lazy_logits = self._lazy_logits(records.head_states, batch)
        # A first batch may have had no label: then a later one tells.
        unknown = {"logits", "loss"} & names - self._agrees.keys()
        if lazy_logits is not None and output is not None and (verify or (unknown and not self.is_compiled)):
            self._agrees = agrees(lazy_logits, output, self._agrees)
        if all(tap.layer is not None for tap in wanted):
            output = None  # the same whether the run stopped or not
        return self._activations(inputs, real, records, output, lazy_logits if output is None else None)

    def _records(
        self, run: Callable[[dict[str, Any]], Any], inputs: dict[str, Any], wanted: frozenset[Tap], masks: PaddingMasks,
        verify: bool = False, stops: bool = False,
    ) -> tuple[Any, Records]:  # fmt: skip
        """Run the model, and return its output, ``None`` if it stopped, with what was recorded."""
        self._recorder.start(wanted, masks, verify, stops)
        try:
            # A checkpointed layer that is left halfway must be recomputed whole: torch doesn't know where it ended.
            early = set_checkpoint_early_stop(False) if stops else nullcontext()
            with recording(self._recorder), early, model_errors(self._name, inputs):
                output = run(inputs)
        finally:
            records = self._recorder.stop()
        return output, records

    def _states(self, inputs: Mapping[str, Any], place: Key) -> Tensor:
        """Run the model plainly as far as a layer, and return its states as it gave them."""
        nothing: PaddingMasks = dict.fromkeys(self._hooks.layers, (None, None))
        wanted, stops = frozenset({Tap("hidden", place[1], place[0])}), self._can_stop
        _, records = self._records(self._run_model, dict(inputs), wanted, nothing, stops=stops)
        return records.hidden[place]

    def compile(self, **options: Any) -> None:
        """Compile the run, with the options of ``torch.compile``; what isn't wanted of the model is left out of it."""
        self._run = torch.compile(self._run_model, **options)
        self._compiled = True

    @property
    def is_compiled(self) -> bool:
        """Whether the model runs compiled, by :meth:`compile` or by somebody else."""
        return self._compiled or _is_compiled(self.model)

    def inputs(self, batch: Mapping[str, Any], wanted: frozenset[Tap] | None = None) -> dict[str, Any]:
        """Select what the model's ``forward`` knows; labels only where the model's own loss is wanted.

        Args:
            batch: the batch.
            wanted: the taps of this run; all by default.

        Returns:
            The inputs by name; labels stay where the model makes its decoder's input of them.
        """
        model = unwrapped(self.model)
        inputs = model_inputs(model, batch)
        return inputs if Tap("loss") in (self.wanted if wanted is None else wanted) else without_labels(model, inputs)

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def _run_model(self, inputs: dict[str, Any]) -> Any:
        try:
            return self.model(**inputs)
        except StopForward:
            return None

    def _may_stop(self, wanted: frozenset[Tap], batch: Mapping[str, Any]) -> bool:
        """Return whether everything wanted is recorded on the way, and nothing needs the model's end."""
        for tap in wanted:
            labelled = tap.name != "loss" or is_token_labels(batch.get("labels"))
            if tap.layer is None and not (labelled and self._agrees.get(tap.name) and self._behaviour.is_settled):
                return False
        return bool(wanted) and self._can_stop

    @property
    def _can_stop(self) -> bool:
        # An exception would break the graph of a model that somebody else compiled, and leave shards gathered.
        return not (_is_compiled(self.model) or self._sharded)

    @cached_property
    def _sharded(self) -> bool:
        # Looked at once, in the first run that may stop: models are sharded before they train.
        return _is_sharded(self.model)

    def _lazy_logits(self, states: Tensor | None, batch: Mapping[str, Any]) -> LazyLogits | None:
        if states is None or self._hooks.output_layer is None:
            return None
        labels = batch.get("labels")
        fitting = labels if is_token_labels(labels) and labels.shape == states.shape[:-1] else None
        next_token, device = self._behaviour.next_token, states.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return LazyLogits(states, self._hooks.output_layer, fitting, next_token, autocast)

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

    def _masks(self, batch: Mapping[str, Any]) -> PaddingMasks:
        """Return the real queries and the real keys of every stack."""
        model = unwrapped(self.model)
        if not self.info.stacks:
            tokens = encoder_mask(model, batch)
            return {None: (tokens, tokens)}
        tokens, decoder = encoder_mask(coders(model)["encoder"], batch), decoder_mask(model, batch)
        # The model hides no key of its decoder unless it is told: padding comes last there, behind causality.
        keys = token_mask(batch, "decoder_attention_mask")
        return {"encoder": (tokens, tokens), "decoder": (decoder, keys), "cross": (decoder, tokens)}

    def _real(self, stack: str | None, mask: Tensor | None, records: Records, inputs: Mapping[str, Any]) -> Tensor:
        """Return the real tokens of a stack; without padding as many as its queries, its states or the input have."""
        if mask is not None:
            return mask
        for place, record in records.attention.items():
            if place[0] == stack:
                return record.real()
        states = (state for place, state in records.hidden.items() if place[0] == stack)
        first = next(states, None)
        first = main_input(unwrapped(self.model), inputs) if first is None else first
        return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)

    @property
    def _depths(self) -> dict[str | None, int]:
        return {stack: self.info.stack(stack).depth for stack in self.info.stacks or (None,)}

    def _activations(
        self, inputs: Mapping[str, Any], real: Mapping[str | None, Tensor], records: Records, output: Any,
        lazy_logits: LazyLogits | None,
    ) -> Activations:  # fmt: skip
        stacks: dict[str | None, Activations] = {}
        for stack, mask in real.items():
            states = {layer: state for (of, layer), state in records.hidden.items() if of == stack}
            attention = {layer: record for (of, layer), record in records.attention.items() if of == stack}
            prefix, depth = "" if stack is None else f"{stack}.", self.info.stack(stack).depth
            stacks[stack] = Activations(
                Layers(states, depth, f"{prefix}hidden"),
                Layers(attention, depth, f"{prefix}attention"),
                mask,
                output,
                records.modules,
                lazy_logits=lazy_logits,
                traits=TriedTraits(self._behaviour, stack, max(states, default=0), inputs, mask),
                next_token=self._behaviour.next_token,
                why_not_known=self._behaviour.why_not_known,
            )
        if None in stacks:
            return stacks[None]
        named = {stack: seen for stack, seen in stacks.items() if stack is not None}
        return replace(
            named["decoder"], hidden=Layers({}, 0, "hidden"), attention=Layers({}, 0, "attention"), stacks=named
        )


@contextmanager
def model_errors(name: str, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Raise as a `ModelRunError` whatever a model raises of itself: it is not ours, and the batch may be made up."""
    try:
        yield
    except (IldistilError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in inputs.items()}
        raise ModelRunError(f"The {name} failed on a batch of {shapes}: {type(error).__name__}: {error}") from error


def _is_compiled(model: nn.Module) -> bool:
    return hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None


def _is_sharded(model: nn.Module) -> bool:
    """Return whether parameters are gathered for the time of a module's run, which an exception would end too soon."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # slow to import, and rarely needed

    sharded = any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules())
    return sharded or any(hasattr(parameter, "ds_id") for parameter in model.parameters())  # DeepSpeed's third stage
