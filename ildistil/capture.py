"""Run a model and record what objectives want of it.

A *tap* is a named thing an objective wants: ``hidden`` and ``attention`` (per layer), ``logits``, ``loss`` (the
model's own supervised loss), or the path of any submodule, whose output is then recorded. A :class:`Capture` owns one
model, records only the wanted layers, and leaves outputs and speed of the model as they were:

- hidden states come from forward hooks on the model's stack of layers;
- attention comes from the function that transformers' ``AttentionInterface`` calls in each layer: ours notes query,
  key and value (after rotary embedding, before dropout) and calls the implementation the model had (sdpa, eager,
  flash, flex). No attention map is ever asked of the model.

Layers are numbered ``1..L``; ``hidden[0]`` is the embedding output, ``hidden[i]`` the output of layer ``i`` (before
any final norm of the model), ``attention[i]`` belongs to layer ``i``.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Activations", "Attention", "Capture", "CaptureError", "Layers", "Sizes", "Tap"]

Role = Literal["student", "teacher"]
T = TypeVar("T")
_PREFIX = "ildistil_"
# What transformers hands to attention functions beside the tensors that doesn't change the scores.
_HARMLESS = {
    "dropout", "is_causal", "sliding_window", "softcap", "position_bias", "position_ids", "use_cache", "cache",
    "cache_position", "past_key_values", "output_attentions", "output_hidden_states", "return_dict", "deterministic",
    "layer_idx", "target_dtype", "num_items_in_batch", "encoder_hidden_states", "token_type_ids",
}  # fmt: skip


class CaptureError(RuntimeError):
    """A model did not give what was wanted of it."""


class Tap(NamedTuple):
    """One wanted thing: ``Tap("hidden", 3)``, ``Tap("logits")``, ``Tap("bert.pooler")``."""

    name: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name}[{self.layer}]"


@dataclass(frozen=True)
class Sizes:
    """What objectives may know of a model before it runs. ``None``: the model's config doesn't say.

    ``positions`` is the longest input that learned position embeddings allow; ``init_layers`` are the teacher layers
    that a student was initialised from.
    """

    name: str
    depth: int
    width: int | None = None
    heads: int | None = None
    vocabulary: int | None = None
    labels: int | None = None
    problem_type: str | None = None
    positions: int | None = None
    init_layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Sizes":
        """Read the sizes of a model from its config; of a plain module only the depth is known."""
        model = unwrapped(model)
        config = getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            stack = find_layers(model)
            attention = getattr(stack[0], "self_attn", None) if stack else None
            return cls(
                type(model).__name__,
                len(stack),
                getattr(attention, "embed_dim", None),
                getattr(attention, "num_heads", None),
            )
        text = config.get_text_config()
        init_layers = getattr(config, "init_layers", None)
        has_classes = "vocab_size" not in vars(text) or _is_classifier(model)
        return cls(
            name=type(model).__name__,
            depth=getattr(text, "num_hidden_layers", 0),
            width=getattr(text, "hidden_size", None),
            heads=getattr(text, "num_attention_heads", None),
            vocabulary=getattr(text, "vocab_size", None),
            labels=config.num_labels if has_classes else None,
            problem_type=getattr(config, "problem_type", None),
            positions=_positions(model),
            init_layers=None if init_layers is None else tuple(init_layers),
        )


def _positions(model: nn.Module) -> int | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe"):
            # RoBERTa counts positions from behind the padding index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def _is_classifier(model: nn.Module) -> bool:
    return "Classification" in type(model).__name__


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, in one form whatever the model and its implementation.

    ``query`` is ``(batch, heads, queries, head size)``; ``key`` and ``value`` may have fewer heads (grouped-query
    attention). ``key_mask`` and ``query_mask`` are boolean ``(batch, tokens)``, ``None`` when nothing is padded;
    ``window`` is the number of positions a query reaches to each side it may look at, itself included.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    mask_as_passed: Tensor | None = None  # kept only for the check in a dry run

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[1]

    def scores(self) -> Tensor:
        """Give the scores before the softmax, ``(batch, heads, queries, keys)``, at least in float32.

        ``softcap * tanh(q k^T scale / softcap) + bias``, without masks: see :meth:`allowed`.
        """
        with torch.autocast(self.query.device.type, enabled=False):
            query, key = (
                x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (self.query, self.key)
            )
            groups = query.shape[1] // key.shape[1]
            if groups > 1:
                key = key.repeat_interleave(groups, dim=1)
            scores = query @ key.transpose(-1, -2) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            return scores if self.bias is None else scores + self.bias

    def allowed(self) -> Tensor:
        """Tell which keys a query may attend to: boolean, ``(batch or 1, 1, queries, keys)``."""
        queries, keys, device = self.query.shape[2], self.key.shape[2], self.query.device
        distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed & (distance >= 0)
        if self.window is not None:
            allowed = allowed & (distance.abs() < self.window)
        return allowed if self.key_mask is None else allowed & self.key_mask[:, None, None, :]

    def real_queries(self) -> Tensor:
        """Tell which queries are real tokens: boolean, ``(batch, queries)``."""
        if self.query_mask is not None:
            return self.query_mask
        return torch.ones(self.query.shape[0], self.query.shape[2], dtype=torch.bool, device=self.query.device)


class Layers(Mapping[int, T]):
    """What was recorded per layer, by layer number; negative numbers count from the last layer of the model.

    >>> states = Layers({0: "embedding", 3: "last"}, depth=3, what="hidden")
    >>> states[-1]
    'last'
    """

    def __init__(self, records: dict[int, T], depth: int, what: str) -> None:
        self._records, self._depth, self._what = records, depth, what

    def __getitem__(self, layer: int) -> T:
        number = layer + self._depth + 1 if layer < 0 else layer
        try:
            return self._records[number]
        except KeyError:
            raise CaptureError(
                f"{self._what}[{layer}] was not captured; captured: {sorted(self._records) or 'nothing'}. "
                f"Name it in the objective's taps (taps = ('{self._what}',) captures every layer)."
            ) from None

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._records))

    def __len__(self) -> int:
        return len(self._records)


@dataclass(frozen=True)
class Activations:
    """What one captured run gave.

    ``mask`` is boolean ``(batch, tokens)``, true where a token is real; ``modules`` holds outputs by module path.
    """

    hidden: Layers[Tensor]
    attention: Layers[Attention]
    mask: Tensor
    output: Any
    modules: dict[str, Any] = field(default_factory=dict)

    @property
    def logits(self) -> Tensor:
        """The model's logits."""
        return _from_output(self.output, "logits")

    @property
    def loss(self) -> Tensor:
        """The model's own supervised loss."""
        return _from_output(self.output, "loss")


