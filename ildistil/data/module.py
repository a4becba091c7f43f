"""What all data modules share: check, tokenise once, load, and serve batches."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import lightning as L
import torch
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from ildistil.data.cache import cache_entry, load, store
from ildistil.data.files import ROWS_FROM_ZERO, Table, check_file, file_digest, read_table, table_column
from ildistil.data.labels import all_hidden, encode_classes, encode_numbers
from ildistil.data.sampler import EpochSampler, LengthGroupedSampler, TokenBudgetSampler, even_batch_size
from ildistil.data.tokenizing import Collate, check_tokenizer, load_tokenizer, tokenize, tokenizer_digest
from ildistil.errors import DataError, MissingFileError
from ildistil.metrics import metric_collection

Batch = dict[str, torch.Tensor]


class Source(Protocol):
    """Where the rows of one split come from."""

    @property
    def where(self) -> str:
        """What messages call it."""

    def read(self) -> Table:
        """Return all columns."""

    def fingerprint(self) -> str:
        """Return a hash of the content."""


@dataclass(frozen=True)
class FileSource:
    """A split in one file."""

    path: Path

    @property
    def where(self) -> str:
        """The file's path."""
        return str(self.path)

    def read(self) -> Table:
        """Return all columns of the file."""
        return read_table(self.path)

    def fingerprint(self) -> str:
        """Return the hash of the file's content; the ending counts, as it decides how the content is read."""
        check_file(self.path)
        return f"{self.path.suffix.lower()}:{file_digest(self.path)}"


