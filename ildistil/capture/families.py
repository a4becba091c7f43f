"""Families whose attention doesn't go through ``AttentionInterface``, and how to read it: hooks on the projections.

A row of :data:`FAMILIES` says for a class of attention modules which projections are noted, and how query, key, value,
scale and bias come out of them. What a method adds to the scores is noted by a wrapper of this method, set once for
the class; outside a captured run it does nothing.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ildistil.capture.attention import Notebook, notebook

__all__ = ["FAMILIES", "Family", "attach"]

Parts = dict[str, Tensor]


class _Book(Notebook, Protocol):
    active: bool

    def take_parts(self) -> Parts:
        """Give the noted parts and forget them."""


@dataclass(frozen=True)
class Family:
    """How the attention of a class of modules is read.

    Attributes:
        projections: the submodules whose output is noted, the first one of a run of the module.
        read: puts query, key, value, scale and bias together, as the keywords of ``Attention``.
        bias_method: the method whose result is added to the scores; noted as the part ``"bias"``.
    """

    projections: tuple[str, ...]
    read: Callable[[Any, Parts], dict[str, Any]]
    bias_method: str | None = None


def _heads(x: Tensor, module: Any) -> Tensor:
    """(batch, tokens, width) -> (batch, heads, tokens, size)."""
    return x.view(*x.shape[:-1], module.num_attention_heads, -1).transpose(1, 2)


def _mpnet(module: Any, parts: Parts) -> dict[str, Any]:
    query, key, value = (_heads(parts[name], module) for name in ("q", "k", "v"))
    return {"query": query, "key": key, "value": value, "scale": query.shape[-1] ** -0.5}


def _deberta(module: Any, parts: Parts) -> dict[str, Any]:
    query, key, value = _heads(parts["in_proj"], module).chunk(3, dim=-1)
    query = query + _heads(module.q_bias[None, None], module)
    value = value + _heads(module.v_bias[None, None], module)
    mixed = "its heads are mixed after the product (talking_head)" if module.head_logits_proj is not None else None
    scale = (query.shape[-1] * (1 + len(module.pos_att_type))) ** -0.5
    return {"query": query, "key": key, "value": value, "scale": scale, "unknown": mixed}


def _deberta_v2(module: Any, parts: Parts) -> dict[str, Any]:
    query, key, value = (_heads(parts[f"{name}_proj"], module) for name in ("query", "key", "value"))
    kinds = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
    return {"query": query, "key": key, "value": value, "scale": (query.shape[-1] * kinds) ** -0.5}


FAMILIES = {
    "modeling_mpnet.MPNetSelfAttention": Family(("q", "k", "v"), _mpnet),
    "modeling_deberta.DisentangledSelfAttention": Family(("in_proj",), _deberta, "disentangled_att_bias"),
    "modeling_deberta_v2.DisentangledSelfAttention": Family(
        ("query_proj", "key_proj", "value_proj"), _deberta_v2, "disentangled_attention_bias"
    ),
}


def attach(layers: Iterable[nn.Module], book: _Book) -> list[Any]:
    """Put hooks on the attention modules of known families; gives their handles, none where the family is unknown."""
    handles: list[Any] = []
    for module in {m: None for layer in layers for m in layer.modules()}:
        family = FAMILIES.get(f"{type(module).__module__.rsplit('.', 1)[-1]}.{type(module).__name__}")
        if family is None:
            continue
        if family.bias_method is not None:
            _note_bias(type(module), family.bias_method)
        for name in family.projections:
            hook = functools.partial(_note_projection, book, name)
            handles.append(module.get_submodule(name).register_forward_hook(hook))
        handles.append(module.register_forward_hook(functools.partial(_note_attention, book, family), with_kwargs=True))
    return handles


def _note_projection(book: _Book, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    if book.active:
        book.note_part(name, output)


def _note_attention(
    book: _Book, family: Family, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if not book.active:
        return
    parts = book.take_parts()
    if not set(family.projections) <= parts.keys():
        return  # the module took another way; that the attention is missing is found at the end of the run
    read = family.read(module, parts)
    query = read["query"]
    bias = parts.get("bias")
    if bias is None:
        bias = _argument("position_bias", 2, args, kwargs) if family.bias_method is None else None
    elif bias.ndim == 3:  # batch and heads in one
        bias = bias.view(-1, query.shape[1], *bias.shape[1:])
    mask = _argument("attention_mask", 1, args, kwargs)
    if mask is not None and not mask.is_floating_point():
        mask = mask.bool()
    more = {"position_bias": bias}
    book.note_attention(module, query, read["key"], read["value"], mask, read["scale"], more, read.get("unknown"))


def _argument(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _note_bias(kind: type, method: str) -> None:
    """Have a method's result noted, in every instance; hooks can't see it, and an instance's own would be copied."""
    original = getattr(kind, method)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        book = notebook()
        if book is not None and isinstance(result, Tensor):
            book.note_part("bias", result)
        return result

    setattr(kind, method, noting)
