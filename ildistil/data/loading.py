"""From sources to padded batches: options, cache, order, and which process takes which rows; nothing about labels."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ildistil.data.cache import cache_entry, load, store, stored
from ildistil.data.files import Source
from ildistil.data.sampler import EpochSampler, LengthGroupedSampler, TokenBudgetSampler, even_batch_size
from ildistil.data.tokenizing import Collate, check_tokenizer, tokenizer_digest
from ildistil.errors import DataError, MissingFileError
from ildistil.students.tokenizers import load_tokenizer


@dataclass(frozen=True)
class LoadingOptions:
    """How rows are tokenised, batched and ordered: the options that all data modules of this library take by name.

    Args:
        tokenizer: A folder, a hub name or a loaded tokenizer; None takes that of the model the Trainer runs.
        batch_size: Rows per batch and process in training; None is 32.
        tokens_per_batch: Instead of ``batch_size``: tokens per batch and process in training, padding included. A batch
            has as many rows of similar length as fit.
        eval_batch_size: Rows per batch and process otherwise; None is ``batch_size``.
        max_length: Rows are cut to this many tokens.
        group_by_length: Batches hold rows of similar length (else: any rows, and the file's order in evaluation).
        seed: Seed of the order and of the rows ``limit_train`` keeps; None is that of ``seed_everything``, else 0.
        num_workers: Worker processes per data loader. The rows are tokenised already: 0 is mostly fastest.
        cache_dir: Folder of the cache; None is ``$ILDISTIL_CACHE`` or ``~/.cache/ildistil``.
        limit_train: Train on at most this many rows, drawn at random with the seed.

    Raises:
        DataError: A number is too small or not whole, the tokenizer is of another type, or ``tokens_per_batch`` is
            given together with ``batch_size`` or without ``group_by_length``.
    """

    tokenizer: str | PreTrainedTokenizerBase | None = None
    batch_size: int | None = None
    tokens_per_batch: int | None = None
    eval_batch_size: int | None = None
    max_length: int = 128
    group_by_length: bool = True
    seed: int | None = None
    num_workers: int = 0
    cache_dir: str | None = None
    limit_train: int | None = None

    def __post_init__(self) -> None:
        optional = ("batch_size", "tokens_per_batch", "eval_batch_size", "limit_train", "seed")
        for name in (*optional, "max_length", "num_workers"):
            value, least = getattr(self, name), int(name not in ("seed", "num_workers"))
            if (value is not None or name not in optional) and (type(value) is not int or value < least):
                raise DataError(f"{name} is {value!r}; it must be a whole number, at least {least}.")
        if not isinstance(self.tokenizer, str | PreTrainedTokenizerBase | None):
            raise DataError(f"tokenizer is {self.tokenizer!r:.80}; name a folder or model, or pass a loaded tokenizer.")
        if self.tokens_per_batch is not None and self.batch_size is not None:
            raise DataError(
                f"batch_size={self.batch_size} and tokens_per_batch={self.tokens_per_batch} both say how large a batch "
                "is in training. Leave one of them out, or set it to null. eval_batch_size is that of evaluation."
            )
        if self.tokens_per_batch is not None and not self.group_by_length:
            raise DataError("tokens_per_batch makes batches of rows of similar length: leave out group_by_length.")


class TokenizedDataModule(L.LightningDataModule, ABC):
    """Base of data modules that tokenise rows once, keep them in the cache, and serve them in padded batches.

    ``prepare_data`` checks and tokenises, in one process; the result is kept in the cache and found again by its
    content. ``setup`` only opens it. The order of training batches depends on the seed and the epoch only. Under ddp
    the processes share the rows. In training at most one row per process is seen twice in an epoch, so that all have
    batches of one size; evaluation sees every row exactly once on any number of processes (its batch size may be
    lowered by one for this; with fewer rows than processes Lightning refuses to start). Prediction keeps the file's
    order. Lightning's ``use_distributed_sampler`` changes nothing: it leaves our samplers alone. Checkpoints hold the
    position in the training set, and a run that goes on sees the rows that are left of the epoch.

    Args:
        options: How rows are tokenised, batched and ordered.
    """

    #: Number of texts in a row: 2 for pairs.
    texts_per_row = 1
    #: Whether training needs a validation set.
    validation_required = True

    def __init__(self, options: LoadingOptions) -> None:
        super().__init__()
        self.options = options
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_source: str | PreTrainedTokenizerBase | None = None
        self._rows: dict[str, datasets.Dataset] = {}
        self._digest = ""  # of the training rows
        self._position = 0, 0  # where a checkpoint was written: epoch, batches seen of it

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
    def max_length(self) -> int:
        """Most tokens of a row."""
        return self.options.max_length

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the rows, loaded.

        Raises:
            RuntimeError: It is not loaded yet.
        """
        if self._tokenizer is None:
            raise RuntimeError("The tokenizer is loaded by prepare_data() and setup(): call one of them first.")
        return self._tokenizer

    @property
    def fingerprint(self) -> str:
        """What the training batches depend on: rows, tokenizer, batches and order."""
        options = {name: getattr(self.options, name) for name in _ORDER} | {"seed": self._order_seed()}
        words = [f"{name}={value}" for name, value in options.items() if value is not None]
        return " ".join([type(self).__name__, self._digest[:12], *words])

    def every_row(self) -> DataLoader[Any]:
        """Return batches that hold every training row exactly once, grouped by length, all on this process."""
        return self._loader(self._train_rows(), place=(1, 0))

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
        self._position = 0, 0
        for kind in self._needed(stage):
            entries = {name: self._entry(kind, source) for name, source in self.sources(kind).items()}
            self._rows |= {name: load(entry) for name, entry in entries.items()}
            if kind == "train":
                (self._digest,) = (entry.name for entry in entries.values())

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch, shuffled anew in each; at first what is left of it, where a run goes on."""
        loader = self._loader(self._train_rows(), training=True)
        # Told here, since Lightning opens the loader, and worker processes fetch, before it says which epoch it is.
        live = {"epoch": 0, "batches": 0} if self.trainer is None else position(self.trainer)
        epoch, batches = max(self._position, (live["epoch"], live["batches"]))  # the loops may not be restored yet
        assert isinstance(loader.sampler, EpochSampler)
        loader.sampler.go_on(epoch, batches * (loader.batch_size or 1))
        return loader

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

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training set: the epoch, and the number of batches that each process saw of it."""
        return {} if self.trainer is None else position(self.trainer)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take the position of a checkpoint, for the next training loader."""
        # Lightning asks loaders for a position of their own.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        self._position = state["epoch"], state["batches"]
        if state["batches"] and self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise DataError(
                "With overfit_batches Lightning takes the rows anew from the first, so that a training can't go on "
                "within an epoch. Go on from the end of one, or use limit_train."
            )

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
        options = self.options
        wanted = options.tokenizer or self._model_tokenizer()
        if wanted != self._tokenizer_source:  # none is loaded yet, or that of the model which ran before
            tokenizer = load_tokenizer(wanted)
            check_tokenizer(tokenizer, options.max_length, pair=self.texts_per_row > 1)
            self._tokenizer, self._tokenizer_source = tokenizer, wanted
            self._tokenizer_digest = tokenizer_digest(tokenizer)
        made_of = {"tokenizer": self._tokenizer_digest, "max_length": options.max_length, **self.made_of(kind)}
        return cache_entry(options.cache_dir, content=source.fingerprint(), **made_of)

    def _model_tokenizer(self) -> str | PreTrainedTokenizerBase:
        """Return what the model that the Trainer runs names as its tokenizer; else what the one before it named."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        source: str | PreTrainedTokenizerBase | None = getattr(module, "tokenizer_source", None)
        source = source or self._tokenizer_source
        if source is None:
            raise DataError(
                f"{type(self).__name__} has no tokenizer, and no model to take one from. Name it: "
                f"{type(self).__name__}(..., tokenizer=<folder, hub name or loaded tokenizer>)."
            )
        return source

    def _train_rows(self) -> datasets.Dataset:
        (name,) = self.sources("train")
        rows, limit = self._rows[name], self.options.limit_train
        if limit is None or limit >= len(rows):
            return rows
        chosen = EpochSampler(len(rows), seed=self._order_seed()).order()[:limit]
        return rows.select(sorted(chosen.tolist()))

    def _loader(
        self, rows: datasets.Dataset, *, training: bool = False, in_order: bool = False,
        place: tuple[int, int] | None = None,
    ) -> DataLoader[Any]:  # fmt: skip
        # Lightning advises more workers on sight of few. A batch of tokenised rows takes about a millisecond.
        warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
        sampler, batch_size = self._sampler(rows, training, in_order, *(place or self._place()))
        workers = self.options.num_workers
        return DataLoader(
            rows, batch_size=batch_size, sampler=sampler, collate_fn=Collate(self.tokenizer), num_workers=workers,
            persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of the workers' seeds, which would else be drawn from the global state
        )  # fmt: skip

    def _sampler(
        self, rows: datasets.Dataset, training: bool, in_order: bool, replicas: int, rank: int
    ) -> tuple[EpochSampler, int | None]:
        """Return the order of the rows and the batch size; None where the sampler's items are whole batches."""
        options, seed = self.options, self._order_seed()
        if training and options.tokens_per_batch is not None:
            if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise DataError(
                    "With overfit_batches Lightning takes the rows in the file's order, one by one, which makes no "
                    "batches of tokens_per_batch. Use batch_size with it, or limit_train instead of it."
                )
            return TokenBudgetSampler(_lengths(rows), options.tokens_per_batch, replicas, rank, seed), None
        batch_size = options.batch_size or 32
        if not training:
            batch_size = even_batch_size(len(rows), options.eval_batch_size or batch_size, replicas)
        if in_order or not options.group_by_length:
            order = EpochSampler(len(rows), replicas, rank, shuffle=training, seed=seed, evaluation=not training)
            return order, batch_size
        grouped = LengthGroupedSampler(_lengths(rows), batch_size, replicas, rank, seed, evaluation=not training)
        return grouped, batch_size

    def _order_seed(self) -> int:
        # Lightning's seed_everything leaves its seed in this variable, for its own samplers and for started processes.
        seed = self.options.seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed

    def _place(self) -> tuple[int, int]:
        """Return the number of processes that share the rows, and which of them this is."""
        if self.trainer is not None:
            # Not the world size: with tensor parallelism several processes work on the same rows.
            place = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
            return place["num_replicas"], place["rank"]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0


def keeps_position(trainer: L.Trainer) -> bool:
    """Return whether a training's data go on within an epoch: by a data module, or by loaders, with a state."""
    if trainer.datamodule is not None and type(trainer.datamodule).state_dict is not L.LightningDataModule.state_dict:  # type: ignore[attr-defined]
        return True
    loaders: Any = CombinedLoader(trainer.train_dataloader).flattened
    return all(hasattr(loader, "load_state_dict") for loader in loaders)


# What the order and size of batches depend on.
_ORDER = ("batch_size", "tokens_per_batch", "group_by_length", "limit_train")


def position(trainer: L.Trainer) -> dict[str, int]:
    """Return where a training is: its epoch, and the number of batches that each process has seen of it."""
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    over = batches.is_last_batch and batches.current.processed == batches.current.ready
    if epochs.processed < epochs.started and not over:
        return {"epoch": epochs.processed, "batches": batches.current.processed}
    return {"epoch": epochs.started, "batches": 0}


def _lengths(rows: datasets.Dataset) -> torch.Tensor:
    return torch.tensor(rows["length"][:])


def _log_name(split: str) -> str:
    """Return a split's name as logs have it: MNLI's matched set is the main one."""
    return split.removesuffix("_matched").replace("validation", "val")
