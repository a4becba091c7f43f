"""A tiny tokenizer, tables in every format, and a prepared data module, for the tests of the data room."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ildistil.data import TextData

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [*SPECIAL, '"', "a", "good", "bad", "film", "the", "cat", "sat", "on", "mat", "dull", "fine"]

Rows = Mapping[str, Sequence[Any]]
GOOD = {"text": ["a good film", "a bad film", "dull", "fine"], "label": ["yes", "no", "no", "yes"]}


def make_tokenizer(special: bool = True, **kwargs: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    settings = names | {"model_max_length": 256, "model_input_names": inputs} | kwargs
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def prepared(stage: str | None = None, **kwargs: Any) -> TextData:
    data = TextData(**({"tokenizer": make_tokenizer()} | kwargs))
    data.prepare_data()
    data.setup(stage)
    return data


def labels_of(loader: Any) -> list[Any]:
    found = {i: x for batch in loader for i, x in zip(batch["row_id"].tolist(), batch["labels"].tolist(), strict=True)}
    return [found[i] for i in range(len(found))]


def _separated(separator: str) -> Callable[[Path, Rows], None]:
    def write(path: Path, rows: Rows) -> None:
        lines = [separator.join(rows), *(separator.join(map(str, row)) for row in zip(*rows.values(), strict=True))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return write


def _records(rows: Rows) -> list[dict[str, Any]]:
    return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


FORMATS: dict[str, Callable[[Path, Rows], Any]] = {
    ".tsv": _separated("\t"),
    ".csv": _separated(","),
    ".json": lambda path, rows: path.write_text(json.dumps(_records(rows))),
    ".jsonl": lambda path, rows: path.write_text("\n".join(map(json.dumps, _records(rows)))),
    ".parquet": lambda path, rows: datasets.Dataset.from_dict(dict(rows)).to_parquet(path),
}
