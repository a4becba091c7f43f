"""What is known of a model before it runs."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from ildistil.capture.layers import coder_layers, coders, find_layers, layered_config, unwrapped
from ildistil.errors import CaptureError

#: Kinds of heads, and what loads a model with one.
HEADS: dict[Any, Any] = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "causal-lm": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before it runs; ``None`` where its config doesn't say.

    Attributes:
        name: its class.
        depth: number of layers.
        width: of the hidden states.
        heads: number of attention heads.
        vocabulary: number of tokens.
        labels: number of outputs of a classifier or a regression.
        problem_type: as in transformers' configs, such as ``"regression"``.
        positions: the longest input that learned position embeddings allow.
        init_layers: the teacher layers that a student was initialised from.
        stacks: the same of an encoder-decoder's stacks, empty for a model with one stack.
        attention_width: of the queries of all attention heads together, which in some models is not the width of the
            hidden states.
        value_width: the same of the values.
        label_names: names of the labels in their order, in lower case; empty where it has none.
        parameters: number of parameters.
        source: name or folder that it was loaded from.
        is_body: whether it is known to have no head: transformers' bare model of its kind.
        head: what is on top, as `ildistil.students.load` names it; ``None`` where that isn't known.
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
    stacks: Mapping[str, "ModelInfo"] = field(default_factory=dict, hash=False)
    attention_width: int | None = None
    value_width: int | None = None
    label_names: tuple[str, ...] = ()
    parameters: int = 0
    source: str | None = None
    is_body: bool = False
    head: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "ModelInfo":
        """Read what the config of a model says; of a plain module little more than the depth is known.

        Args:
            model: any module, compiled or not; it isn't run.

        Returns:
            The info, the same for equal configs and classes but for ``source`` and ``parameters``.

        >>> from transformers import BertConfig, BertModel
        >>> tiny = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
        >>> info = ModelInfo.of(BertModel(BertConfig(num_hidden_layers=2, **tiny)))
        >>> info.depth, info.width, info.vocabulary
        (2, 8, 9)
        """
        model = unwrapped(model)
        layered = layered_config(model)
        if layered is None:
            layers = find_layers(model)
            attention = getattr(layers[0], "self_attn", None) if layers else None
            width, heads = getattr(attention, "embed_dim", None), getattr(attention, "num_heads", None)
            plain = cls(type(model).__name__, len(layers), width, heads, parameters=_count_parameters(model))
            return replace(plain, attention_width=width, value_width=width)
        config: Any = model.config
        init_layers = getattr(config, "init_layers", None)
        has_classes = "vocab_size" not in vars(layered) or is_classifier(model)
        depth = _setting(layered, "num_hidden_layers")
        info = cls(
            name=type(model).__name__,
            depth=depth if isinstance(depth, int) else 0,
            width=_setting(layered, "hidden_size"),
            heads=_setting(layered, "num_attention_heads"),
            vocabulary=_setting(layered, "vocab_size"),
            labels=config.num_labels if has_classes else None,
            problem_type=getattr(config, "problem_type", None),
            positions=_positions(model),
            init_layers=None if init_layers is None else tuple(init_layers),
            label_names=_label_names(config),
            parameters=_count_parameters(model),
            source=getattr(model, "name_or_path", None) or None,
            is_body=is_body(model),
            head=_head(model),
        )
        info = _with_attention(info, layered)
        return replace(info, stacks=_stack_info(model, info))

    def stack(self, name: str | None) -> "ModelInfo":
        """Return the same of one stack: ``"encoder"``, ``"decoder"``, ``"cross"``, or ``None`` for the only one.

        Raises:
            CaptureError: the model has several stacks and none is named, or it has none of this name.
        """
        check_stack(self.name, self.stacks, name)
        return self if name is None else self.stacks[name]


def is_body(model: nn.Module) -> bool:
    """Return whether a model is transformers' bare one of its kind, without a head."""
    return _is_one_of(AutoModel, model)


def _head(model: nn.Module) -> str | None:
    """Return the kind of head of a model of transformers that has one kind alone."""
    found = [head for head, auto in HEADS.items() if _is_one_of(auto, model)]
    return found[0] if len(found) == 1 else None


def _is_one_of(auto: Any, model: nn.Module) -> bool:
    return type(model) in classes_of(auto, getattr(model, "config", None))


def classes_of(auto: Any, config: object) -> tuple[type[PreTrainedModel], ...]:
    """Return the classes that an auto class of transformers makes for a config; usually one."""
    found: Any = auto._model_mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def check_stack(model: str, stacks: Mapping[str, object], name: str | None) -> None:
    """Refuse a name that is no stack of the model."""
    if not stacks and name is not None:
        raise CaptureError(f"The {model} has a single stack of layers, and none named {name!r}. Leave stack out.")
    if stacks and name not in stacks:
        got = "none is named" if name is None else f"none is named {name!r}"
        raise CaptureError(
            f"The {model} has several stacks of layers, and {got}: name one: "
            f"{' or '.join(f'stack={stack!r}' for stack in stacks)}."
        )


def _stack_info(model: nn.Module, whole: ModelInfo) -> dict[str, ModelInfo]:
    info: dict[str, ModelInfo] = {}
    for name, coder in coders(model).items():
        config = getattr(coder, "config", None)
        heads = _setting(config, f"{name}_attention_heads", "num_attention_heads") or whole.heads
        width = _setting(config, "hidden_size") or whole.width
        info[name] = _with_attention(
            replace(whole, depth=len(coder_layers(name, coder)), width=width, heads=heads), config
        )
    return info | {"cross": info["decoder"]} if info else {}


def _label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    id2label = getattr(config, "id2label", None) or {}
    return tuple(str(id2label[number]).lower() for number in sorted(id2label))


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _setting(config: object, *names: str) -> Any:
    """Return the first of some settings that a config makes; ``None`` if it makes none, or layers differ in it."""
    with suppress(RuntimeError):  # how transformers says that they differ
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _with_attention(info: ModelInfo, config: object) -> ModelInfo:
    """Add the widths of the attention: a head may have a size of its own, and another one for values."""
    if getattr(config, "is_heterogeneous", False):
        return replace(info, attention_width=None, value_width=None)
    query, value = _setting(config, "head_dim", "d_kv"), _setting(config, "v_head_dim", "head_dim", "d_kv")
    if (latent := _setting(config, "qk_nope_head_dim")) is not None:  # DeepSeek's head_dim is that of the rotary part
        query = latent + (_setting(config, "qk_rope_head_dim") or 0)
    width = _setting(config, "true_hidden_size") or info.width  # MobileBERT attends in a bottleneck
    widths = (width if head is None or info.heads is None else head * info.heads for head in (query, value))
    return replace(info, attention_width=next(widths), value_width=next(widths))


def _positions(model: nn.Module) -> int | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe"):
            # RoBERTa counts positions from behind the padding index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model's head predicts classes."""
    return "Classification" in type(model).__name__
