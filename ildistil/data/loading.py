"""From texts to tokenised rows, once: sources, cache, and the splits that a stage needs; nothing about labels."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader

from ildistil.data.cache import cache_entry, load, store, stored
from ildistil.data.files import Source
from ildistil.data.options import LoadingOptions
from ildistil.data.permutation import Permutation
from ildistil.data.serving import RowsDataModule
from ildistil.data.tokenizing import Collate
from ildistil.errors import MissingFileError


class TokenizedDataModule(RowsDataModule):
    """Base of data modules that tokenise rows once, keep them in the cache, and serve them in padded batches.

    ``prepare_data`` checks and tokenises, in one process; the result is kept in the cache and found again by its
    content. ``setup`` only opens it. Prediction keeps the file's order. `RowsDataModule` says how rows are served.

    Args:
        options: How rows are tokenised, batched and ordered.
    """

    def __init__(self, options: LoadingOptions) -> None:
        super().__init__(options)
        self._rows: dict[str, datasets.Dataset] = {}
        self._digest = ""  # of the training rows

    # What a subclass decides --------------------------------------------------------------------------------------

    @abstractmethod
    def sources(self, kind: str) -> dict[str, Source]:
        """Return the sources of a kind ("train", "validation", "test") by their names; empty if there are none."""

    @abstractmethod
    def missing(self, kind: str) -> str:
        """Return the message for a kind that is needed and has no source."""

    @abstractmethod
    def tokenized(self, kind: str, source: Source) -> datasets.Dataset:
        """Return the rows of a source, checked and tokenised, with ``input_ids``, ``length`` and ``row_id``."""

    @abstractmethod
    def made_of(self, kind: str) -> Mapping[str, Any]:
        """Return what decides the rows beside source, tokenizer and ``max_length``, as values that JSON can hold."""

    def split_names(self, kind: str) -> list[str]:
        """Return the names of the sources of a kind."""
        return list(self.sources(kind))

    # What the other rooms ask: see `ildistil.data.Task` -----------------------------------------------------------

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets for logs, in the order of `val_dataloader`."""
        return [_log_name(name) for name in self.split_names("validation")]

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets for logs, in the order of `test_dataloader`."""
        return [_log_name(name) for name in self.split_names("test")]

    @property
    def fingerprint(self) -> str:
        """What the training batches depend on, beside the size of a step: rows, tokenizer, batches and order."""
        options = {name: getattr(self.options, name) for name in _ORDER} | {"seed": self.order_seed()}
        words = [f"{name}={value}" for name, value in options.items() if value is not None]
        return " ".join([type(self).__name__, self._digest[:12], *words])

    # Lightning's steps --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check and tokenise what the Trainer's stage needs (without one: all there is), unless the cache has it."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for kind in self._needed(stage):
            for source in self.sources(kind).values():
                entry = self._entry(kind, source)
                if not stored(entry):
                    store(self.tokenized(kind, source), entry)

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` stored.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all there is.
        """
        self._position = None
        for kind in self._needed(stage):
            entries = {name: self._entry(kind, source) for name, source in self.sources(kind).items()}
            self._rows |= {name: load(entry) for name, entry in entries.items()}
            if kind == "train":
                (self._digest,) = (entry.name for entry in entries.values())

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each of `validation_names`."""
        return [self.loader(self._rows[name]) for name in self.sources("validation")]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each of `test_names`."""
        return [self.loader(self._rows[name]) for name in self.sources("test")]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test sets, or else the validation sets, in the order of their files."""
        (kind,) = self._needed("predict")
        return [self.loader(self._rows[name], in_order=True) for name in self.sources(kind)]

    # Parts --------------------------------------------------------------------------------------------------------

    def _needed(self, stage: str | None) -> list[str]:
        """Return the kinds of splits that a stage needs, all of which exist."""
        if stage is None:
            kinds = [kind for kind in ("train", "validation", "test") if self.sources(kind)] or ["train"]
        elif stage == "fit":
            optional = not self.validation_required and not self.sources("validation")
            kinds = ["train"] if optional else ["train", "validation"]
        elif stage == "predict":
            kinds = ["test" if self.sources("test") else "validation"]
        else:
            kinds = ["validation" if stage == "validate" else "test"]
        for kind in kinds:
            if not self.sources(kind):
                raise MissingFileError(self.missing(kind))
        return kinds

    def _entry(self, kind: str, source: Source) -> Path:
        """Return the folder in the cache that belongs to a source, and load the tokenizer on the way."""
        self.load_tokenizer()
        made_of = {
            "tokenizer": self._tokenizer_digest, "max_length": self.options.max_length, **self.made_of(kind)
        }  # fmt: skip
        return cache_entry(self.options.cache_dir, content=source.fingerprint(), **made_of)

    def train_rows(self) -> datasets.Dataset:
        """Return the training rows, or those of them that ``limit_train`` keeps."""
        (name,) = self.sources("train")
        rows, limit = self._rows[name], self.options.limit_train
        if limit is None or limit >= len(rows):
            return rows
        return rows.select(np.sort(Permutation(len(rows), [self.order_seed(), 0])(np.arange(limit))))

    def lengths(self, rows: datasets.Dataset) -> torch.Tensor:
        """Return the number of tokens of every row."""
        return torch.tensor(rows["length"][:])

    def collate(self) -> Collate:
        """Return what makes a batch of rows."""
        return Collate(self.tokenizer)


# What the order and size of batches depend on, beside the size of a step.
_ORDER = ("tokens_per_batch", "group_by_length", "limit_train")


def _log_name(split: str) -> str:
    """Return a split's name as logs have it: MNLI's matched set is the main one."""
    return split.removesuffix("_matched").replace("validation", "val")
