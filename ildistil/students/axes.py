"""What a module's weights write and read, and which entries of an axis a narrower model keeps. Internal.

Every module with weights has a *role*: the axis it writes and the axis it reads. ``_ROLES`` gives roles by the module
names of the families in ``FAMILIES``. ``r`` is the residual stream, ``e`` the embeddings (the residual stream, unless
they are factorised), ``q k v`` queries, keys and values, ``c`` the attention's context, ``f`` the inner neurons of a
feed-forward block, ``p`` those of a pooler or classifier, ``t`` those of a head's transform (the embeddings, where the
decoder is tied to them), ``-`` what never changes (vocabulary, labels).
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ildistil.errors import ModelError
from ildistil.students.calibration import Measured

LAYER_NORM = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "gpt2", "modernbert"}
FAMILIES = LAYER_NORM | {"llama", "mistral", "qwen2", "qwen3"}
ROTARY = FAMILIES - LAYER_NORM | {"modernbert"}

# Module names, what they write, what they read; the first match counts.
_ROLES = [
    (r"attention\.self\.query|attention\.(?:q_lin|query)|self_attn\.q_proj", "q", "r"),
    (r"attention\.self\.key|attention\.(?:k_lin|key)|self_attn\.k_proj", "k", "r"),
    (r"attention\.self\.value|attention\.(?:v_lin|value)|self_attn\.v_proj", "v", "r"),
    (r"attn\.(?:c_attn|Wqkv)", "qkv", "r"),
    (r"attention\.(?:output\.dense|out_lin|dense)|self_attn\.o_proj|attn\.(?:c_proj|Wo)", "r", "c"),
    (r"intermediate\.dense|ffn\.lin1|ffn|mlp\.(?:gate_proj|up_proj|c_fc)", "f", "r"),
    (r"mlp\.Wi", "ff", "r"),
    (r"output\.dense|ffn\.lin2|ffn_output|mlp\.(?:down_proj|c_proj|Wo)", "r", "f"),
    (r"self_attn\.[qk]_norm", "-", "-"),
    (r"embeddings\.(?:LayerNorm|norm)", "e", "-"),
    (r"(?:transform|(?:generator_)?predictions)\.LayerNorm|lm_head\.layer_norm|vocab_layer_norm|head\.norm", "t", "-"),
    (r"(?:output\.|attention\.)?LayerNorm|\w*(?:layer_?norm|_norm)|ln_[12f]|norm", "r", "-"),
    (r"(?:word|position|token_type|tok)_embeddings|wte|wpe|embed_tokens", "-", "e"),
    (r"embeddings_project|embedding_hidden_mapping_in", "r", "e"),
    (r"pooler(?:\.dense)?|pre_classifier|(?:classifier|discriminator_predictions)\.dense|\w+_summary\.\w+", "p", "r"),
    (r"classifier(?:\.out_proj)?|seq_relationship|dense_prediction|qa_outputs|score|\w+_head\.summary", "-", "p"),
    (r"(?:transform|(?:generator_)?predictions|lm_head|head)\.dense|vocab_transform", "t", "r"),
    (r"decoder|vocab_projector|generator_lm_head|lm_head", "-", "t"),
]


@dataclass(frozen=True)
class Module:
    """A module with weights, the axes it writes and reads, and the block it belongs to."""

    name: str
    module: Any
    writes: str
    reads: str
    block: str

    @property
    def weight(self) -> Tensor:
        """The weight as (written, read), in double precision."""
        weight: Tensor = self.module.weight.detach().to("cpu", torch.double)
        return weight.T if isinstance(self.module, Conv1D) else weight

    @property
    def is_norm(self) -> bool:
        """Whether the weight is one gain per entry."""
        return bool(self.module.weight.ndim == 1)

    @property
    def bias(self) -> Tensor | None:
        """The bias in double precision, if there is one."""
        bias = getattr(self.module, "bias", None)
        return None if bias is None else bias.detach().to("cpu", torch.double)


def modules_of(model: PreTrainedModel) -> list[Module]:
    """Return the modules with weights of a model, with their roles."""
    found: list[Module] = []
    for name, module in model.named_modules():
        own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
        if not own or own == ["bias"]:  # a bias of its own is that of a decoder, one value per word
            continue
        match = next((r for r in _ROLES if re.fullmatch(rf"(?:.*\.)?(?:{r[0]})", name)), None)
        if match is None or set(own) - {"weight", "bias"}:
            raise ModelError(
                f"The weights {name}.{own[0]} of {type(model).__name__} have no role that width=... knows. Make the "
                "student with config=... alone, or build it yourself."
            )
        block = re.sub(rf"\.?(?:{match[0]})$", "", name)
        found.append(Module(name, module, match[1], match[2], block))
    decoder = model.get_output_embeddings()
    return _resolved(found, tied=decoder is not None and decoder.weight is model.get_input_embeddings().weight)


def _resolved(modules: list[Module], tied: bool) -> list[Module]:
    """Put in what depends on the model: factorised embeddings, heads with and without inner neurons."""
    factorised = any(m.writes == "r" and m.reads == "e" for m in modules)
    written = {m.writes for m in modules}

    def axis(name: str) -> str:
        if name == "p" and "p" not in written:
            name = "t" if "t" in written else "r"
        if name == "t" and (tied or "t" not in written):
            name = "e"
        return ("-" if factorised else "r") if name == "e" else name

    resolved = [replace(m, writes=axis(m.writes), reads=axis(m.reads)) for m in modules]
    return [replace(m, block="") if {"p", "t"} & {m.writes, m.reads} else m for m in resolved]


@dataclass(frozen=True)
class Heads:
    """Numbers of query heads and key-value heads and the size of a head, before and after."""

    count: int
    groups: int
    size: int
    new_count: int
    new_groups: int
    new_size: int

    @classmethod
    def of(cls, old: PreTrainedConfig, new: PreTrainedConfig) -> "Heads":
        """Read the numbers from two configs and check them."""
        heads = cls(*_head_numbers(old), *_head_numbers(new))
        if old.model_type in ROTARY and heads.size != heads.new_size:
            raise ModelError(
                f"The student's head size is {heads.new_size}, the teacher's {heads.size}. Rotary position embeddings "
                "turn pairs of features of a head at fixed speeds, so none can be left out: keep the head size "
                f"(hidden_size / num_attention_heads, or head_dim) at {heads.size}."
            )
        if heads.new_size > heads.size:
            raise ModelError(
                f"The student's head size is {heads.new_size}, the teacher's {heads.size}: heads can't grow. Set "
                f"num_attention_heads to hidden_size / {heads.size}, or to more."
            )
        if heads.new_count % heads.new_groups or heads.new_groups > heads.groups or heads.per_group > heads.shared:
            raise ModelError(
                f"{heads.new_count} heads with {heads.new_groups} key-value heads can't be chosen from the teacher's "
                f"{heads.count} with {heads.groups}. Take at most {heads.groups} key-value heads "
                f"(num_key_value_heads), each with at most {heads.shared} heads."
            )
        return heads

    @property
    def shared(self) -> int:
        """How many query heads share a key-value head."""
        return self.count // self.groups

    @property
    def per_group(self) -> int:
        """How many will."""
        return self.new_count // self.new_groups


def _head_numbers(config: PreTrainedConfig) -> tuple[int, int, int]:
    heads: int = config.num_attention_heads
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise ModelError(f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={heads}.")
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


def top(score: Tensor, count: int) -> Tensor:
    """Return the places of the highest scores, in their order."""
    if count > len(score):
        raise ModelError(f"The student has {count} inner neurons, the teacher {len(score)}: they can't grow.")
    return torch.sort(torch.sort(score, descending=True, stable=True).indices[:count]).values


def inner_axes(
    modules: list[Module], students: list[Module], heads: Heads, measured: Measured | None
) -> dict[tuple[str, str], Tensor]:
    """Return what is kept of each axis but the residual stream, by axis and block."""
    axes: dict[tuple[str, str], Tensor] = {}
    sizes = {m.writes: m.weight.shape[0] for m in students} | {m.reads: m.weight.shape[-1] for m in students}
    for block in dict.fromkeys(m.block for m in modules):
        inside = [m for m in modules if m.block == block]
        for axis in ("f", "p", "t"):
            if any(m.writes in (axis, axis * 2) for m in inside):
                score = _score(inside, axis, measured)
                kept = top(score, sizes[axis])
                axes[axis, block], axes[axis * 2, block] = kept, torch.cat([kept, kept + len(score)])
        if any(m.reads == "c" for m in inside):
            axes |= {(axis, block): kept for axis, kept in _head_axes(inside, heads, measured).items()}
    return axes


def _score(inside: list[Module], axis: str, measured: Measured | None) -> Tensor:
    """How important each entry of an axis is: its mean activation, or the norms of the weights around it."""
    reader = next((m for m in inside if m.reads == axis), None)
    if measured is not None and reader is not None and reader.name in measured.inner:
        return measured.inner[reader.name]
    score = torch.ones(1, dtype=torch.double) if reader is None else reader.weight.norm(dim=0)
    for m in inside:
        for part in m.weight.chunk(len(m.writes)) if set(m.writes) == {axis} and not m.is_norm else ():
            score = score * part.norm(dim=1)
    return score


def _head_axes(inside: list[Module], heads: Heads, measured: Measured | None) -> dict[str, Tensor]:
    """Return what is kept of queries, keys, values and context of a layer, whole heads first."""
    reader = next(m for m in inside if m.reads == "c")
    if measured is None:
        values = _written_by(inside, "v", heads, None).repeat_interleave(heads.shared, dim=0)
        context = values * reader.weight.norm(dim=0).view(heads.count, heads.size)
    else:
        context = measured.inner[reader.name].view(heads.count, heads.size)
    per_group = context.view(heads.groups, heads.shared, heads.size)
    groups = top(per_group.sum((1, 2)), heads.new_groups).tolist()
    chosen = [g * heads.shared + top(per_group[g].sum(1), heads.per_group) for g in groups]
    every = torch.arange(heads.size)
    inner = outer = dict.fromkeys(groups, every)
    if heads.new_size != heads.size:  # never with grouped queries: their families are rotary
        match = _written_by(inside, "q", heads, measured) * _written_by(inside, "k", heads, measured)
        inner = {g: top(match[g], heads.new_size) for g in groups}
        outer = {g: top(context[g], heads.new_size) for g in groups}
    pairs = [(int(h), g) for g, own in zip(groups, chosen, strict=True) for h in own]
    axes = {
        "q": torch.cat([h * heads.size + inner[g] for h, g in pairs]),
        "k": torch.cat([g * heads.size + inner[g] for g in groups]),
        "v": torch.cat([g * heads.size + outer[g] for g in groups]),
        "c": torch.cat([h * heads.size + outer[g] for h, g in pairs]),
    }
    total = heads.count * heads.size
    return axes | {"qkv": torch.cat([axes["q"], axes["k"] + total, axes["v"] + 2 * total])}


def _written_by(inside: list[Module], axis: str, heads: Heads, measured: Measured | None) -> Tensor:
    """The size of each query, key or value feature, ``(heads, size)``."""
    writer = next(m for m in inside if m.writes in (axis, "qkv"))
    size = writer.weight.norm(dim=1) if measured is None else measured.inner[writer.name]
    if writer.writes == "qkv":
        size = size.chunk(3)["qkv".index(axis)]
    return size.view(-1, heads.size)