def _from_output(output: Any, name: str) -> Tensor:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if value is None and name == "logits" and isinstance(output, Tensor):
        value = output
    if not isinstance(value, Tensor):
        remedy = (
            "Give the batch 'labels' and use a model with a head that computes a loss"
            if name == "loss"
            else "Use a model with a head, such as AutoModelForSequenceClassification"
        )
        raise CaptureError(f"The model's output ({type(output).__name__}) has no {name!r}. {remedy}.")
    return value


class Capture:
    """Runs one model while recording the wanted taps.

    Args:
        model: any module; for the ``attention`` tap a transformers model that uses ``AttentionInterface``.
        wanted: the taps to record.
        role: ``"student"`` or ``"teacher"``, for messages, and because a teacher gets no labels.

    Raises:
        CaptureError: the model can't give a wanted tap; says why and what to do.

    The hooks are registered here, once, so make the capture before the model is compiled. They record only during
    :meth:`__call__`: validation, export and the recomputation of checkpointed layers cost nothing. :meth:`close`
    removes them.
    """

    def __init__(self, model: nn.Module, wanted: Iterable[Tap], role: Role = "student") -> None:
        self.model, self.role = model, role
        self.sizes = Sizes.of(model)
        self.wanted = frozenset(wanted)
        self._recorder = _Recorder(self.wanted)
        self._layers: list[nn.Module] = []
        self._handles: list[Any] = []
        self._previous_attention: str | None = None
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def __call__(
        self, batch: Mapping[str, Any], *, wanted: frozenset[Tap] | None = None, verify: bool = False
    ) -> Activations:
        """Run the model on a batch.

        Args:
            batch: a mapping; what the model's ``forward`` does not name is left out.
            wanted: the taps to record this time, some of those the capture was made for; ``None``: all of them.
            verify: also check that the masks the model passed to its attention are those that were understood.

        Raises:
            CaptureError: something wanted did not arrive, or the capture was not made for it.
        """
        global _current
        wanted = self._of_this_run(wanted)
        self._refuse_reentrant_checkpointing()
        recorder, mask = self._recorder, self._token_mask(batch)
        recorder.start(wanted, mask, verify)
        _current = recorder
        try:
            output = self.model(**self.inputs(batch, wanted))
            attention, hidden, modules = dict(recorder.attention), dict(recorder.hidden), dict(recorder.modules)
        finally:
            _current = None
            layers_run = recorder.stop()
        self._check_complete(wanted, layers_run, hidden, attention, modules)
        if verify:
            for layer, record in attention.items():
                self._check_mask(layer, record)
        if mask is None:
            mask = _full_mask(batch, hidden, attention)
        depth = self.sizes.depth
        return Activations(
            Layers(hidden, depth, "hidden"), Layers(attention, depth, "attention"), mask, output, modules
        )

    def inputs(self, batch: Mapping[str, Any], wanted: frozenset[Tap] | None = None) -> dict[str, Any]:
        """Select what the model's ``forward`` knows; labels only where the model's own loss is wanted."""
        inputs = model_inputs(unwrapped(self.model), batch)
        if Tap("loss") not in (self.wanted if wanted is None else wanted):
            inputs.pop("labels", None)
        return inputs

    def _of_this_run(self, wanted: frozenset[Tap] | None) -> frozenset[Tap]:
        if wanted is None:
            return self.wanted
        if unknown := sorted(str(tap) for tap in wanted - self.wanted):
            raise CaptureError(
                f"The capture of the {self.role} was not made for {', '.join(unknown)}; it was made for "
                f"{', '.join(sorted(map(str, self.wanted))) or 'nothing'}. Name all taps when it is made."
            )
        return wanted

    def close(self) -> None:
        """Remove the hooks and give the model its attention implementation back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        model = unwrapped(self.model)
        if self._previous_attention is not None and isinstance(model, PreTrainedModel):
            _diverted[model] -= 1
            if _diverted[model] == 0:
                model.set_attn_implementation(self._previous_attention)
            self._previous_attention = None

    def _attach(self) -> None:
        model, recorder = unwrapped(self.model), self._recorder
        paths = [tap.name for tap in self.wanted if tap.name not in ("hidden", "attention", "logits", "loss")]
        if recorder.wanted_hidden or recorder.wanted_attention:
            self._layers = find_layers(model)
            if not self._layers:
                raise CaptureError(
                    f"The {self.role} {self.sizes.name} has no single stack of layers to number 1..L (an "
                    "encoder-decoder has two). Tap its modules by their paths instead."
                )
            for layer in self._layers:
                self._handles.append(layer.register_forward_pre_hook(recorder.before_layer, with_kwargs=True))
                self._handles.append(layer.register_forward_hook(recorder.after_layer))
        if recorder.wanted_attention:
            self._previous_attention = _divert_attention(model, self.role)
        modules = dict(model.named_modules())
        for path in paths:
            if path not in modules:
                raise CaptureError(
                    f"The {self.role} {self.sizes.name} has no module {path!r}. A tap is 'hidden', 'attention', "
                    f"'logits', 'loss' or a module's path; at the top are {[n for n, _ in model.named_children()]}."
                )
            self._handles.append(modules[path].register_forward_hook(recorder.module_hook(path)))

    def _refuse_reentrant_checkpointing(self) -> None:
        for layer in self._layers:
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if function is not None and getattr(function, "keywords", {}).get("use_reentrant"):
                raise CaptureError(
                    f"The {self.role} uses reentrant gradient checkpointing, which gives captured tensors wrong "
                    "gradients. Enable it with gradient_checkpointing_enable(), whose default is not reentrant."
                )

    def _token_mask(self, batch: Mapping[str, Any]) -> Tensor | None:
        mask = batch.get("attention_mask")
        if mask is None and batch.get("src_key_padding_mask") is not None:
            mask = ~batch["src_key_padding_mask"].bool()  # torch's own Transformer marks what is padding
        if mask is None:
            unknown = [key for key in batch if key.endswith("padding_mask") and batch[key] is not None]
            if unknown:
                raise CaptureError(
                    f"The batch marks padding by {unknown[0]!r}, which is not understood, so padding would count. Name "
                    "it attention_mask (1 for real tokens) or src_key_padding_mask (true for padding)."
                )
            return None
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise CaptureError(
                f"attention_mask must have the shape (batch, tokens), got {tuple(mask.shape)}. Objectives count real "
                "tokens by it; packed and custom masks are not understood."
            )
        return mask != 0

    def _check_complete(
        self,
        wanted: frozenset[Tap],
        layers_run: int,
        hidden: dict[int, Tensor],
        attention: dict[int, Attention],
        modules: dict[str, Any],
    ) -> None:
        recorder = self._recorder
        if (recorder.wanted_hidden or recorder.wanted_attention) and layers_run != self.sizes.depth:
            raise CaptureError(
                f"The {self.role} {self.sizes.name} ran {layers_run} layers, its depth is {self.sizes.depth}. "
                "Switch off whatever skips layers (layerdrop, early exit)."
            )
        missing: list[Tap] = [Tap("hidden", k) for k in sorted(recorder.wanted_hidden - hidden.keys())]
        missing += [Tap("attention", k) for k in sorted(recorder.wanted_attention - attention.keys())]
        missing += [t for t in wanted if t.name in recorder.paths and t.name not in modules]
        if missing:
            remedy = (
                "Its attention does not go through transformers' AttentionInterface; use hidden-state objectives, or "
                "tap its modules by path."
                if missing[0].name == "attention"
                else "Check that its forward really runs this module."
            )
            raise CaptureError(
                f"The {self.role} {self.sizes.name} did not give {', '.join(map(str, missing))}. {remedy}"
            )

    def _check_mask(self, layer: int, record: Attention) -> None:
        passed = record.mask_as_passed
        if passed is None or passed.ndim != 4:
            return  # nothing is masked, or a flash kernel got the two-dimensional mask itself
        understood = record.allowed() & record.real_queries()[:, None, :, None]
        passed = passed if passed.dtype == torch.bool else passed > torch.finfo(passed.dtype).min / 2
        if not torch.equal(understood, (passed & record.real_queries()[:, None, :, None]).expand_as(understood)):
            raise CaptureError(
                f"attention[{layer}] of the {self.role} {self.sizes.name} uses a mask that is not its padding mask"
                f"{', causality' if record.causal else ''}{' and window' if record.window else ''}. Attention "
                "objectives would compare maps the model never makes; use hidden-state objectives for this model."
            )


class _Recorder:
    """The records of one model's runs. Plain ints, dicts and a flag, which torch.compile can trace through."""

    def __init__(self, wanted: frozenset[Tap]) -> None:
        self.want(wanted)
        self.paths: set[str] = set()
        self.active = self.verify = False
        self.layer = 0
        self.mask: Tensor | None = None
        self.hidden: dict[int, Tensor] = {}
        self.attention: dict[int, Attention] = {}
        self.modules: dict[str, Any] = {}

    def want(self, wanted: frozenset[Tap]) -> None:
        self.wanted_hidden = {tap.layer for tap in wanted if tap.name == "hidden" and tap.layer is not None}
        self.wanted_attention = {tap.layer for tap in wanted if tap.name == "attention" and tap.layer is not None}
        self.wanted_names = {tap.name for tap in wanted}

    def start(self, wanted: frozenset[Tap], mask: Tensor | None, verify: bool) -> None:
        self.want(wanted)
        self.active, self.verify, self.layer, self.mask = True, verify, 0, mask

    def stop(self) -> int:
        layers = self.layer
        self.active, self.layer, self.mask = False, 0, None
        self.hidden, self.attention, self.modules = {}, {}, {}
        return layers

    def before_layer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.active:
            return
        # By call order, not by index: ALBERT runs one module L times.
        self.layer += 1
        if self.layer == 1 and 0 in self.wanted_hidden:
            self.hidden[0] = args[0] if args else kwargs["hidden_states"]

    def after_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.active and self.layer in self.wanted_hidden:
            state = output if isinstance(output, Tensor) else output[0]
            if state.is_nested:
                raise CaptureError(
                    "The layers give nested tensors. Build the TransformerEncoder with enable_nested_tensor=False."
                )
            self.hidden[self.layer] = state

    def module_hook(self, path: str) -> Callable[..., None]:
        self.paths.add(path)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.active and path in self.wanted_names:
                self.modules[path] = output

        return hook

    def record_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
        kwargs: dict[str, Any],
    ) -> None:  # fmt: skip
        if not self.active or self.layer not in self.wanted_attention:
            return
        if self.layer in self.attention:
            raise CaptureError(f"Layer {self.layer} runs several attentions; only self-attention is understood.")
        unknown = [name for name, v in kwargs.items() if v is not None and v is not False and name not in _HARMLESS]
        if unknown:
            raise CaptureError(
                f"{type(module).__name__} passes {unknown} to its attention, which may change the scores and is not "
                "understood. Use hidden-state objectives for this model."
            )
        causal = kwargs.get("is_causal")
        self.attention[self.layer] = Attention(
            query=query,
            key=key,
            value=value,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            causal=bool(getattr(module, "is_causal", False) if causal is None else causal),
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            bias=kwargs.get("position_bias"),
            key_mask=self.mask,
            query_mask=self.mask,
            mask_as_passed=mask if self.verify else None,
        )


