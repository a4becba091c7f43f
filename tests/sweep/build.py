"""A random teacher and a random student of one architecture, and batches that both take."""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sweep.architectures import Architecture
from sweep.batches import LONG, SHORT, Batch, candidates, forward_names
from sweep.settings import EXTRAS
from sweep.shrink import MIDDLE, tiny_config


class NotBuiltError(Exception):
    """The architecture can't be built tiny, or does not run on its own; says why."""


class Pair(NamedTuple):
    """What a row of the table is made of."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    batches: dict[str, Batch]
    dtype: torch.dtype


def pair(architecture: Architecture) -> Pair:
    """Build both models and the batches, in float64 where that works.

    Raises:
        NotBuiltError: they can't be built, or don't run without the library.
    """
    errors = []
    for dtype, default in (
        (torch.float64, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
    ):
        torch.set_default_dtype(default)
        student, teacher = (_model(architecture, deep, dtype) for deep in (False, True))
        try:
            return Pair(student, teacher, _batches(student, teacher, architecture), dtype)
        except NotBuiltError as error:
            errors.append(error)
    raise errors[-1]


def _model(architecture: Architecture, deep: bool, dtype: torch.dtype) -> PreTrainedModel:
    settings = {"num_labels": 3}
    torch.manual_seed(int(deep))
    try:
        config = tiny_config(architecture.model_type, deep, settings)
        if architecture.head == "causal" and hasattr(config, "is_decoder"):
            config.is_decoder = True
        model = _of_config(getattr(transformers, architecture.name), config)
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    _scatter(model)
    model.register_forward_pre_hook(_reseed)
    return model.to(dtype).eval()


def _of_config(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model of the config, or of the one inside it that it takes, as ``AutoModel`` does."""
    if cls.config_class is not None and not isinstance(config, cls.config_class):
        inside = (getattr(config, name) for name in config.sub_configs)
        config = next((part for part in inside if isinstance(part, cls.config_class)), config)
    if config.is_encoder_decoder:  # a decoder starts with no padding token: its row of attention would be empty
        for name, token in (("pad_token_id", 0), ("decoder_start_token_id", MIDDLE - 1)):
            if getattr(config, name, None) is None:
                setattr(config, name, token)
    return cls(config)


def _reseed(module: nn.Module, args: Any) -> None:
    """Draw the same random numbers in every run: some models draw in eval mode too."""
    torch.default_generator.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that they use


def _scatter(model: nn.Module) -> None:
    """Draw weights that are far from zero and from each other, so that attention is far from uniform."""
    draw = torch.Generator().manual_seed(torch.initial_seed())
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            if parameter.ndim < 2:
                parameter.add_(0.2 * noise)
            else:
                parameter.add_(noise / max(1, parameter[0].numel()) ** 0.5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _batches(student: nn.Module, teacher: nn.Module, architecture: Architecture) -> dict[str, Batch]:
    found = {"short": _batch(student, teacher, architecture, SHORT, False)}
    found["long"] = _batch(student, teacher, architecture, LONG, False)
    if _looks_back_only(teacher, found["long"]):
        left = _batch(student, teacher, architecture, LONG, True)
        if bool(first_tensor(run(teacher, left)).isfinite().all()):  # some models make NaN of padding on the left
            found["left"] = left
    return found


def _looks_back_only(model: nn.Module, batch: Batch) -> bool:
    """Whether a change of the last token leaves the state before it, which any window reaches, as it was."""
    if set(batch) - {"labels"} != {"input_ids", "attention_mask"} or model.config.is_encoder_decoder:
        return False
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, -1] -= 1
    states = [first_tensor(run(model, {k: v for k, v in b.items() if k != "labels"})) for b in (batch, changed)]
    a, b = states
    if a is None or b is None or a.ndim != 3 or a.shape[:2] != batch["input_ids"].shape:
        states = [run(model, b, output_hidden_states=True).get("hidden_states") for b in (batch, changed)]
        if None in states:
            return False
        a, b = (x[-1] for x in states)
    close = [torch.allclose(a[0, i], b[0, i], 1e-5, 1e-5) for i in (-2, -1)]
    return close == [True, False]


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of what a module gives."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((found for v in value if (found := first_tensor(v)) is not None), None)
    return None


def _batch(
    student: nn.Module, teacher: nn.Module, architecture: Architecture, lengths: tuple[int, ...], left: bool
) -> Batch:
    error: Exception | None = None
    extras = EXTRAS.get(architecture.name, EXTRAS.get(architecture.model_type))
    for batch in candidates(teacher, architecture.head, lengths, left, extras):
        try:
            for model in (student, teacher):
                run(model, batch)
            return batch
        except Exception as failed:
            error = failed
    told = f"runs on no batch at hand ({type(error).__name__}: {error})" if error else "no batch fits its inputs"
    raise NotBuiltError(told) from error


def forward_inputs(model: nn.Module, batch: Batch) -> Batch:
    """What a model names of a batch."""
    names = forward_names(model)
    return {name: value for name, value in batch.items() if name in names}


def run(model: nn.Module, batch: Batch, **more: Any) -> Any:
    """Run a model without gradients."""
    with torch.no_grad():
        return model(**forward_inputs(model, batch), **more)


@cache
def eager_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose attention is the plain one."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def widen_softmax() -> None:
    """Keep a softmax asked for float32 in float64, or eager attention would be no exact reference."""
    plain = F.softmax

    def softmax(x: Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
        wide = x.dtype == torch.float64 and dtype == torch.float32
        return plain(x, dim, _stacklevel, None if wide else dtype)

    F.softmax = softmax
    nn.functional.softmax = softmax
