"""From rows of tokens to padded batches: order, position, and which process takes which rows; nothing about sources."""

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from ildistil.data.options import LoadingOptions
from ildistil.data.position import position, processes
from ildistil.data.sampler import EpochSampler, LengthGroupedSampler, TokenBudgetSampler, even_batch_size
from ildistil.data.tokenizing import check_tokenizer, tokenizer_digest
from ildistil.errors import DataError
from ildistil.students.tokenizers import load_tokenizer


class RowsDataModule(L.LightningDataModule, ABC):
    """Base of data modules that serve rows of tokens in padded batches.

    The order of training batches depends on the seed, the epoch and the size of an optimiser step only: in a step are
    the same rows whether they come in one batch, in several accumulated ones, or on several processes. Under ddp the
    processes share the rows. In training at most one row per process is seen twice in an epoch, so that all have
    batches of one size; evaluation sees every row exactly once on any number of processes (its batch size may be
    lowered by one for this; with fewer rows than processes Lightning refuses to start). Lightning's
    ``use_distributed_sampler`` changes nothing: it leaves our samplers alone. Checkpoints hold the position in the
    training set, and a run that goes on sees the rows that are left of the epoch, also on another number of processes.

    Args:
        options: How rows are tokenised, batched and ordered.
    """

    #: Number of texts in a row: 2 for pairs.
    texts_per_row = 1
    #: Whether training needs a validation set.
    validation_required = True
    #: Whether the training rows are drawn anew in each epoch, so that their numbers have to carry it.
    draws_rows = False

    def __init__(self, options: LoadingOptions) -> None:
        super().__init__()
        self.options = options
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_source: str | PreTrainedTokenizerBase | None = None
        self._tokenizer_digest = ""
        self._position: dict[str, int] | None = None  # where a checkpoint was written

    # What a subclass decides --------------------------------------------------------------------------------------

    @abstractmethod
    def train_rows(self) -> Any:
        """Return the training rows: a data set with a length."""

    @abstractmethod
    def lengths(self, rows: Any) -> torch.Tensor:
        """Return the number of tokens of every row."""

    @abstractmethod
    def collate(self) -> Callable[[Any], dict[str, torch.Tensor]]:
        """Return what makes a batch of rows."""

    # What the other rooms ask: see `ildistil.data.Task` -----------------------------------------------------------

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

    def every_row(self) -> DataLoader[Any]:
        """Return batches that hold every training row exactly once, grouped by length, all on this process."""
        return self.loader(self.train_rows(), place=(1, 0))

    # Position -----------------------------------------------------------------------------------------------------

    @property
    def items_at_once(self) -> int:
        """Rows that the next batches of all processes hold together; with ``tokens_per_batch``, their number."""
        rows = 1 if self.options.tokens_per_batch is not None else self.options.batch_size or 32
        return rows * self._place()[0]

    @property
    def items_of_step(self) -> int:
        """Rows of an optimiser step, of all processes and accumulated batches; with ``tokens_per_batch``, batches."""
        return self.items_at_once * (1 if self.trainer is None else self.trainer.accumulate_grad_batches)

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training set, which is the same in all processes.

        It is the epoch, how many rows of it all processes together have seen, and how many they take at once; with
        ``tokens_per_batch`` batches are counted instead.
        """
        if self.trainer is None:
            return {}
        now = position(self.trainer)
        at_once = self.items_at_once
        return {"epoch": now["epoch"], "seen": now["batches"] * at_once, "at_once": at_once}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take the position of a checkpoint, for the next training loader."""
        # Lightning asks loaders for a position of their own.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        self._position = dict(state)
        if state["seen"] and self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            raise DataError(
                "With overfit_batches Lightning takes the rows anew from the first, so that a training can't go on "
                "within an epoch. Go on from the end of one, or use limit_train."
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch, shuffled anew in each; at first what is left of it, where a run goes on."""
        loader = self.loader(self.train_rows(), training=True)
        # Told here, since Lightning opens the loader, and worker processes fetch, before it says which epoch it is.
        live = {"epoch": 0, "batches": 0} if self.trainer is None else position(self.trainer)
        epoch, batches = live["epoch"], live["batches"]
        if self._position is not None and self._position["epoch"] >= epoch:  # the loops may not be restored yet
            epoch, batches = self._position["epoch"], self._position["seen"] // self.items_at_once
        assert isinstance(loader.sampler, EpochSampler)
        loader.sampler.go_on(epoch, batches * (loader.batch_size or 1))
        return loader

    # Parts --------------------------------------------------------------------------------------------------------

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the options, or else of the model, loaded and checked."""
        wanted = self.options.tokenizer or self._model_tokenizer()
        if self._tokenizer is None or wanted != self._tokenizer_source:  # or that of the model which ran before
            tokenizer = load_tokenizer(wanted)
            self.check_tokenizer(tokenizer)
            self._tokenizer, self._tokenizer_source = tokenizer, wanted
            self._tokenizer_digest = tokenizer_digest(tokenizer)
        return self._tokenizer

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that can't make the batches."""
        check_tokenizer(tokenizer, self.options.max_length, pair=self.texts_per_row > 1)

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

    def loader(
        self, rows: Any, *, training: bool = False, in_order: bool = False, place: tuple[int, int] | None = None
    ) -> DataLoader[Any]:
        """Return the batches of some rows, on this process or, with a place, on any."""
        # Lightning advises more workers on sight of few. A batch of tokenised rows takes about a millisecond.
        warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
        sampler, batch_size = self._sampler(rows, training, in_order, *(place or self._place()))
        workers = self.options.num_workers
        return DataLoader(
            rows, batch_size=batch_size, sampler=sampler, collate_fn=self.collate(), num_workers=workers,
            persistent_workers=workers > 0, pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # of the workers' seeds, which would else be drawn from the global state
        )  # fmt: skip

    def _sampler(
        self, rows: Any, training: bool, in_order: bool, replicas: int, rank: int
    ) -> tuple[EpochSampler, int | None]:
        """Return the order of the rows and the batch size; None where the sampler's items are whole batches."""
        options, seed, numbered = self.options, self.order_seed(), self.draws_rows and training
        accumulate = self.trainer.accumulate_grad_batches if training and self.trainer is not None else 1
        if training and options.tokens_per_batch is not None:
            if self.trainer is not None and self.trainer.overfit_batches:  # type: ignore[attr-defined]
                raise DataError(
                    "With overfit_batches Lightning takes the rows in the file's order, one by one, which makes no "
                    "batches of tokens_per_batch. Use batch_size with it, or limit_train instead of it."
                )
            lengths = self.lengths(rows)
            return TokenBudgetSampler(
                lengths, options.tokens_per_batch, replicas, rank, seed, accumulate, numbered=numbered
            ), None
        batch_size = options.batch_size or 32
        if not training:
            batch_size = even_batch_size(len(rows), options.eval_batch_size or batch_size, replicas)
        if in_order or not options.group_by_length:
            return EpochSampler(
                len(rows), replicas, rank, shuffle=training, seed=seed, evaluation=not training, numbered=numbered
            ), batch_size
        return LengthGroupedSampler(
            self.lengths(rows), batch_size * accumulate, replicas, rank, seed, not training, numbered
        ), batch_size

    def order_seed(self) -> int:
        """Return the seed of the order of rows."""
        # Lightning's seed_everything leaves its seed in this variable, for its own samplers and for started processes.
        seed = self.options.seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed

    def _place(self) -> tuple[int, int]:
        """Return the number of processes that share the rows, and which of them this is."""
        if self.trainer is not None:
            return processes(self.trainer)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0
