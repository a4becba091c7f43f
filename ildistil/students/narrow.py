"""Make a model's weights narrower: fewer residual dimensions, attention heads and inner neurons. Internal.

The residual stream is narrowed by a basis ``U`` with orthonormal columns: what reads gets ``W U``, what writes
``U^T W``, and a norm's gain ``g`` becomes the diagonal of ``U^T diag(g) U``. All other axes lose entries, see
:mod:`ildistil.students.axes`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ildistil.errors import ModelError
from ildistil.students.axes import FAMILIES, LAYER_NORM, ROTARY, Heads, Module, inner_axes, modules_of, top
from ildistil.students.calibration import measure

Width = Literal["importance", "pca"]
# In these the norm stands between the stream and its readers: its gain can move into them, which is exact.
_NORM_BEFORE = dict.fromkeys(
    ROTARY - {"modernbert"},
    {f"self_attn.{x}_proj": "input_layernorm" for x in "qkv"}
    | {f"mlp.{x}_proj": "post_attention_layernorm" for x in ("gate", "up")},
) | {
    "gpt2": {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"},
    "modernbert": {"attn.Wqkv": "attn_norm", "mlp.Wi": "mlp_norm"},
}


def narrowed(
    model: PreTrainedModel, student: PreTrainedModel, width: Width, batches: Iterable[Mapping[str, Any]] | None = None
) -> dict[str, Tensor]:
    """Return the model's weights in the widths of a student of its class, under the model's names."""
    family = model.config.model_type
    if family not in FAMILIES:
        raise ModelError(
            f"width={width!r} doesn't know how {type(model).__name__} uses its weights; it knows "
            f"{', '.join(sorted(FAMILIES))}. Make the student with config=... alone, or build it yourself."
        )
    if width == "pca" and batches is None:
        raise ModelError("width='pca' needs calibration batches: pass batches=[...], a few of the training data.")
    modules, others = modules_of(model), modules_of(student)
    heads = Heads.of(model.config, student.config)
    _check_embeddings(modules, others)
    old, new = model.config.hidden_size, student.config.hidden_size
    if new > old:
        raise ModelError(f"The student's hidden_size is {new}, the teacher's {old}: it can't grow.")
    measured = None
    if batches is not None:
        shrinking = ("q", "k", "qkv") if heads.size != heads.new_size else ()
        reads = [m.name for m in modules if m.reads in ("c", "f", "p", "t")]
        measured = measure(model, batches, reads, [m.name for m in modules if m.writes in shrinking])
    norms = _norms_before(modules, _NORM_BEFORE.get(family, {}) if width == "pca" else {})
    bare, centred = {norm.name for norm in norms.values()}, family in LAYER_NORM
    if measured is not None and width == "pca":
        basis = principal_basis(measured.moment, new, centred, _works_on_dimensions(modules, bare))
    else:
        score = _written(modules, family not in _NORM_BEFORE) if measured is None else measured.residual
        basis = torch.eye(old, dtype=torch.double)[:, top(score, new)]
    factor = 1.0 if measured is None or new == old else _norm_factor(measured.moment, basis, centred)
    axes = inner_axes(modules, others, heads, measured)
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    for m in modules:
        weights |= _narrow(m, axes, basis, factor, norms.get(m.name), m.name in bare)
    return weights


def _check_embeddings(modules: list[Module], students: list[Module]) -> None:
    """Check that both models project their embeddings, or neither: ELECTRA does where the widths differ."""
    mine, theirs = ({m.name for m in found if m.name.endswith("embeddings_project")} for found in (students, modules))
    if mine != theirs:
        raise ModelError(
            f"Only one of student and teacher has {(mine ^ theirs).pop()}, which projects embeddings of another width "
            "than the hidden size. Choose embedding_size and hidden_size such that both have it or neither (neither: "
            "set embedding_size to the new hidden_size)."
        )


def _norms_before(modules: list[Module], readers: Mapping[str, str]) -> dict[str, Module]:
    """Return the norms whose gains move into their readers, by the reader's name."""
    by_name = {m.name: m for m in modules}
    pairs = [(m, by_name.get(f"{m.block}.{readers.get(m.name.removeprefix(m.block + '.'))}")) for m in modules]
    return {m.name: norm for m, norm in pairs if norm is not None and (norm.bias is None or m.bias is not None)}


def _works_on_dimensions(modules: list[Module], bare: set[str]) -> bool:
    """Whether gains that stay, or the activation of a head whose decoder is tied, act on single dimensions."""
    gains = [m.weight for m in modules if m.writes == "r" and m.is_norm and m.name not in bare]
    return any(m.writes == m.reads == "r" for m in modules) or any(bool((g != g[0]).any()) for g in gains)


