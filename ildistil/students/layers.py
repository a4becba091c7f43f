"""Copying layers: the config that describes them, their weights, and what depends on a layer's place. Internal."""

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ildistil.errors import ModelError

# Settings with a value, or an index, for each layer; and how many layers at the start are of one kind.
PER_LAYER = re.compile(
    r".*(layer|(block|attn|visual)_ind|attention_window|indexer_types|sliding_windows|sparsity_pattern).*"
)
_FIRST = {"first_k_dense_replace", "num_dense_layers"}
# What an attention module calls its projection of the queries, in the order they are looked for.
_QUERIES = ("q_attn", "c_attn", "query", "q_lin", "q_proj")
# What is a layer's own: its number, and chance (stochastic depth, BigBird's random blocks).
_OWN = re.compile(r"layer_?(idx|id|index|number)|seed|.*drop.*")
_SCALAR = (bool, int, float, str, type(None))
# In these something that is no layer runs between two of them: DeBERTa-v2's convolution after the first.
_AFTER_FIRST = {"deberta-v2", "sew-d"}
_BETWEEN = re.compile(r"eomt.*|seggpt|granite_speech.*|minicpm.*_vision")


def changed_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of a config with other values.

    Raises:
        ModelError: the config has no such value, or doesn't take it, or names code to run.
    """
    if code := {"trust_remote_code", "auto_map", "custom_generate"} & changes.keys():
        raise ModelError(
            f"{type(config).__name__} has no {min(code)!r}: code that comes with a model is never run. Leave it out; "
            "build a model with code of its own in Python, and pass it to Distiller."
        )
    config = copy.deepcopy(config)
    for key, value in changes.items():
        try:
            if known := hasattr(config, key) and not callable(getattr(config, key)):
                setattr(config, key, value)
        except Exception as error:  # whatever the config's own checks raise
            raise ModelError(f"{type(config).__name__} doesn't take {key}={value!r}: {error}") from error
        if not known:
            raise ModelError(f"{type(config).__name__} has no {key!r}. Name values of its config.")
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        kernel = getattr(part, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel:
            raise ModelError(
                f"The config names {kernel!r} as its attention, code that transformers would fetch from the hub and "
                "run. Choose 'eager', 'sdpa' or an installed flash attention."
            )
    return config


def picked_config(config: PreTrainedConfig, layers: list[int]) -> PreTrainedConfig:
    """Return a copy of a config that describes these layers only."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        if key in _FIRST and isinstance(value, int):
            setattr(text, key, sum(layer <= value for layer in layers))
        elif PER_LAYER.fullmatch(key) and isinstance(value, list):
            indices = all(isinstance(v, int) for v in value) and sorted({*value} & {*range(depth)}) == value
            if indices:
                setattr(text, key, [place for place, layer in enumerate(layers) if layer - 1 in value])
            elif len(value) == depth:
                setattr(text, key, [value[layer - 1] for layer in layers])
    own = {int(n): value for n, value in (text.to_dict().get("per_layer_config") or {}).items()}
    names = getattr(text, "stage_names", None) or ()
    outputs = [layers.index(i) + 1 for i in getattr(text, "out_indices", None) or () if i in layers]
    try:
        text.num_hidden_layers = len(layers)
    except NotImplementedError as error:
        raise ModelError(f"{type(text).__name__} doesn't take a number of layers: {error}") from error
    if own:
        text.per_layer_config = {place: own[n - 1] for place, n in enumerate(layers) if n - 1 in own}
    if len(names) == depth + 1:  # a vision backbone: each layer is a stage that can be an output
        text.stage_names = list(names[: len(layers) + 1])
        text.set_output_features_output_indices(out_features=None, out_indices=outputs or [len(layers)])
    return config


def check_between(config: PreTrainedConfig, layers: list[int]) -> None:
    """Refuse layers around something that runs between them, and whose place is not theirs."""
    text = config.get_text_config()
    after_first = text.model_type in _AFTER_FIRST and bool(getattr(text, "conv_kernel_size", 0)) and layers[0] != 1
    if after_first or (_BETWEEN.fullmatch(text.model_type) and layers != [*range(1, text.num_hidden_layers + 1)]):
        raise ModelError(
            f"In {text.model_type} something that is no layer runs between the layers, and would run elsewhere in the "
            f"student. {'Keep layer 1 as the first' if after_first else 'Keep all layers'}, or start from random "
            "weights (layers=None)."
        )


