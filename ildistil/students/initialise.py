"""Make a student: from chosen layers of the teacher or of another checkpoint, as wide or narrower, or at random."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ildistil.capture import find_layers
from ildistil.errors import ModelError
from ildistil.students.layers import (
    PER_LAYER,
    changed_config,
    check_between,
    check_places,
    origin,
    pick_weights,
    picked_config,
    scale_queries,
)
from ildistil.students.narrow import Width, narrowed


def init_student(
    teacher: PreTrainedModel,
    layers: Sequence[int] | None = None,
    config: PreTrainedConfig | Mapping[str, Any] | None = None,
    *,
    width: Width | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    source: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Make a student of the teacher's architecture.

    Args:
        teacher: any transformers model.
        layers: the teacher layers the student starts from, numbered ``1..L`` (negative: from the end), first to last;
            ``[1, 2, 3]`` gives three layers. Embeddings, head and everything outside the layers are copied too.
            ``None`` starts from random weights.
        config: with ``layers``: values to change in the copied config (dropout, say) that leave all shapes alone.
            Without: a whole config, or values to change in the teacher's (``{"num_hidden_layers": 3}``). With
            ``width`` it may make the model narrower: ``{"hidden_size": 256, "num_attention_heads": 4}``.
        width: how narrower weights are made from the teacher's. ``"importance"`` keeps the most important residual
            dimensions (the same in all layers), attention heads, features in a head and inner neurons: those with
            the largest mean absolute activation on ``batches``, or, without batches, with the largest weights.
            ``"pca"`` takes the leading principal components of the hidden states as the residual stream, and the
            rest by importance. ``layers`` is then by default all.
        batches: calibration batches for ``width``. The teacher runs on them in eval mode and is left as it was.
        source: another model of the teacher's architecture that the layers, embeddings and norms come from, such as
            the pretrained model before fine-tuning. What it lacks (the head, maybe the pooler) comes from the teacher.

    Returns:
        The student, in train mode, in float32, on the teacher's device, with a config of its own. Its config notes
        the layers as ``init_layers``, which the mapping ``FromInit`` reads.

    Raises:
        ModelError: a layer is out of range, or would compute something else in its new place; there are neither layers
            nor config; the config's labels or vocabulary are not the teacher's; transformers can't build the student by
            its config, or load it again; shapes differ from those of the copied layers; ``width`` does not know the
            family or can't reach the widths; or the source's architecture, vocabulary, depth or shapes are not the
            teacher's.

    >>> from transformers import BertConfig, BertModel
    >>> tiny = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
    >>> teacher = BertModel(BertConfig(num_hidden_layers=4, **tiny))
    >>> student = init_student(teacher, layers=[2, 4])
    >>> bool((student.encoder.layer[1].output.dense.weight == teacher.encoder.layer[3].output.dense.weight).all())
    True
    """
    if not isinstance(teacher, PreTrainedModel):
        raise ModelError(
            f"init_student copies transformers models, got {type(teacher).__name__}. Build the student yourself and "
            "pass both to Distiller."
        )
    if width is not None:
        _check_width(width, config)
        layers = range(1, _depth(teacher) + 1) if layers is None else layers
    elif batches is not None:
        raise ModelError("batches are for width=...: pass width='importance' or width='pca' too.")
    if layers is None and source is not None:
        raise ModelError("source=... gives layers to copy: name them, as in layers=[1, 2, 3].")
    if layers is None and config is None:
        raise ModelError("init_student needs layers=[...] to copy, or config=... for a random student.")
    if layers is None:
        return _random(teacher, config)
    if isinstance(config, PreTrainedConfig):
        raise ModelError("With layers=..., config takes only changed values, such as {'hidden_dropout_prob': 0.0}.")
    numbers = _resolve(layers, _depth(teacher))
    return _from_layers(teacher if source is None else _merged(teacher, source), numbers, config or {}, width, batches)


def _check_width(width: str, config: object) -> None:
    if width not in get_args(Width):
        raise ModelError(f"width must be 'importance', 'pca' or None, got {width!r}.")
    if not config:
        raise ModelError("width=... makes a narrower student: say how narrow, as in config={'hidden_size': 256}.")


