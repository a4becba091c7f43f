"""Make a model's weights narrower: fewer residual dimensions, attention heads and inner neurons.

Every module with weights has a *role*: what it reads and what it writes. The table ``_ROLES`` gives roles by the module
names of the families in ``_FAMILIES``. ``r`` is the residual stream, ``e`` the embeddings (the residual stream, unless
they are factorised), ``q k v`` queries, keys and values, ``c`` the attention's context, ``f`` the inner neurons of a
feed-forward block, ``p`` the inner neurons of a head, ``-`` what never changes (vocabulary, labels).

The residual stream is narrowed by a basis ``U`` with orthonormal columns: what reads gets ``W U``, what writes
``U^T W``, and a norm's gain ``g`` becomes the diagonal of ``U^T diag(g) U``. All other axes lose entries.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ildistil.capture import Capture, Tap, find_layers
from ildistil.errors import ModelError

__all__ = ["Width", "narrowed"]

Width = Literal["importance", "pca"]

_LAYER_NORM = {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert", "gpt2", "modernbert"}
_RMS_NORM = {"llama", "mistral", "qwen2", "qwen3"}
_FAMILIES = _LAYER_NORM | _RMS_NORM
_ROTARY = _RMS_NORM | {"modernbert"}

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
    (r"(?:embeddings|predictions|generator_predictions)\.(?:LayerNorm|norm)", "e", "-"),
    (r"(?:output\.|attention\.|transform\.)?LayerNorm|\w*(?:layer_?norm|_norm)|ln_[12f]|norm", "r", "-"),
    (r"(?:word|position|token_type|tok)_embeddings|wte|wpe|embed_tokens", "-", "e"),
    (r"embeddings_project|embedding_hidden_mapping_in", "r", "e"),
    (r"pooler(?:\.dense)?|pre_classifier|classifier\.dense|discriminator_predictions\.dense", "p", "r"),
    (r"classifier|classifier\.out_proj|seq_relationship|dense_prediction|qa_outputs|score", "-", "p"),
    (r"(?:predictions|generator_predictions)\.dense", "e", "r"),
    (r"transform\.dense|(?:lm_head|head)\.dense|vocab_transform", "r", "r"),
    (r"decoder|vocab_projector|generator_lm_head|lm_head", "-", "e"),
]
# In these the norm stands between the stream and its readers: its gain can move into them, which is exact.
_NORM_BEFORE = {
    "gpt2": {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"},
    "modernbert": {"attn.Wqkv": "attn_norm", "mlp.Wi": "mlp_norm"},
}
_NORM_BEFORE |= dict.fromkeys(
    _RMS_NORM,
    {f"self_attn.{x}_proj": "input_layernorm" for x in "qkv"}
    | {f"mlp.{x}_proj": "post_attention_layernorm" for x in ("gate", "up")},
)


@dataclass(frozen=True)
class _Module:
    """A module with weights, what it writes and reads, and the block it belongs to."""

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


@dataclass
class _Measured:
    """Sums over the real tokens of the calibration batches."""

    moment: Tensor | None = None  # of the residual stream: sum of x x^T
    residual: Tensor | None = None  # sum of |x|
    inner: dict[str, Tensor] = field(default_factory=dict)  # by module: mean |x| of what it reads or writes
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def narrowed(
    model: PreTrainedModel, student: PreTrainedModel, width: Width, batches: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Tensor]:
    """Give the model's weights in the student's widths, under the model's names.

    Args:
        model: where the weights come from. It is left as it was.
        student: a model of the same class with the wanted widths; its weights are not read.
        width: ``"importance"`` keeps the most important dimensions, ``"pca"`` rotates the residual stream first.
        batches: calibration batches.

    Raises:
        ModelError: the family or a module is not understood, or the widths can't be reached.
    """
    family = model.config.model_type
    if family not in _FAMILIES:
        raise ModelError(
            f"width={width!r} doesn't know how {type(model).__name__} uses its weights; it knows "
            f"{', '.join(sorted(_FAMILIES))}. Make the student with config=... alone, or build it yourself."
        )
    if width == "pca" and batches is None:
        raise ModelError("width='pca' needs calibration batches: pass batches=[...], a few of the training data.")
    modules = _roles(model)
    heads = _Heads.of(model.config, student.config, rotary=family in _ROTARY)
    measured = None if batches is None else _measure(model, modules, batches, queries=heads.size != heads.new_size)
    others = _roles(student)
    _check_embeddings(modules, others)
    size, last = student.config.hidden_size, family not in _NORM_BEFORE
    basis, factor = _basis(modules, measured, width, size, centred=family in _LAYER_NORM, norms_last=last)
    axes = _inner_axes(modules, others, heads, measured)
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    norms = _norms_before(modules, _NORM_BEFORE.get(family, {}) if width == "pca" else {})
    for module in modules:
        bare = any(norm is module for norm in norms.values())
        weights |= _narrow(module, axes, basis, factor, norms.get(module.name), bare)
    _rescale_queries(weights, modules, heads)
    return weights


def _roles(model: PreTrainedModel) -> list[_Module]:
    found: list[_Module] = []
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
        found.append(_Module(name, module, match[1], match[2], block))
    return _resolved(found)


def _resolved(modules: list[_Module]) -> list[_Module]:
    """Put in what depends on the model: factorised embeddings, heads with and without inner neurons."""
    factorised = any(m.writes == "r" and m.reads == "e" for m in modules)
    inner = any(m.writes == "p" for m in modules)

    def axis(name: str) -> str:
        if name == "e":
            return "-" if factorised else "r"
        return "r" if name == "p" and not inner else name

    return [
        _Module(m.name, m.module, axis(m.writes), axis(m.reads), "" if "p" in (m.writes, m.reads) else m.block)
        for m in modules
    ]


def _check_embeddings(modules: list[_Module], students: list[_Module]) -> None:
    """ELECTRA projects its embeddings only where their width is not the hidden size."""
    mine, theirs = ({m.name for m in found if m.writes == "r"} for found in (students, modules))
    embeddings = {name for name in mine ^ theirs if "embedding" in name}
    if embeddings:
        raise ModelError(
            f"Only one of student and teacher has {embeddings.pop()}, which projects embeddings of another width than "
            "the hidden size. Choose embedding_size and hidden_size such that both have it or neither (neither: set "
            "embedding_size to the new hidden_size)."
        )


@dataclass(frozen=True)
class _Heads:
    """Numbers of query heads and key-value heads and the size of a head, before and after."""

    count: int
    groups: int
    size: int
    new_count: int
    new_groups: int
    new_size: int

    @classmethod
    def of(cls, old: PreTrainedConfig, new: PreTrainedConfig, rotary: bool) -> "_Heads":
        """Read the numbers from two configs and check them."""
        heads = cls(*_head_numbers(old), *_head_numbers(new))
        if rotary and heads.size != heads.new_size:
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


def _measure(
    model: PreTrainedModel, modules: list[_Module], batches: Iterable[Mapping[str, Any]], queries: bool
) -> _Measured:
    """Run the model on the batches and sum up what its modules read."""
    measured, seen = _Measured(), defaultdict(list)
    handles = []
    for m in modules:
        if m.reads in ("c", "f", "p"):
            handles.append(m.module.register_forward_pre_hook(lambda _, x, n=m.name: seen[n].append(x[0])))
        elif queries and m.writes in ("q", "k", "qkv"):
            handles.append(m.module.register_forward_hook(lambda _, x, y, n=m.name: seen[n].append(y)))
    modes = {module: module.training for module in model.modules()}
    capture = Capture(model, [Tap("hidden", i) for i in range(len(_runs(model)) + 1)], role="teacher")
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                inputs = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                activations = capture(inputs)
                _add(measured, seen, list(activations.hidden.values()), activations.mask)
                seen.clear()
    finally:
        capture.close()
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if measured.moment is None:
        raise ModelError("batches has no batch. Pass a list of batches, or a DataLoader.")
    measured.inner = {name: total / measured.counts[name] for name, total in measured.inner.items()}
    return measured


def _runs(model: PreTrainedModel) -> range:
    if not find_layers(model):
        raise ModelError(f"{type(model).__name__} has no single stack of layers to measure.")
    return range(model.config.num_hidden_layers)


def _add(measured: _Measured, seen: Mapping[str, list[Tensor]], hidden: list[Tensor], mask: Tensor) -> None:
    for state in hidden:
        real = state[mask].to("cpu", torch.double)
        moment, size = real.T @ real, real.abs().sum(0)
        measured.moment = moment if measured.moment is None else measured.moment + moment
        measured.residual = size if measured.residual is None else measured.residual + size
    for name, values in seen.items():
        for value in values:
            real = value[mask] if value.shape[:2] == mask.shape and value.ndim == 3 else value.flatten(0, -2)
            total = real.to("cpu", torch.double).abs().sum(0)
            measured.inner[name] = measured.inner.get(name, 0) + total
            measured.counts[name] += len(real)


def _basis(
    modules: list[_Module], measured: _Measured | None, width: Width, size: int, centred: bool, norms_last: bool
) -> tuple[Tensor, float]:
    """Give the basis of the student's residual stream, and the factor that its norms need.

    A norm divides by the root of the mean square: over fewer dimensions that is another number. The factor makes a
    normed vector as long as what the basis keeps of the teacher's.
    """
    writers = [m for m in modules if "r" in (m.writes, m.reads) and m.module.weight.ndim == 2]
    total = next(m.weight.shape[0] if m.writes == "r" else m.weight.shape[1] for m in writers)
    if size > total:
        raise ModelError(f"The student's hidden_size is {size}, the teacher's {total}: it can't grow.")
    if measured is not None and width == "pca":
        assert measured.moment is not None
        basis = principal_basis(measured.moment, size, centred)
    else:
        score = _written(modules, norms_last) if measured is None else measured.residual
        assert score is not None
        basis = torch.eye(total, dtype=torch.double)[:, _top(score, size)]
    if measured is None or size == total:
        return basis, 1.0
    assert measured.moment is not None
    kept, everything = basis.T @ measured.moment @ basis, measured.moment
    energy = [float(m.trace() - (m.mean() * len(m) if centred else 0)) for m in (kept, everything)]
    return basis, math.sqrt(energy[0] / energy[1] * total / size)


def principal_basis(moment: Tensor, size: int, centred: bool) -> Tensor:
    """Give the leading principal directions of the residual stream, ``(width, size)``.

    The moment is not centred over tokens: the student's stream must carry the mean too. Where a LayerNorm takes away a
    state's mean over its dimensions (``centred``), the direction of all ones becomes that of all ones: the student's
    norms then take away the same part. With ``size`` the full width this is a rotation that norms don't notice.

    >>> basis = principal_basis(torch.eye(6, dtype=torch.double), 4, centred=True)
    >>> bool(torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.double)))
    True
    """
    if not centred:
        return _principal(moment, size)
    mirror = _to_ones(len(moment))
    ones, others = mirror[:, :1], mirror[:, 1:]
    principal = others @ _principal(others.T @ moment @ others, size - 1)
    return torch.cat([ones, principal], dim=1) @ _to_ones(size)


def _principal(moment: Tensor, size: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors  # the smallest first
    return vectors.flip(1)[:, :size]


def _to_ones(size: int) -> Tensor:
    """The reflection that swaps the first axis and the direction of all ones."""
    normal = -torch.full((size,), size**-0.5, dtype=torch.double)
    normal[0] += 1
    identity = torch.eye(size, dtype=torch.double)
    return identity if size == 1 else identity - 2 * torch.outer(normal, normal) / normal.square().sum()


def _written(modules: list[_Module], norms_last: bool) -> Tensor:
    """How large the weights are that write to each residual dimension.

    Where norms write to the stream themselves (BERT), these are their gains and biases alone.
    """
    squares = []
    for m in modules:
        bias = _bias(m)
        if m.writes == "r" and (m.weight.ndim == 1) == norms_last:
            squares.append(m.weight.square() if norms_last else m.weight.square().sum(1))
            squares += [] if bias is None else [bias.square()]
        elif isinstance(m.module, nn.Embedding) and m.reads == "r" and not norms_last:
            squares.append(m.weight.square().sum(0))
    return torch.stack(squares).sum(0)


def _top(score: Tensor, count: int) -> Tensor:
    """The places of the highest scores, in their order."""
    if count > len(score):
        raise ModelError(f"The student has {count} inner neurons, the teacher {len(score)}: they can't grow.")
    return torch.sort(torch.sort(score, descending=True, stable=True).indices[:count]).values


def _inner_axes(
    modules: list[_Module], students: list[_Module], heads: _Heads, measured: _Measured | None
) -> dict[tuple[str, str], Tensor]:
    """Give what is kept of each axis but the residual stream, by axis and block."""
    axes: dict[tuple[str, str], Tensor] = {}
    sizes = {m.reads: m.weight.shape[1] for m in students if m.weight.ndim == 2}
    sizes |= {m.writes: m.weight.shape[0] for m in students if m.writes == "p"}
    for block in dict.fromkeys(m.block for m in modules):
        inside = [m for m in modules if m.block == block]
        for axis in ("f", "p"):
            if any(m.writes in (axis, axis * 2) for m in inside):
                score = _score(inside, axis, measured)
                kept = _top(score, sizes[axis])
                axes[axis, block], axes[axis * 2, block] = kept, torch.cat([kept, kept + len(score)])
        if any(m.reads == "c" for m in inside):
            axes |= {(axis, block): kept for axis, kept in _head_axes(inside, heads, measured).items()}
    return axes


def _score(inside: list[_Module], axis: str, measured: _Measured | None) -> Tensor:
    """How important each entry of an axis is: its mean activation, or the norms of the weights around it."""
    reader = next((m for m in inside if m.reads == axis), None)
    if measured is not None and reader is not None and reader.name in measured.inner:
        return measured.inner[reader.name]
    score = torch.ones(1, dtype=torch.double) if reader is None else reader.weight.norm(dim=0)
    for m in inside:
        for part in m.weight.chunk(len(m.writes)) if set(m.writes) == {axis} else ():
            score = score * part.norm(dim=1)
    return score


def _head_axes(inside: list[_Module], heads: _Heads, measured: _Measured | None) -> dict[str, Tensor]:
    """Give what is kept of queries, keys, values and context of a layer, whole heads first."""
    reader = next(m for m in inside if m.reads == "c")
    if measured is None:
        values = _written_by(inside, "v", heads, None).repeat_interleave(heads.shared, dim=0)
        context = values * reader.weight.norm(dim=0).view(heads.count, heads.size)
    else:
        context = measured.inner[reader.name].view(heads.count, heads.size)
    per_group = context.view(heads.groups, heads.shared, heads.size)
    groups = _top(per_group.sum((1, 2)), heads.new_groups).tolist()
    chosen = [g * heads.shared + _top(per_group[g].sum(1), heads.per_group) for g in groups]
    every = torch.arange(heads.size)
    inner = outer = dict.fromkeys(groups, every)
    if heads.new_size != heads.size:  # never with grouped queries: their families are rotary
        match = _written_by(inside, "q", heads, measured) * _written_by(inside, "k", heads, measured)
        inner = {g: _top(match[g], heads.new_size) for g in groups}
        outer = {g: _top(context[g], heads.new_size) for g in groups}
    pairs = [(int(h), g) for g, own in zip(groups, chosen, strict=True) for h in own]
    axes = {
        "q": torch.cat([h * heads.size + inner[g] for h, g in pairs]),
        "k": torch.cat([g * heads.size + inner[g] for g in groups]),
        "v": torch.cat([g * heads.size + outer[g] for g in groups]),
        "c": torch.cat([h * heads.size + outer[g] for h, g in pairs]),
    }
    total = heads.count * heads.size
    return axes | {"qkv": torch.cat([axes["q"], axes["k"] + total, axes["v"] + 2 * total])}


def _written_by(inside: list[_Module], axis: str, heads: _Heads, measured: _Measured | None) -> Tensor:
    """The size of each query, key or value feature, ``(heads, size)``."""
    writer = next(m for m in inside if m.writes in (axis, "qkv"))
    size = writer.weight.norm(dim=1) if measured is None else measured.inner[writer.name]
    if writer.writes == "qkv":
        size = size.chunk(3)["qkv".index(axis)]
    return size.view(-1, heads.size)


def _norms_before(modules: list[_Module], readers: Mapping[str, str]) -> dict[str, _Module]:
    """Give the norms whose gains move into their readers, by the reader's name."""
    by_name = {m.name: m for m in modules}
    found = {}
    for m in modules:
        norm = by_name.get(f"{m.block}.{readers.get(m.name.removeprefix(m.block + '.'))}")
        if norm is not None and (_bias(norm) is None or _bias(m) is not None):
            found[m.name] = norm
    return found


