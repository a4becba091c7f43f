"""A corpus in miniature, and a tokenizer with words of several tokens."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SYLLABLES = ["ba", "do", "fi", "gu", "ke", "lo", "mi", "nu", "pa", "ra", "si", "to"]
TOKENS = [*SPECIAL, *SYLLABLES, *(f"##{each}" for each in SYLLABLES)]


def tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of 29 tokens: a word is one or several syllables."""
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(TOKENS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    settings = names | {"mask_token": "[MASK]", "model_max_length": 128} | changes
    return PreTrainedTokenizerFast(tokenizer_object=core, **settings)


def text(number: int) -> str:
    """A document of 3 to 19 words, each with one to three syllables."""

    def word(i: int) -> str:
        return "".join(SYLLABLES[(number * 5 + i * 7 + k * (1 + number % 3)) % 12] for k in range(1 + (number + i) % 3))

    return " ".join(word(i) for i in range(3 + number * 7 % 17))


def write_corpus(path: Path, documents: int = 60, first: int = 0) -> str:
    """Write documents, one a line."""
    path.write_text("\n".join(text(number) for number in range(first, first + documents)) + "\n", encoding="utf-8")
    return str(path)
