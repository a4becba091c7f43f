"""What is read of some families only: attention outside ``AttentionInterface``, and layers that end elsewhere.

A row of :data:`FAMILIES` names for a class of attention modules the projections that are recorded, and how query, key,
value, scale and bias come out of them. What a method adds to the scores is recorded by a wrapper of this method, set
once for the class; outside a captured run it does nothing.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ildistil.capture.interface import active_recorder
from ildistil.capture.recorder import Recorder

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How the attention of a class of modules is read.

    Attributes:
        projections: the submodules whose output is recorded, the first one of a run of the module.
        read: assembles query, key, value and scale from the recorded parts.
        bias_method: the method whose result is added to the scores; recorded as the part ``"bias"``.
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


def attach(layers: Iterable[nn.Module], recorder: Recorder) -> list[Any]:
    """Hook the attention modules of known families, and return the handles: none where the family is unknown."""
    handles: list[Any] = []
    for module in {m: None for layer in layers for m in layer.modules()}:
        family = FAMILIES.get(_name(module))
        if family is None:
            continue
        if family.bias_method is not None:
            _record_bias(type(module), family.bias_method)
        for name in family.projections:
            hook = functools.partial(_record_projection, recorder, name)
            handles.append(module.get_submodule(name).register_forward_hook(hook))
        hook = functools.partial(_record_attention, recorder, family)
        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return handles


def layer_ends(model: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the modules whose output is that of each layer, mostly the layer itself.

    DeBERTa-v2 may run a convolution beside its first layer, and joins both.
    """
    for module in model.modules():
        if _name(module) == "modeling_deberta_v2.DebertaV2Encoder" and isinstance(module.conv, nn.Module):
            return [module.conv, *layers[1:]]
    return layers


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__.rsplit('.', 1)[-1]}.{type(module).__name__}"


def _record_projection(recorder: Recorder, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    if recorder.active:
        recorder.record_part(name, output)


def _record_attention(
    recorder: Recorder, family: Family, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    if not recorder.active:
        return
    parts = recorder.take_parts()
    if not set(family.projections) <= parts.keys():
        return  # the module took another way; that the attention is missing is found at the end of the run
    read = family.read(module, parts)
    query = read["query"]
    bias = parts.get("bias")
    if bias is None:
        bias = _argument("position_bias", 2, args, kwargs) if family.bias_method is None else None
    elif bias.ndim == 3:  # batch and heads in one
        bias = bias.view(-1, query.shape[1], *bias.shape[1:])
    mask, more = _argument("attention_mask", 1, args, kwargs), {"position_bias": bias}
    recorder.record_attention(module, query, read["key"], read["value"], mask, read["scale"], more, read.get("unknown"))


def _argument(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _record_bias(kind: type, method: str) -> None:
    """Wrap a method so that its result is recorded: no hook sees it, and a copied model would keep its own wrapper."""
    original = getattr(kind, method)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        recorder = active_recorder()
        if recorder is not None and isinstance(result, Tensor):
            recorder.record_part("bias", result)
        return result

    setattr(kind, method, recording)
