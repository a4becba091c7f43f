"""What is known of a model before it runs, and where its layers are."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ildistil.errors import CaptureError

__all__ = ["ModelInfo", "check_stack", "find_layers", "find_stacks", "is_classifier", "unwrapped"]


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
        next_token: whether the logits at a position predict the token after it.
        attention_width: of all attention heads together, which in some models is not the width of the hidden states.
        label_names: names of the labels in their order, in lower case; empty where it has none.
        parameters: number of parameters.
        source: name or folder that it was loaded from.
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
    next_token: bool = False
    attention_width: int | None = None
    label_names: tuple[str, ...] = ()
    parameters: int = 0
    source: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "ModelInfo":
        """Read what the config of a model says; of a plain module little more than the depth is known."""
        model = unwrapped(model)
        config = getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            layers = find_layers(model)
            attention = getattr(layers[0], "self_attn", None) if layers else None
            return cls(
                type(model).__name__,
                len(layers),
                getattr(attention, "embed_dim", None),
                getattr(attention, "num_heads", None),
                attention_width=getattr(attention, "embed_dim", None),
                parameters=_count_parameters(model),
            )
        text = config.get_text_config()
        init_layers = getattr(config, "init_layers", None)
        has_classes = "vocab_size" not in vars(text) or is_classifier(model)
        info = cls(
            name=type(model).__name__,
            depth=getattr(text, "num_hidden_layers", 0),
            width=getattr(text, "hidden_size", None),
            heads=getattr(text, "num_attention_heads", None),
            vocabulary=getattr(text, "vocab_size", None),
            labels=config.num_labels if has_classes else None,
            problem_type=getattr(config, "problem_type", None),
            positions=_positions(model),
            init_layers=None if init_layers is None else tuple(init_layers),
            next_token=type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")),
            label_names=_label_names(config),
            parameters=_count_parameters(model),
            source=getattr(model, "name_or_path", None) or None,
        )
        info = replace(info, attention_width=_attention_width(text, info))
        return replace(info, stacks=_stack_info(model, info))

    def stack(self, name: str | None) -> "ModelInfo":
        """Return the info of one stack of layers.

        Args:
            name: ``"encoder"``, ``"decoder"`` or ``"cross"``; ``None`` for the one stack of other models.

        Raises:
            CaptureError: the model has several stacks and none is named, or it has none of this name.
        """
        check_stack(self.name, self.stacks, name)
        return self if name is None else self.stacks[name]


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
    coders = _coders(model)
    info: dict[str, ModelInfo] = {}
    for name, coder in coders.items():
        config = getattr(coder, "config", None)
        heads = getattr(config, f"{name}_attention_heads", None) or getattr(config, "num_attention_heads", whole.heads)
        width = getattr(config, "hidden_size", whole.width)
        stack = replace(whole, depth=len(_only_stack(coder)), width=width, heads=heads)
        info[name] = replace(stack, attention_width=_attention_width(config, stack))
    return info | {"cross": info["decoder"]} if info else {}


def _label_names(config: PreTrainedConfig) -> tuple[str, ...]:
    id2label = getattr(config, "id2label", None) or {}
    return tuple(str(id2label[number]).lower() for number in sorted(id2label))


def _count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _attention_width(config: object, info: ModelInfo) -> int | None:
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return info.width if head is None or info.heads is None else head * info.heads


def _positions(model: nn.Module) -> int | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe"):
            # RoBERTa counts positions from behind the padding index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def is_classifier(model: nn.Module) -> bool:
    """Return whether a model's head predicts classes."""
    return "Classification" in type(model).__name__


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Find the stack of Transformer layers: the outermost ``ModuleList`` as long as the config says the model is deep.

    Return an empty list when there is none or more than one.
    """
    if _coders(model):
        return []
    stacks = _outermost(model)
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        text = config.get_text_config()
        lengths = {
            getattr(text, "num_hidden_layers", 0),
            getattr(text, "num_hidden_groups", None),
        }  # ALBERT shares layers in groups
        stacks = [stack for stack in stacks if len(stack) in lengths]
    return stacks[0] if len(stacks) == 1 else []


def find_stacks(model: nn.Module) -> dict[str | None, list[nn.Module]]:
    """Find the layers of every stack: ``encoder`` and ``decoder``, or those of the only stack under ``None``."""
    coders = _coders(model)
    return {name: _only_stack(coder) for name, coder in coders.items()} if coders else {None: find_layers(model)}


def _coders(model: nn.Module) -> dict[str, nn.Module]:
    """The encoder and the decoder of an encoder-decoder; empty for other models."""
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "is_encoder_decoder", False):
        return {}
    encoder, decoder = model.get_encoder(), model.get_decoder()
    # The encoder of such a model, taken alone, has its config and finds itself.
    alone = encoder is model or decoder is model or encoder is decoder
    return {} if alone else {"encoder": encoder, "decoder": decoder}


def _only_stack(model: nn.Module) -> list[nn.Module]:
    stacks = _outermost(model)
    return stacks[0] if len(stacks) == 1 else []


def _outermost(model: nn.Module) -> list[list[nn.Module]]:
    stacks: list[list[nn.Module]] = []
    inside: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            if not any(path.startswith(outer) for outer in inside):
                stacks.append(list(module))
            inside.add(path + ".")
    return stacks
