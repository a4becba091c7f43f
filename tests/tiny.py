"""Small random models and batches for the tests."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 50


def bert(
    layers: int = 4, *, heads: int = 4, width: int = 32, labels: int = 3, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A BERT classifier whose random attention is far from uniform."""
    config = {
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    } | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertForSequenceClassification(
            BertConfig(
                num_hidden_layers=layers,
                num_attention_heads=heads,
                hidden_size=width,
                intermediate_size=2 * width,
                vocab_size=VOCABULARY,
                num_labels=labels,
                problem_type="regression" if labels == 1 else "single_label_classification",
                **config,
            )
        )


def batch(
    lengths: tuple[int, ...] = (7, 4, 6), *, left: int = 0, right: int = 0, seed: int = 0, labels: int = 3
) -> dict[str, Tensor]:
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


WORDS = ["good", "bad", "fine", "poor", "film", "plot", "is", "was", "the", "very", "not", "and"]


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the vocabulary's size."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    filler = [f"w{i}" for i in range(VOCABULARY - len(special) - len(WORDS))]
    words = {word: i for i, word in enumerate([*special, *WORDS, *filler[:-1], "[MASK]"])}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=128,
    )  # fmt: skip


def save_teacher(folder: Path, layers: int = 6, labels: int = 2, **config: Any) -> None:
    """A random teacher with its tokenizer, as save_pretrained leaves them."""
    model = bert(layers, labels=labels, **{"max_position_embeddings": 128} | config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_data(folder: Path, rows: int = 24) -> None:
    """SST-2 in miniature, in the layout of GLUE's folders."""
    folder.mkdir(parents=True)
    for split, count in (("train", rows), ("validation", rows // 2)):
        lines = ["sentence\tlabel"]
        for i in range(count):
            text = " ".join(WORDS[(i * 5 + k * 7) % len(WORDS)] for k in range(2 + i % 6))
            lines.append(f"{text}\t{i % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