def _bias(m: _Module) -> Tensor | None:
    bias = getattr(m.module, "bias", None)
    return None if bias is None else bias.detach().to("cpu", torch.double)


def _narrow(
    m: _Module,
    axes: Mapping[tuple[str, str], Tensor],
    basis: Tensor,
    factor: float,
    norm: _Module | None,
    bare: bool,
) -> dict[str, Tensor]:
    """Give the narrow weights of a module; ``norm`` moves into it, or it is a ``bare`` norm that has moved."""
    weight, bias = m.weight, _bias(m)
    if norm is not None:
        moved = _bias(norm)
        bias = bias if bias is None or moved is None else bias + weight @ moved
        weight = weight * norm.weight * factor
    if weight.ndim == 2:
        narrow = _cut(_cut(weight, m.writes, m.block, axes, basis).T, m.reads, m.block, axes, basis).T
        narrow = narrow.T if isinstance(m.module, Conv1D) else narrow
    elif m.writes == "-":
        narrow = weight
    else:
        narrow = torch.ones(basis.shape[1]) if bare else basis.square().T @ weight * factor
    weights = {f"{m.name}.weight": narrow}
    if bias is not None:
        bias = torch.zeros_like(bias) if bare else bias
        weights[f"{m.name}.bias"] = _cut(bias, m.writes, m.block, axes, basis)
    return weights


def _rescale_queries(weights: dict[str, Tensor], modules: list[_Module], heads: _Heads) -> None:
    """Undo that a smaller head divides its scores by a smaller root: kept features shall count as before."""
    scale = math.sqrt(heads.new_size / heads.size)
    for m in modules:
        if m.writes in ("q", "qkv") and scale != 1:
            # In a Conv1D what is written comes last, as in a bias; in a Linear first. Queries are the first part.
            for name in (f"{m.name}.weight", f"{m.name}.bias"):
                value = weights[name].clone()
                written = value if name.endswith("bias") or not isinstance(m.module, Conv1D) else value.T
                written[: heads.new_count * heads.new_size] *= scale
                weights[name] = value


def _cut(value: Tensor, axis: str, block: str, axes: Mapping[tuple[str, str], Tensor], basis: Tensor) -> Tensor:
    """Narrow the first dimension of a tensor."""
    if axis == "-":
        return value
    return basis.T @ value if axis == "r" else value[axes[axis, block]]