_current: _Recorder | None = None
# How many captures a model's attention is diverted for: two engines may share one teacher.
_diverted: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def _recording(delegate: str) -> Callable[..., Any]:
    """Make the attention function that records and then calls the model's own implementation."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if _current is not None:
            _current.record_attention(module, query, key, value, attention_mask, scaling, kwargs)
        if delegate == "eager":
            # Each model file has its own eager function; there is no common one.
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[delegate]
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def _divert_attention(model: nn.Module, role: Role) -> str | None:
    """Switch a model to the recording twin of its attention implementation; gives the previous one."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise CaptureError(
            f"The attention of the {role} {name} can't be captured: it does not go through transformers' "
            "AttentionInterface. Use hidden-state objectives, or tap its modules by path."
        )
    _diverted[model] = _diverted.get(model, 0) + 1
    previous: str = model.config._attn_implementation
    if previous.startswith(_PREFIX):
        return previous.removeprefix(_PREFIX)
    twin = _PREFIX + previous.replace("/", "_")
    if twin not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(twin, _recording(previous))
        AttentionMaskInterface.register(twin, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    model.set_attn_implementation(twin)
    return previous


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the module inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Find the stack of Transformer layers: the outermost ``ModuleList`` as long as the config says the model is deep.

    Gives an empty list when there is none or more than one.
    """
    stacks: list[list[nn.Module]] = []
    inside: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            if not any(path.startswith(outer) for outer in inside):
                stacks.append(list(module))
            inside.add(path + ".")
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        text = config.get_text_config()
        lengths = {
            getattr(text, "num_hidden_layers", 0),
            getattr(text, "num_hidden_groups", None),
        }  # ALBERT shares layers in groups
        stacks = [stack for stack in stacks if len(stack) in lengths]
    return stacks[0] if len(stacks) == 1 else []


def separate_configs(student: nn.Module, teacher: nn.Module) -> None:
    """Give the student copies of all configs it shares with the teacher.

    Switching the attention implementation writes to the config, so a shared one would switch both models.
    """
    theirs = {id(m.config) for m in teacher.modules() if hasattr(m, "config")}
    copies: dict[int, Any] = {}
    for module in student.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) in theirs:
            module.config = copies.setdefault(id(config), copy.deepcopy(config))


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Select what a model's ``forward`` names; everything but ``row_id`` if it takes anything."""
    names = _input_names(model)
    inputs = {k: v for k, v in batch.items() if k != "row_id" and (not names or k in names)}
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def _input_names(model: nn.Module) -> frozenset[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def _full_mask(batch: Mapping[str, Any], hidden: dict[int, Tensor], attention: dict[int, Attention]) -> Tensor:
    """A mask for a batch without padding."""
    for state in hidden.values():
        return torch.ones(state.shape[:2], dtype=torch.bool, device=state.device)
    for record in attention.values():
        return record.real_queries()
    first = next((v for v in batch.values() if isinstance(v, Tensor) and v.ndim >= 2), None)
    if first is None:
        raise CaptureError(f"The batch has no tensor of shape (batch, ...): its keys are {sorted(batch)}.")
    return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
