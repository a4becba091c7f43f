"""What can be wanted of a model, and what is known of it before it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ildistil.errors import CaptureError

__all__ = ["STACKS", "ModelInfo", "Role", "Tap", "find_layers", "find_stacks", "unwrapped"]

Role = Literal["student", "teacher"]
# Of an encoder-decoder; "cross" is the decoder's attention to the encoder.
STACKS = ("encoder", "decoder", "cross")


class Tap(NamedTuple):
    """One wanted thing: ``Tap("hidden", 3)``, ``Tap("logits")``, ``Tap("bert.pooler")``.

    >>> str(Tap("hidden", 2, "decoder"))
    'decoder.hidden[2]'
    """

    name: str
    layer: int | None = None
    stack: str | None = None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"[{self.layer}]"
        return f"{'' if self.stack is None else self.stack + '.'}{self.name}{layer}"


@dataclass(frozen=True)
class ModelInfo:
    """What objectives may know of a model before it runs. ``None``: the model's config doesn't say.

    ``positions`` is the longest input that learned position embeddings allow; ``init_layers`` are the teacher layers
    that a student was initialised from; ``stacks`` are the sizes of an encoder-decoder's stacks, empty for a model
    with one; ``next_token`` says that the logits at a position predict the token after it; ``attention_width`` is that
    of all attention heads together, which in some models is not the width of the hidden states.
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

    @classmethod
    def of(cls, model: nn.Module) -> "ModelInfo":
        """Read the sizes of a model from its config; of a plain module only the depth is known."""
        model = unwrapped(model)
        if isinstance(stated := getattr(model, "sizes", None), cls):
            return stated  # a stored teacher has neither layers nor weights to read them from
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
            )
        text = config.get_text_config()
        init_layers = getattr(config, "init_layers", None)
        has_classes = "vocab_size" not in vars(text) or is_classifier(model)
        sizes = cls(
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
        )
        sizes = replace(sizes, attention_width=_attention_width(text, sizes))
        return replace(sizes, stacks=_stack_sizes(model, sizes))

    def stack(self, name: str | None) -> "ModelInfo":
        """Give the sizes of one stack of layers.

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


def _stack_sizes(model: nn.Module, whole: ModelInfo) -> dict[str, ModelInfo]:
    coders = _coders(model)
    sizes: dict[str, ModelInfo] = {}
    for name, coder in coders.items():
        config = getattr(coder, "config", None)
        heads = getattr(config, f"{name}_attention_heads", None) or getattr(config, "num_attention_heads", whole.heads)
        width = getattr(config, "hidden_size", whole.width)
        stack = replace(whole, depth=len(_only_stack(coder)), width=width, heads=heads)
        sizes[name] = replace(stack, attention_width=_attention_width(config, stack))
    return sizes | {"cross": sizes["decoder"]} if sizes else {}


def _attention_width(config: object, sizes: ModelInfo) -> int | None:
    head = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return sizes.width if head is None or sizes.heads is None else head * sizes.heads


def _positions(model: nn.Module) -> int | None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("position_embeddings", "wpe"):
            # RoBERTa counts positions from behind the padding index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def is_classifier(model: nn.Module) -> bool:
    """Tell whether a model's head gives classes."""
    return "Classification" in type(model).__name__


def unwrapped(model: nn.Module) -> nn.Module:
    """Give the module inside ``torch.compile``'s wrapper."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Find the stack of Transformer layers: the outermost ``ModuleList`` as long as the config says the model is deep.

    Gives an empty list when there is none or more than one.
    """
    if _coders(model):
        return []
    stacks = _outermost(model)
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        text = config.get_text_config()
        # ALBERT shares layers in groups; LXMERT's number of layers is a mapping.
        lengths = (getattr(text, "num_hidden_layers", 0), getattr(text, "num_hidden_groups", None))
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
