"""From texts to token ids, once, and from rows of token ids to padded batches."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ildistil.data.files import ROWS_FROM_ZERO
from ildistil.errors import DataError
from ildistil.students.tokenizers import check_words

# Tokenizers without a limit state 1e30 or similar.
LARGEST_SANE_LENGTH = 10_000_000


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, max_length: int, pair: bool) -> None:
    """Refuse a tokenizer that cannot make batches of this length.

    Raises:
        DataError: It has no words, or no padding token, or ``max_length`` exceeds the model's limit or leaves no room.
    """
    check_words(tokenizer)
    name = tokenizer.name_or_path
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"The tokenizer {name!r} has no padding token, which batches need. Set one, for example "
            "tokenizer.pad_token = tokenizer.eos_token (and model.config.pad_token_id likewise), and pass it "
            "or the folder that tokenizer.save_pretrained(...) wrote."
        )
    limit = tokenizer.model_max_length
    if limit < LARGEST_SANE_LENGTH and max_length > limit:
        raise DataError(f"max_length is {max_length}, but the tokenizer's model takes {limit} tokens. Lower it.")
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length <= special:
        raise DataError(f"max_length is {max_length}, but every row has {special} special tokens. Raise max_length.")


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of all that decides which token ids a text gets.

    Truncation and padding are left out: calling a tokenizer writes its last arguments into these two.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    else:
        rules = [tokenizer.get_vocab(), tokenizer.init_kwargs]
    content = [type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side, rules]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def tokenize(
    texts: Sequence[Sequence[str]], labels: Sequence[int] | Sequence[float] | None, tokenizer: PreTrainedTokenizerBase,
    max_length: int, where: str,
) -> datasets.Dataset:  # fmt: skip
    """Return rows with ``input_ids``, ``length``, ``row_id``, and ``labels`` and ``token_type_ids`` if there are any.

    Args:
        texts: One column of texts, or two for pairs.
        labels: Class indices (stored as int64) or numbers (float32), or None.
        tokenizer: The tokenizer.
        max_length: Longer rows are cut, the longer text of a pair first.
        where: Name of these rows in messages.

    Raises:
        DataError: A row has no token at all.
    """
    columns: dict[str, Any] = {f"text_{i}": column for i, column in enumerate(texts)}
    columns["row_id"] = range(len(texts[0]))
    if labels is not None:
        columns["labels"] = labels
    cut, special = 0, set(tokenizer.all_special_ids)
    empty: list[int] = []

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        nonlocal cut
        encoded = tokenizer(*(batch[f"text_{i}"] for i in range(len(texts))), truncation=True, max_length=max_length)
        cut += sum(bool(row.overflowing) for row in encoded.encodings or ())
        lengths = [len(row) for row in encoded["input_ids"]]
        if 0 in lengths:
            row_id = batch["row_id"][lengths.index(0)]
            raise DataError(f"{where}: row {row_id} ({ROWS_FROM_ZERO}) has no token. Fill in its text or remove it.")
        empty.extend(i for i, row in zip(batch["row_id"], encoded["input_ids"], strict=True) if special.issuperset(row))
        # The attention mask of a row without padding says nothing; the padding of a batch makes it anew.
        return {k: v for k, v in encoded.items() if k in ("input_ids", "token_type_ids")} | {"length": lengths}

    types = {"input_ids": datasets.Sequence(datasets.Value("int32")), "length": datasets.Value("int32")}
    if "token_type_ids" in tokenizer.model_input_names:
        types["token_type_ids"] = datasets.Sequence(datasets.Value("int8"))
    types["row_id"] = datasets.Value("int64")
    if labels is not None:
        types["labels"] = datasets.Value("float32" if isinstance(labels[0], float) else "int64")
    rows = datasets.Dataset.from_dict(columns)
    rows = rows.map(
        encode, batched=True, features=datasets.Features(types), keep_in_memory=True, load_from_cache_file=False,
        remove_columns=[name for name in columns if name.startswith("text_")], desc=f"Tokenizing {where}",
        new_fingerprint=f"{rows._fingerprint}-ids",  # else datasets pickles the tokenizer to make one
    )  # fmt: skip
    if cut:
        rank_zero_info(f"{where}: {cut:,} of {len(rows):,} rows are cut to max_length={max_length} tokens.")
    if empty:
        listed = ", ".join(map(str, empty[:10])) + (" ..." if len(empty) > 10 else "")
        rank_zero_warn(
            f"{where}: {len(empty):,} of {len(rows):,} rows have no token but special ones, as their text is empty or "
            f"all of its words are unknown: {listed} ({ROWS_FROM_ZERO}). They are used like any other. Fill them in or "
            "remove them if they mean nothing."
        )
    return rows


@dataclass(frozen=True)
class Collate:
    """Pad rows to the longest of their batch, on the tokenizer's side, and make tensors of them."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask``, ``row_id``; ``token_type_ids`` and ``labels`` if there are any.

        Args:
            rows: A list of rows, or the columns of several, as a `datasets.Dataset` returns for a list of numbers.
        """
        columns = rows if isinstance(rows, Mapping) else {name: [row[name] for row in rows] for name in rows[0]}
        left = self.tokenizer.padding_side == "left"
        padding = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        batch = {name: padded(columns[name], value, left) for name, value in padding.items() if name in columns}
        batch["attention_mask"] = padded([np.ones(len(row)) for row in columns["input_ids"]], 0, left)
        # Python's floats become float32 here, and its integers int64.
        others = {name: torch.tensor(columns[name]) for name in ("labels", "row_id") if name in columns}
        return {name: torch.from_numpy(each) for name, each in batch.items()} | others


def padded(rows: Sequence[Sequence[int] | np.ndarray], value: int, left: bool) -> NDArray[np.int64]:
    """Return rows of whole numbers as one array, each filled up to the longest on its right side, or its left.

    >>> padded([[1, 2], [3]], 0, left=True).tolist()
    [[1, 2], [0, 3]]
    """
    lengths = np.array([len(row) for row in rows])
    found = np.full((len(rows), lengths.max()), value, dtype=np.int64)
    real = np.arange(found.shape[1]) < lengths[:, None]
    found[real[:, ::-1] if left else real] = np.concatenate(rows)
    return found