def _merged(teacher: PreTrainedModel, source: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the teacher's class with the source's weights, and the teacher's where the source has none."""
    if not isinstance(source, PreTrainedModel) or type(source.config) is not type(teacher.config):
        got = type(source).__name__
        raise ModelError(f"source must be of the teacher's architecture, {type(teacher).__name__}; got a {got}.")
    mine, theirs = source.config.get_text_config(), teacher.config.get_text_config()
    for key, what in (("vocab_size", "vocabulary"), ("num_hidden_layers", "number of layers")):
        if getattr(mine, key, None) != getattr(theirs, key, None):
            raise ModelError(
                f"The source's {what} is {getattr(mine, key, None)}, the teacher's {getattr(theirs, key, None)}. Both "
                f"must agree ({key}); the student reads the teacher's tokens, and layers have the teacher's numbers."
            )
    weights, given = teacher.state_dict(), source.base_model.state_dict()
    prefix = "" if teacher.base_model is teacher else f"{teacher.base_model_prefix}."
    ties = _ties(weights)
    for name, value in given.items():
        for own in ties.get(prefix + name, ()):
            if weights[own].shape != value.shape:
                raise ModelError(
                    f"The source's {name} has the shape {tuple(value.shape)}, the teacher's "
                    f"{tuple(weights[own].shape)}. Take a source with the teacher's sizes; width=... can make both "
                    "narrower."
                )
            weights[own] = value
    with torch.random.fork_rng(devices=[]):
        merged = _built(teacher, changed_config(teacher.config, {}))
    merged.load_state_dict(weights)
    return merged.to(teacher.device)


def _ties(weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return, for each name, all names of the same tensor: embeddings and the decoder that is tied to them."""
    names: dict[tuple[int, torch.Size], list[str]] = {}
    for name, value in weights.items():
        names.setdefault((value.data_ptr(), value.shape), []).append(name)
    return {name: same for same in names.values() for name in same}


def _depth(teacher: PreTrainedModel) -> int:
    if not find_layers(teacher):
        raise ModelError(_no_stack(teacher))
    depth: int = teacher.config.get_text_config().num_hidden_layers
    return depth


def _no_stack(teacher: PreTrainedModel) -> str:
    return (
        f"{type(teacher).__name__} has no single stack of layers to choose from, whose number is in its config. Make "
        "the student with config=... or build it yourself."
    )


def _random(teacher: PreTrainedModel, config: PreTrainedConfig | Mapping[str, Any] | None) -> PreTrainedModel:
    start, changes = (config, {}) if isinstance(config, PreTrainedConfig) else (teacher.config, config or {})
    own = changed_config(start, changes)
    depth, before = (getattr(c.get_text_config(), "num_hidden_layers", 0) for c in (own, start))
    if depth < before:  # settings with a value for each layer: those of the first ones
        own = changed_config(picked_config(start, [*range(1, depth + 1)]), changes)
    own.init_layers = None
    for key, what in (("vocab_size", "vocabulary"), ("num_labels", "number of labels")):
        mine, theirs = getattr(own, key, None), getattr(teacher.config, key, None)
        if mine != theirs:
            raise ModelError(
                f"The student's {what} is {mine}, the teacher's {theirs}. Both must agree: set {key}={theirs} in the "
                "student's config."
            )
    if type(own) is not type(teacher.config):
        raise ModelError(
            f"init_student makes a {type(teacher).__name__}; got a {type(own).__name__}. For a student of another "
            "family build it yourself, and pass it to Distiller."
        )
    return _finished(_built(teacher, own), teacher)


def _from_layers(
    teacher: PreTrainedModel,
    layers: list[int],
    changes: Mapping[str, Any],
    width: Width | None,
    batches: Iterable[Mapping[str, Any]] | None,
) -> PreTrainedModel:
    stack = find_layers(teacher)
    path = next(name for name, module in teacher.named_modules() if module is stack[0]).removesuffix(".0")
    shared = len(stack) != _depth(teacher)  # ALBERT: few modules run L times
    if shared:
        _check_groups(len(stack), _depth(teacher), layers)
    check_between(teacher.config, layers)
    config = changed_config(picked_config(teacher.config, layers), changes)
    config.init_layers = list(layers)
    if config.get_text_config().num_hidden_layers != len(layers):
        raise ModelError(f"layers={layers} says how many layers the student has: leave their number out of config.")
    same = changed_config(teacher.config, {k: v for k, v in changes.items() if not PER_LAYER.fullmatch(k)})
    # The random weights are all overwritten: making them must not disturb the caller's random state.
    with torch.random.fork_rng(devices=[]):
        student = _built(teacher, config)
        with torch.device("meta"):
            whole = _built(teacher, same)
    if not shared and len(dict(student.named_modules()).get(path, ())) != len(layers):
        raise ModelError(_no_stack(teacher))
    name_in_teacher = str if shared else origin(path, layers)
    check_places(student, whole, path, name_in_teacher)
    weights = dict(teacher.state_dict()) if width is None else narrowed(teacher, student, width, batches)
    weights = weights if shared else pick_weights(weights, path, layers)
    scale_queries(weights, teacher, student, name_in_teacher)
    _load(student, weights)
    return _finished(student, teacher)


def _check_groups(groups: int, depth: int, layers: list[int]) -> None:
    """Check that layers which share weights, in groups of consecutive ones, find those of their group."""
    for place, layer in enumerate(layers):
        if (layer - 1) * groups // depth != place * groups // len(layers):
            raise ModelError(
                f"The teacher's {depth} layers share the weights of {groups} groups, and layer {layer} would be of "
                f"another group as layer {place + 1} of {len(layers)}. Choose as many layers of each group."
            )


def _built(teacher: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        built = type(teacher)(config)
    except Exception as error:  # whatever the model's own code raises
        raise ModelError(
            f"transformers can't build a {type(teacher).__name__} by this config: {error}. Choose other values in "
            "config=..., or other layers."
        ) from error
    for name in list(built._modules):
        if getattr(teacher, name, built) is None:  # such as the pooler, which bodies of language models are without
            setattr(built, name, None)
    return built


def _resolve(layers: Sequence[int], depth: int) -> list[int]:
    resolved = [layer + depth + 1 if layer < 0 else layer for layer in layers]
    bad = [layer for layer, number in zip(layers, resolved, strict=True) if not 1 <= number <= depth]
    if bad or not resolved:
        what = f"got {bad[0]}" if bad else "got none"
        raise ModelError(f"layers must be teacher layers 1..{depth} (or -1..{-depth} from the end), {what}.")
    return resolved


def _load(student: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    own = student.state_dict()
    wrong = [name for name in own if name not in weights or own[name].shape != weights[name].shape]
    wrong += [name for name in weights if name not in own]
    if wrong:
        raise ModelError(
            f"These weights of the teacher don't fit the student: {wrong[:3]}. Either the config changes a shape, "
            "which copied layers can't follow (use width='importance', or layers=None for random weights), or weights "
            "depend on the number of layers or on a layer's place (the first of WavLM has position embeddings)."
        )
    student.load_state_dict(weights)


def _finished(student: PreTrainedModel, teacher: PreTrainedModel) -> PreTrainedModel:
    """Check that the student's config can be saved and loaded again, and put the student where the teacher is."""
    try:
        saved = student.config.to_dict()
        again = type(student.config).from_dict(copy.deepcopy(saved)).to_dict()
    except Exception as error:  # whatever the config's own checks raise
        raise ModelError(
            f"The student could not be loaded again: {error} Choose other values in config=..., or other layers."
        ) from error
    if changed := next((key for key in saved if again.get(key) != saved[key]), None):
        raise ModelError(
            f"The student would be another one when it is loaded again: {changed} is {saved[changed]!r}, and becomes "
            f"{again.get(changed)!r}. Name it in config=..., or choose other layers."
        )
    device = torch.device("cpu") if teacher.device.type == "meta" else teacher.device  # a teacher known by its config
    return student.float().to(device).train()