def _norm_factor(moment: Tensor, basis: Tensor, centred: bool) -> float:
    """Return what makes up for norms that divide by the root mean square of fewer dimensions."""
    kept = basis.T @ moment @ basis
    energy = [float(m.trace() - (m.mean() * len(m) if centred else 0)) for m in (kept, moment)]
    return math.sqrt(energy[0] / energy[1] * len(moment) / len(kept))


def principal_basis(moment: Tensor, size: int, centred: bool, aligned: bool = True) -> Tensor:
    """Return orthonormal directions that span the leading principal components of the stream, ``(width, size)``.

    The moment is not centred over tokens: the student's stream must carry the mean too. Where a LayerNorm takes away a
    state's mean over its dimensions (``centred``), the direction of all ones becomes that of all ones: the student's
    norms then take away the same part. ``aligned`` turns the directions within their span as near as possible to
    dimensions of the model, for what acts on these one by one: all of them, where ``size`` is the full width.

    >>> basis = principal_basis(torch.eye(6, dtype=torch.double), 4, centred=True)
    >>> bool(torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.double)))
    True
    """
    old, new = (_to_ones(n) if centred else torch.eye(n, dtype=torch.double) for n in (len(moment), size))
    fixed = int(centred)  # the first direction, once all ones are reflected to it

    def basis(inner: Tensor) -> Tensor:
        padded = nn.functional.pad(inner, (fixed, 0, fixed, 0))
        padded[:fixed, :fixed] = 1
        return old @ padded @ new

    principal = torch.linalg.eigh((old @ moment @ old)[fixed:, fixed:]).eigenvectors.flip(1)[:, : size - fixed]
    if not aligned:
        return basis(principal)
    nearest = torch.eye(len(old), dtype=torch.double)[:, top(basis(principal).square().sum(1), size)]
    left, _, right = torch.linalg.svd(principal.T @ (old @ nearest @ new)[fixed:, fixed:])
    return basis(principal @ left @ right)


def _to_ones(size: int) -> Tensor:
    """The reflection that swaps the first axis and the direction of all ones."""
    normal = -torch.full((size,), size**-0.5, dtype=torch.double)
    normal[0] += 1
    identity = torch.eye(size, dtype=torch.double)
    return identity if size == 1 else identity - 2 * torch.outer(normal, normal) / normal.square().sum()


def _written(modules: list[Module], norms_last: bool) -> Tensor:
    """How large the weights are that write to each residual dimension.

    Where norms write to the stream themselves (BERT), these are their gains and biases alone.
    """
    squares = []
    for m in modules:
        if m.writes == "r" and m.is_norm == norms_last:
            squares.append(m.weight.square() if norms_last else m.weight.square().sum(1))
            squares += [] if m.bias is None else [m.bias.square()]
        elif isinstance(m.module, nn.Embedding) and m.reads == "r" and not norms_last:
            squares.append(m.weight.square().sum(0))
    return torch.stack(squares).sum(0)


def _narrow(
    m: Module, axes: Mapping[tuple[str, str], Tensor], basis: Tensor, factor: float, norm: Module | None, bare: bool
) -> dict[str, Tensor]:
    """Return the narrow weights of a module; ``norm`` moves into it, or it is a ``bare`` norm that has moved."""
    weight, bias = m.weight, m.bias
    if norm is not None:
        bias = bias if bias is None or norm.bias is None else bias + weight @ norm.bias
        weight = weight * norm.weight * factor
    if not m.is_norm:
        narrow = _cut(_cut(weight, m.writes, m.block, axes, basis).T, m.reads, m.block, axes, basis).T
        narrow = narrow.T if isinstance(m.module, Conv1D) else narrow
    elif m.writes == "r":
        narrow = torch.ones(basis.shape[1]) if bare else basis.square().T @ weight * factor
    else:
        narrow = _cut(weight, m.writes, m.block, axes, basis)
    weights = {f"{m.name}.weight": narrow}
    if bias is not None:
        weights[f"{m.name}.bias"] = _cut(torch.zeros_like(bias) if bare else bias, m.writes, m.block, axes, basis)
    return weights


def _cut(value: Tensor, axis: str, block: str, axes: Mapping[tuple[str, str], Tensor], basis: Tensor) -> Tensor:
    """Narrow the first dimension of a tensor."""
    if axis == "-":
        return value
    return basis.T @ value if axis == "r" else value[axes[axis, block]]
