"""A made-up batch, to try a model before any data is read."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ildistil.capture import ModelInfo

Batch = dict[str, Tensor]


def synthetic_batch(model: nn.Module, tokens: int = 8) -> Batch | None:
    """Make a batch of two for a transformers model: rows of unequal length, or images; ``None`` for any other.

    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
    >>> {name: tuple(value.shape) for name, value in synthetic_batch(ViTForImageClassification(vit)).items()}
    {'pixel_values': (2, 3, 32, 32), 'labels': (2,), 'row_id': (2,)}
    """
    if not isinstance(model, PreTrainedModel):
        return None
    batch: Batch | None = None
    if model.main_input_name == "input_ids":
        batch = _texts(model, tokens)
    elif model.main_input_name == "pixel_values":
        batch = _images(model)
    if batch is None:
        return None
    rows = len(next(iter(batch.values())))
    return {key: value.to(model.device) for key, value in {**batch, "row_id": torch.arange(rows)}.items()}


def _images(model: PreTrainedModel) -> Batch | None:
    size, channels = getattr(model.config, "image_size", None), getattr(model.config, "num_channels", None)
    if size is None or channels is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.linspace(-1, 1, 2 * channels * height * width).reshape(2, channels, height, width)
    return _labelled({"pixel_values": pixels}, ModelInfo.of(model), "ForImageClassification")


def _texts(model: PreTrainedModel, tokens: int) -> Batch | None:
    info = ModelInfo.of(model)
    if info.vocabulary is None:
        return None
    ids, mask = _rows(model, info.vocabulary, tokens)
    text = {"input_ids": ids, "attention_mask": mask}
    batch: Batch | None
    if info.name.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")):
        batch = text | {"labels": ids}
    elif info.stacks and "ForSequenceClassification" not in info.name:
        batch = _decoded(ids, mask, info.name)
    else:
        batch = _labelled(text, info, "ForSequenceClassification")
    # Without a padding token a classifier of the causal kind takes one row at a time.
    rows = 1 if model.config.get_text_config().pad_token_id is None else 2
    return None if batch is None else {key: value[:rows] for key, value in batch.items()}


def _rows(model: PreTrainedModel, vocabulary: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Make two rows of ordinary tokens, the second one shorter, and their mask."""
    config = model.config
    special = {getattr(config, f"{k}_token_id", None) for k in ("pad", "bos", "eos", "cls", "sep", "mask")}
    ordinary = [i for i in range(min(vocabulary, 64)) if i not in special] or [0]
    ids = torch.tensor([[ordinary[(3 * r + 5 * c) % len(ordinary)] for c in range(tokens)] for r in range(2)])
    mask = torch.ones_like(ids)
    mask[1, tokens - 3 :] = 0
    if getattr(config, "is_encoder_decoder", False) and config.eos_token_id is not None:
        # Classifiers of this kind read the state of the last end-of-sequence token, and every row must have one.
        ids[torch.arange(2), mask.sum(1) - 1] = config.eos_token_id
    return ids, mask


def _decoded(ids: Tensor, mask: Tensor, name: str) -> Batch | None:
    """Add what a decoder is to say: labels for a model with such a head, its input for a model without a head."""
    said, real = ids[:, -5:], mask[:, -5:]
    if name.endswith("ForConditionalGeneration"):
        return {"input_ids": ids, "attention_mask": mask, "labels": said.masked_fill(real == 0, -100)}
    if "For" in name:
        return None
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": said, "decoder_attention_mask": real}


def _labelled(batch: Batch, info: ModelInfo, head: str) -> Batch | None:
    """Add labels for this head; no other head is known, and a model without one needs none."""
    if head in info.name:
        return batch | {"labels": _labels(info)}
    return None if "For" in info.name else batch


def _labels(info: ModelInfo) -> Tensor:
    if info.problem_type == "multi_label_classification":
        return torch.zeros(2, info.labels or 1)
    if info.labels == 1 or info.problem_type == "regression":
        return torch.zeros(2)
    return torch.arange(2) % (info.labels or 1)
