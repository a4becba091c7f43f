"""From a corpus of text to memory-mapped rows of tokens, packed once in parallel processes."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextFiles:
    """Files of text: ``.txt``, ``.jsonl`` or ``.parquet``; files, folders (searched recursively), globs."""

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    text_column: str = "text"


@dataclass(frozen=True)
class HubText:
    """A data set of the hub, or a local folder that `datasets.load_dataset` reads."""

    name: str
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False


@dataclass(frozen=True)
class Packing:
    """Everything that decides which rows are made of a text."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    packed: bool = True
    word_starts: bool = False
    held_out: float = 0.0


class Rows:
    """One split: rows of tokens, mapped into memory; picklable, cheap to open."""

    lengths: np.ndarray  # int32, (rows), tokens of every row; mapped into memory too
    digest: str  # of source content, tokenizer, packing and split
    tokens: int  # of all rows, special tokens included

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> dict[str, np.ndarray]: ...  # input_ids int64; word_starts bool if stored


@dataclass(frozen=True)
class Packed:
    """Packed rows of a corpus: its folder in the cache, and the rows to train and to validate on."""

    folder: Path
    train: Rows
    validation: Rows | None  # None if held_out is 0


def pack(
    source: TextFiles | HubText, packing: Packing, cache_dir: str | None = None, processes: int | None = None
) -> Packed:
    """Pack a corpus, or find it packed (verifies all checksums): for ``prepare_data``, in one process of a node."""


def packed(source: TextFiles | HubText, packing: Packing, cache_dir: str | None = None) -> Packed:
    """Open what `pack` made of this source on this node, without reading the source: for ``setup``, in any process.

    Raises MissingFileError where `pack` was not called before (or the files have changed since: size, time).
    """
