"""Make a student: from chosen layers of the teacher, or at random."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ildistil.capture import find_layers

__all__ = ["init_student"]


def init_student(
    teacher: PreTrainedModel,
    layers: Sequence[int] | None = None,
    config: PreTrainedConfig | Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Make a student of the teacher's architecture.

    Args:
        teacher: any transformers model.
        layers: the teacher layers the student starts from, numbered ``1..L`` (negative: from the end), first to last;
            ``[1, 2, 3]`` gives three layers. Embeddings, head and everything outside the layers are copied too.
            ``None`` starts from random weights.
        config: with ``layers``: values to change in the copied config (dropout, say) that leave all shapes alone.
            Without: a whole config, or values to change in the teacher's (``{"num_hidden_layers": 3}``).

    Returns:
        The student, in train mode, in float32, on the teacher's device, with a config of its own. Its config notes
        the layers as ``init_layers``, which the mapping ``FromInit`` reads.

    Raises:
        ValueError: a layer is out of range; there are neither layers nor config; the config's labels or vocabulary
            are not the teacher's; or shapes differ from those of the copied layers.

    >>> from transformers import BertConfig, BertModel
    >>> tiny = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
    >>> teacher = BertModel(BertConfig(num_hidden_layers=4, **tiny))
    >>> student = init_student(teacher, layers=[2, 4])
    >>> bool((student.encoder.layer[1].output.dense.weight == teacher.encoder.layer[3].output.dense.weight).all())
    True
    """
    if not isinstance(teacher, PreTrainedModel):
        raise ValueError(
            f"init_student copies transformers models, got {type(teacher).__name__}. Build the student yourself and "
            "pass both to Distiller."
        )
    if layers is None and config is None:
        raise ValueError("init_student needs layers=[...] to copy, or config=... for a random student.")
    if layers is None:
        return _random(teacher, config)
    if isinstance(config, PreTrainedConfig):
        raise ValueError("With layers=..., config takes only changed values, such as {'hidden_dropout_prob': 0.0}.")
    return _from_layers(teacher, _resolve(layers, teacher.config.get_text_config().num_hidden_layers), config or {})


def _random(teacher: PreTrainedModel, config: PreTrainedConfig | Mapping[str, Any] | None) -> PreTrainedModel:
    own = _changed(config, {}) if isinstance(config, PreTrainedConfig) else _changed(teacher.config, config or {})
    own.init_layers = None
    for key, what in (("vocab_size", "vocabulary"), ("num_labels", "number of labels")):
        mine, theirs = getattr(own, key, None), getattr(teacher.config, key, None)
        if mine != theirs:
            raise ValueError(
                f"The student's {what} is {mine}, the teacher's {theirs}. Both must agree: set {key}={theirs} in the "
                "student's config."
            )
    if type(own) is not type(teacher.config):
        raise ValueError(
            f"init_student makes a {type(teacher).__name__}; got a {type(own).__name__}. For a student of another "
            "family build it yourself, and pass it to Distiller."
        )
    return _finished(type(teacher)(own), teacher)


def _from_layers(teacher: PreTrainedModel, layers: list[int], changes: Mapping[str, Any]) -> PreTrainedModel:
    stack = find_layers(teacher)
    if not stack:
        raise ValueError(
            f"{type(teacher).__name__} has no single stack of layers to choose from. Make the student with config=... "
            "or build it yourself."
        )
    config = _changed(teacher.config, {})
    _keep_layers(config, layers)
    config = _changed(config, changes)
    config.init_layers = list(layers)
    # The random weights are all overwritten: making them must not disturb the caller's random state.
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(config)
    shared = len(stack) != teacher.config.get_text_config().num_hidden_layers  # ALBERT: one module runs L times
    weights = teacher.state_dict() if shared else _select(teacher, stack, layers)
    _load(student, weights)
    return _finished(student, teacher)


def _resolve(layers: Sequence[int], depth: int) -> list[int]:
    resolved = [layer + depth + 1 if layer < 0 else layer for layer in layers]
    bad = [layer for layer, number in zip(layers, resolved, strict=True) if not 1 <= number <= depth]
    if bad or not resolved:
        what = f"got {bad[0]}" if bad else "got none"
        raise ValueError(f"layers must be teacher layers 1..{depth} (or -1..{-depth} from the end), {what}.")
    return resolved


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    unknown = [key for key in changes if not hasattr(config, key)]
    if unknown:
        raise ValueError(f"{type(config).__name__} has no {unknown[0]!r}. Name values of the teacher's config.")
    for key, value in changes.items():
        setattr(config, key, value)
    # A teacher under capture runs a recording twin of its attention; the student starts with the plain one.
    implementation = config._attn_implementation
    if implementation is not None:
        config._attn_implementation = implementation.removeprefix("ildistil_")
    return config


def _keep_layers(config: PreTrainedConfig, layers: list[int]) -> None:
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for key, value in list(vars(text).items()):
        # Per-layer settings, such as ModernBERT's and Qwen's layer_types.
        if isinstance(value, list) and len(value) == depth and "layer" in key:
            setattr(text, key, [value[layer - 1] for layer in layers])
    text.num_hidden_layers = len(layers)


def _select(teacher: PreTrainedModel, stack: list[nn.Module], layers: list[int]) -> dict[str, Tensor]:
    """The teacher's weights under the student's names."""
    path = next(name for name, module in teacher.named_modules() if module is stack[0]).removesuffix(".0")
    inside = re.compile(re.escape(path) + r"\.(\d+)\.(.*)")
    weights: dict[str, Tensor] = {}
    for name, value in teacher.state_dict().items():
        if match := inside.fullmatch(name):
            for new, old in enumerate(layers):
                if old == int(match[1]) + 1:
                    weights[f"{path}.{new}.{match[2]}"] = value
        else:
            weights[name] = value
    return weights


def _load(student: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    own = student.state_dict()
    wrong = [name for name in own if name not in weights or own[name].shape != weights[name].shape]
    wrong += [name for name in weights if name not in own]
    if wrong:
        raise ValueError(
            f"These weights of the teacher don't fit the student: {wrong[:3]}. Either the config changes a shape, "
            "which copied layers can't follow (use layers=None), or a layer differs in kind from the one whose place "
            "it takes (ModernBERT's first layer has no norm: it must stay the first)."
        )
    student.load_state_dict(weights)


def _finished(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    return student.float().to(teacher.device).train()