class TextDataModule(L.LightningDataModule, ABC):
    """Base of data modules that make classification or regression batches of texts or pairs of texts.

    A batch is a dict: ``input_ids`` and ``attention_mask`` (batch x longest row, int64), ``token_type_ids`` if the
    tokenizer has them, ``labels`` (int64, or float32 in a regression; absent where they are secret) and ``row_id``
    (int64): the row's position in its file, which neither shuffling nor ``limit_train`` changes. An empty text is
    allowed, a missing one is not.

    ``prepare_data`` checks and tokenises, in one process; the result is kept in the cache and found again by its
    content. ``setup`` only opens it. The order of training batches depends on the seed and the epoch only. Under ddp
    the processes share the rows. In training at most one row per process is seen twice in an epoch, so that all have
    batches of one size; evaluation sees every row exactly once on any number of processes (its batch size may be
    lowered by one for this; with fewer rows than processes Lightning refuses to start). Prediction keeps the file's
    order. Lightning's ``use_distributed_sampler`` changes nothing: it leaves our samplers alone.

    Args:
        tokenizer: A folder, a hub name or a loaded tokenizer; None takes that of the model the Trainer runs.
        batch_size: Rows per batch and process in training; None is 32.
        tokens_per_batch: Instead of ``batch_size``: tokens per batch and process in training, padding included. A batch
            has as many rows of similar length as go into it.
        eval_batch_size: Rows per batch and process otherwise; None is ``batch_size``.
        max_length: Rows are cut to this many tokens.
        group_by_length: Batches hold rows of similar length (else: any rows, and the file's order in evaluation).
        seed: Seed of the order and of the rows ``limit_train`` keeps; None is that of ``seed_everything``, else 0.
        num_workers: Worker processes per data loader. The rows are tokenised already: 0 is mostly fastest.
        cache_dir: Folder of the cache; None is ``$ILDISTIL_CACHE`` or ``~/.cache/ildistil``.
        limit_train: Train on this many rows, drawn at random with the seed.

    Raises:
        DataError: A number is not positive, or ``tokens_per_batch`` is given together with ``batch_size`` or without
            ``group_by_length``.
    """

    task_name: str
    regression: bool
    text_columns: tuple[str, ...]
    label_column: str
    #: Names of the metrics; the first is the primary one.
    metric_names: tuple[str, ...]
    #: Whether training needs a validation set.
    validation_required = True

    def __init__(
        self,
        tokenizer: str | PreTrainedTokenizerBase | None,
        batch_size: int | None,
        tokens_per_batch: int | None,
        eval_batch_size: int | None,
        max_length: int,
        group_by_length: bool,
        seed: int | None,
        num_workers: int,
        cache_dir: str | None,
        limit_train: int | None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "tokens_per_batch": tokens_per_batch, "eval_batch_size": eval_batch_size}
        for name, value in (sizes | {"limit_train": limit_train, "max_length": max_length}).items():
            if value is not None and value < 1:
                raise DataError(f"{name} is {value}; it must be at least 1.")
        if tokens_per_batch is not None and batch_size is not None:
            raise DataError(
                f"batch_size={batch_size} and tokens_per_batch={tokens_per_batch} both say how large a batch is in "
                "training. Leave one of them out, or set it to null. eval_batch_size is that of evaluation."
            )
        if tokens_per_batch is not None and not group_by_length:
            raise DataError("tokens_per_batch makes batches of rows of similar length: leave out group_by_length.")
        self.tokenizer_source = tokenizer
        self.batch_size = batch_size or 32
        self.tokens_per_batch = tokens_per_batch
        self.eval_batch_size = eval_batch_size or self.batch_size
        self.max_length = max_length
        self.group_by_length = group_by_length
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.limit_train = limit_train
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._rows: dict[str, datasets.Dataset] = {}

    # What a subclass says -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def label_names(self) -> list[str] | None:
        """The names of the classes in the order of their indices; None in a regression."""

    @abstractmethod
    def sources(self, kind: str) -> dict[str, Source]:
        """Return the sources of a kind ("train", "validation", "test") by their names; empty if there are none."""

    @abstractmethod
    def missing(self, kind: str) -> str:
        """Return the message for a kind that is needed and has no source."""

    # What the other rooms use -------------------------------------------------------------------------------------

    @property
    def num_labels(self) -> int:
        """Outputs that the model's head needs: the number of classes, 1 in a regression."""
        return len(self.label_names or [""])

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets for logs, in the order of `val_dataloader`."""
        return [_log_name(name) for name in self.sources("validation")]

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets for logs, in the order of `test_dataloader`."""
        return [_log_name(name) for name in self.sources("test")]

    @property
    def primary_metric(self) -> str:
        """The metric by which the best checkpoint is chosen."""
        return self.metric_names[0]

    def metrics(self) -> MetricCollection:
        """Return new metrics, which take ``preds`` (class indices, or floats in a regression) and ``target``."""
        return metric_collection(self.metric_names, self.num_labels)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded.

        Raises:
            RuntimeError: It is not loaded yet.
        """
        if self._tokenizer is None:
            raise RuntimeError("The tokenizer is loaded by prepare_data() and setup(): call one of them first.")
        return self._tokenizer

    # Lightning's steps --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Check and tokenise what the Trainer's stage needs (without one: all there is), unless the cache has it."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        for kind in self._needed(stage):
            for source in self.sources(kind).values():
                entry = self._entry(kind, source)
                if not entry.is_dir():
                    store(self._tokenized(kind, source), entry)

    def setup(self, stage: str | None = None) -> None:
        """Open what `prepare_data` stored.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all there is.
        """
        for kind in self._needed(stage):
            self._rows |= {name: load(self._entry(kind, source)) for name, source in self.sources(kind).items()}

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch, shuffled anew in each."""
        (name,) = self.sources("train")
        return self._loader(self._limited(self._rows[name]), training=True)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each of `validation_names`."""
        return [self._loader(self._rows[name]) for name in self.sources("validation")]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return a loader for each of `test_names`."""
        return [self._loader(self._rows[name]) for name in self.sources("test")]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test sets, or else the validation sets, in the order of their files."""
        (kind,) = self._needed("predict")
        return [self._loader(self._rows[name], in_order=True) for name in self.sources(kind)]

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
        if self._tokenizer is None:
            tokenizer = load_tokenizer(self.tokenizer_source or self._model_tokenizer())
            check_tokenizer(tokenizer, self.max_length, pair=len(self.text_columns) > 1)
            self._tokenizer, self._tokenizer_digest = tokenizer, tokenizer_digest(tokenizer)
        return cache_entry(
            self.cache_dir,
            content=source.fingerprint(),
            tokenizer=self._tokenizer_digest,
            text_columns=self.text_columns,
            label_column=self.label_column,
            labels="numbers" if self.regression else self.label_names,
            labels_optional=kind == "test",
            max_length=self.max_length,
        )

    def _model_tokenizer(self) -> str | PreTrainedTokenizerBase:
        """Return what the model that the Trainer runs says about its tokenizer."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        source = getattr(module, "tokenizer_source", None)
        if source is None:
            raise DataError(
                f"{type(self).__name__} has no tokenizer, and no model to take one from. Name it: "
                f"{type(self).__name__}(..., tokenizer=<folder, hub name or loaded tokenizer>)."
            )
        found: str | PreTrainedTokenizerBase = source
        return found

    def _tokenized(self, kind: str, source: Source) -> datasets.Dataset:
        table = source.read()
        texts = [
            _checked_texts(table_column(table, name, source.where), name, source.where) for name in self.text_columns
        ]
        labels = self._labels(table, kind, source.where)
        return tokenize(texts, labels, self.tokenizer, self.max_length, source.where)

    def _labels(self, table: Table, kind: str, where: str) -> list[int] | list[float] | None:
        """Return the labels as the model learns them; None for a test set that has none or keeps them secret."""
        if kind == "test" and (self.label_column not in table or all_hidden(table[self.label_column])):
            return None
        values = table_column(table, self.label_column, where)
        where = f"{where}, column {self.label_column!r}"
        names = self.label_names
        return encode_numbers(values, where) if names is None else encode_classes(values, names, where)

    def _limited(self, rows: datasets.Dataset) -> datasets.Dataset:
        if self.limit_train is None or self.limit_train >= len(rows):
            return rows
        chosen = EpochSampler(len(rows), seed=self._order_seed()).order()[: self.limit_train]
        return rows.select(sorted(chosen.tolist()))

    def _loader(self, rows: datasets.Dataset, training: bool = False, in_order: bool = False) -> DataLoader[Any]:
        # Lightning advises more workers on sight of few. A batch of tokenised rows takes about a millisecond.
        warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
        sampler, batch_size = self._sampler(rows, training, in_order)
        return DataLoader(
            rows,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=Collate(self.tokenizer),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _sampler(self, rows: datasets.Dataset, training: bool, in_order: bool) -> tuple[EpochSampler, int | None]:
        """Return the order of the rows and the batch size; None where the sampler's items are whole batches."""
        (replicas, rank), seed = self._place(), self._order_seed()
        if training and self.tokens_per_batch is not None:
            if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise DataError(
                    "With overfit_batches Lightning takes the rows in the file's order, one by one, which makes no "
                    "batches of tokens_per_batch. Use batch_size with it, or limit_train instead of it."
                )
            return TokenBudgetSampler(_lengths(rows), self.tokens_per_batch, replicas, rank, seed), None
        batch_size = self.batch_size if training else even_batch_size(len(rows), self.eval_batch_size, replicas)
        if in_order or not self.group_by_length:
            order = EpochSampler(len(rows), replicas, rank, shuffle=training, seed=seed, evaluation=not training)
            return order, batch_size
        grouped = LengthGroupedSampler(_lengths(rows), batch_size, replicas, rank, seed, evaluation=not training)
        return grouped, batch_size

    def _order_seed(self) -> int:
        # Lightning's seed_everything leaves its seed in this variable, for its own samplers and for started processes.
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _place(self) -> tuple[int, int]:
        """Return the number of processes that share the rows, and which of them this is."""
        if self.trainer is not None:
            # Not the world size: with tensor parallelism several processes work on the same rows.
            place = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
            return place["num_replicas"], place["rank"]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0


def _lengths(rows: datasets.Dataset) -> torch.Tensor:
    return torch.tensor(rows["length"][:])


def _log_name(split: str) -> str:
    """Write a split's name as logs have it: MNLI's matched set is the main one."""
    return split.removesuffix("_matched").replace("validation", "val")


def _checked_texts(values: Sequence[Any], name: str, where: str) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, str):
            raise DataError(
                f"{where}: row {row} ({ROWS_FROM_ZERO}) has {value!r} in the column {name!r}, not a text. Fill in the "
                "text (it may be empty) or remove the row."
            )
    return list(values)