def origin(stack: str, layers: list[int]) -> Callable[[str], str]:
    """Return the function from a name in the student to that in the teacher; ``stack`` is the path of the layers."""
    inside = re.compile("^" + re.escape(stack) + r"\.(\d+)(?=\.|$)")
    return lambda name: inside.sub(lambda match: f"{stack}.{layers[int(match[1])] - 1}", name)


def pick_weights(weights: Mapping[str, Tensor], stack: str, layers: list[int]) -> dict[str, Tensor]:
    """Return the weights of these layers, and those outside the stack, under the student's names."""
    picked = {name: value for name, value in weights.items() if not name.startswith(f"{stack}.")}
    for place, layer in enumerate(layers):
        old = f"{stack}.{layer - 1}."
        picked |= {f"{stack}.{place}.{n.removeprefix(old)}": v for n, v in weights.items() if n.startswith(old)}
    return picked


def scale_queries(
    weights: dict[str, Tensor], teacher: nn.Module, student: nn.Module, name_in_teacher: Callable[[str], str]
) -> None:
    """Keep the scores of attention that divides them by another number in its new place, or with smaller heads."""
    theirs = dict(teacher.named_modules())
    for name, mine in student.named_modules():
        was = getattr(theirs.get(name_in_teacher(name)), "scaling", None)
        if (query := _query(mine)) is None or was in (None, mine.scaling):
            continue
        layer = getattr(mine, query)
        for key in [f"{name}.{query}.{part}" for part, _ in layer.named_parameters()]:
            value = weights[key].clone()
            # In a Conv1D what is written comes last, as in a bias; in a Linear first. Queries are the first part.
            written = value.T if isinstance(layer, Conv1D) and value.ndim == 2 else value
            written[: len(written) // (3 if query == "c_attn" else 1)] *= was / mine.scaling
            weights[key] = value


def _query(module: nn.Module) -> str | None:
    """Name the projection of the queries of an attention module whose scores are a multiple of it."""
    if not isinstance(getattr(module, "scaling", None), float) or any("norm" in n for n, _ in module.named_children()):
        return None
    return next((name for name in _QUERIES if isinstance(getattr(module, name, None), nn.Linear | Conv1D)), None)


def check_places(
    student: PreTrainedModel, whole: PreTrainedModel, stack: str, name_in_teacher: Callable[[str], str]
) -> None:
    """Refuse layers of which a module is of another kind, or has another setting, than in its place in ``whole``.

    That is a model of all layers, with the same config otherwise; its weights are not read.
    """
    theirs = dict(whole.named_modules(remove_duplicate=False))
    for name, mine in student.named_modules(remove_duplicate=False):
        old = name_in_teacher(name)
        inside = name.startswith(f"{stack}.") and not _OWN.fullmatch(name.rpartition(".")[2])
        if inside and (what := _difference(mine, theirs.get(old), moved=old != name)):
            raise ModelError(
                f"The teacher's {old} would work otherwise as the student's {name}: {what}. Choose layers that are "
                "alike in their new places (ModernBERT's first layer has no norm: it must stay the first), or start "
                "from random weights (layers=None)."
            )


def _difference(mine: nn.Module, was: nn.Module | None, moved: bool) -> str:
    """Describe how a module differs from the one whose weights it takes."""
    if was is None or type(mine).__name__ != type(was).__name__:
        return f"it is a {type(mine).__name__}, and was {'nothing' if was is None else f'a {type(was).__name__}'}"
    query, own = _query(mine), vars(was)
    if moved and getattr(mine, "scale_attn_by_inverse_layer_idx", False) and query is None:
        return "it divides its scores by the layer's number"
    for key, value in vars(mine).items():
        compared = isinstance(value, _SCALAR) and isinstance(own.get(key), _SCALAR)
        ignored = key.startswith("_") or _OWN.fullmatch(key) or (key == "scaling" and query is not None)
        if compared and not ignored and value != own.get(key):
            return f"{key} is {value!r}, and was {own.get(key)!r}"
    return ""
