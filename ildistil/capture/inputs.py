"""What a model is given of a batch, and which of its tokens are real."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ildistil.capture.info import is_classifier
from ildistil.errors import CaptureError

TARGETS = "ildistil_targets"  # stored targets that were read for a batch travel in it
OURS = frozenset({"row_id", TARGETS})  # what no model is given


def separate_configs(student: nn.Module, teacher: nn.Module) -> None:
    """Replace all configs that the student shares with the teacher by copies.

    Training writes to the config, such as the problem type that labels suggest, and so may whoever trains.
    """
    theirs = {id(m.config) for m in teacher.modules() if hasattr(m, "config")}
    copies: dict[int, Any] = {}
    for module in student.modules():
        config = getattr(module, "config", None)
        if config is not None and id(config) in theirs:
            module.config = copies.setdefault(id(config), copy.deepcopy(config))


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Select what a model's ``forward`` names; everything but ``row_id`` and stored targets if it takes anything.

    The attention mask is passed on to whatever takes more than it names: some models hand it down unnamed.
    """
    names = input_names(model)
    more = any(p.kind == p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    passed = names | {"attention_mask"} if more else names
    inputs = {k: v for k, v in batch.items() if k not in OURS and (not names or k in passed)}
    if "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def real_labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the batch without the labels of rows that have no token: they are set to -100, which no loss counts.

    Labels that are numbers stay: a mean of squares has no way to leave one out.
    """
    labels, mask = batch.get("labels"), token_mask(batch)
    if mask is None or not isinstance(labels, Tensor) or labels.is_floating_point() or len(labels) != len(mask):
        return batch
    real = mask.any(1).view(-1, *(1,) * (labels.ndim - 1))
    return {**batch, "labels": torch.where(real, labels, -100)}


def without_labels(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Leave the labels out, unless the model makes its decoder's input of them, as it knows best how."""
    labels = inputs.get("labels")
    given = any(inputs.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if labels is not None and labels.ndim == 2 and not given and "decoder_input_ids" in input_names(model):
        return inputs
    return {name: value for name, value in inputs.items() if name != "labels"}


def input_names(model: nn.Module) -> frozenset[str]:
    """Return the names that a model's ``forward`` knows; none where it takes anything."""
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def main_input(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the tensor whose first two dimensions are most likely the rows and tokens of a batch."""
    names = ["input_ids", "inputs_embeds", getattr(model, "main_input_name", ""), *batch]
    tensors = (batch.get(name) for name in names if name not in OURS)
    found = next((v for v in tensors if isinstance(v, Tensor) and v.ndim >= 2), None)
    if found is None:
        raise CaptureError(f"The batch has no tensor of shape (batch, ...): its keys are {sorted(batch)}.")
    return found


def token_mask(batch: Mapping[str, Any], key: str = "attention_mask") -> Tensor | None:
    """Return which tokens are real, ``(batch, tokens)``; ``None`` where the batch doesn't say."""
    mask = batch.get(key)
    if mask is None and batch.get("src_key_padding_mask") is not None:
        mask = ~batch["src_key_padding_mask"].bool()  # torch's own Transformer marks what is padding
    if mask is None:
        unknown = [key for key in batch if key.endswith("padding_mask") and batch[key] is not None]
        if unknown:
            raise CaptureError(
                f"The batch marks padding by {unknown[0]!r}, which is not understood, so padding would count. Name "
                "it attention_mask (1 for real tokens) or src_key_padding_mask (true for padding)."
            )
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise CaptureError(
            f"{key} must have the shape (batch, tokens), got {got}. Objectives count real tokens by it; packed and "
            "custom masks are not understood."
        )
    return mask != 0


def encoder_mask(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens of a model's first stack are real; ``None`` where the batch doesn't say.

    Speech models make one token of many samples, and know which of these tokens are real.
    """
    mask = token_mask(batch)
    shorten = getattr(model, "_get_feature_vector_attention_mask", None)
    if mask is None or shorten is None:
        return mask
    lengths = model._get_feat_extract_output_lengths
    # An adapter that shortens once more stands behind the layers.
    plain = {"add_adapter": False} if "add_adapter" in inspect.signature(shorten).parameters else {}
    tokens = int(lengths(torch.tensor(mask.shape[1]), **plain))  # type: ignore[operator]
    short: Tensor = shorten(tokens, mask.long(), **plain)
    return (short != 0) & mask.any(1, keepdim=True)


def decoder_mask(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Return which positions of a decoder are real; ``None`` where the batch doesn't say.

    In this order: what ``decoder_attention_mask`` says; where there is a label to predict; all up to the last token of
    ``decoder_input_ids`` that isn't padding (a decoder may start with the padding token, so only what ends a row is
    padding); and the encoder's mask for a model that reads its input twice, as classifiers do.
    """
    if batch.get("decoder_attention_mask") is not None:
        return token_mask(batch, "decoder_attention_mask")
    labels, tokens = batch.get("labels"), batch.get("decoder_input_ids")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not is_classifier(model):
        return labels != -100
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    if isinstance(tokens, Tensor):
        real = tokens != padding if padding is not None else torch.ones_like(tokens, dtype=torch.bool)
        real = real.flip(1).cumsum(1).flip(1) > 0
        return real | (torch.arange(tokens.shape[1], device=tokens.device) == 0)
    return None if batch.get("decoder_inputs_embeds") is not None else token_mask(batch)
