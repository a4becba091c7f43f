"""Small random models and batches for the tests."""

from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

VOCABULARY = 50


def bert(layers: int = 4, *, heads: int = 4, width: int = 32, labels: int = 3, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A BERT classifier whose random attention is far from uniform."""
    config = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(
                num_hidden_layers=layers,
                num_attention_heads=heads,
                hidden_size=width,
                intermediate_size=2 * width,
                vocab_size=VOCABULARY,
                max_position_embeddings=32,
                num_labels=labels,
                problem_type="regression" if labels == 1 else "single_label_classification",
                **config,
            )
        )


def batch(lengths: tuple[int, ...] = (7, 4, 6), *, left: int = 0, right: int = 0, seed: int = 0, labels: int = 3) -> dict[str, Tensor]:
    """A ragged batch, with any number of further padding columns on either side."""
    generator = torch.Generator().manual_seed(seed)
    width = left + max(lengths) + right
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, left : left + length] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, left : left + length] = 1
        positions[row, left : left + length] = torch.arange(length)
    target = torch.randint(0, labels, (len(lengths),), generator=generator) if labels > 1 else torch.randn(len(lengths))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions,
        "labels": target,
        "row_id": torch.arange(len(lengths)),
    }
