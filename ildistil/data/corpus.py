"""Text without labels, for task-agnostic distillation: packed once, drawn in an order that needs no memory."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from ildistil.data.masking import Masking, check_mask_token
from ildistil.data.options import LoadingOptions
from ildistil.data.packing import HubText, Packed, Packing, Rows, TextFiles, open_packed, pack
from ildistil.data.permutation import Permutation
from ildistil.data.serving import RowsDataModule
from ildistil.data.tokenizing import Collate, padded
from ildistil.errors import DataError
from ildistil.metrics import IGNORED
from ildistil.students.sources import Head

Labels = Literal["masked", "next", "none"]


class Corpus(RowsDataModule):
    """Rows of tokens from a corpus of text, without labels of a task.

    ``prepare_data`` packs the corpus into token shards in the cache, once on each node and in parallel processes;
    `setup` opens them, mapped into memory that all processes of a node share. A batch is a dict of int64 tensors:
    ``input_ids`` and ``attention_mask`` (batch x longest row), ``row_id`` (the row's number in the packed corpus), and
    ``labels`` (batch x longest row, -100 where nothing is to be predicted) unless these are "none".

    Masked tokens are a function of (seed, epoch, row), and those of the validation rows of (seed, row): they do not
    depend on workers, processes or batches, and return when a run goes on. See `ildistil.data.masking.Masking`.

    Args:
        files: Files of text to train on: ``.txt``, ``.jsonl`` or ``.parquet``; files, folders, globs, or a list.
        validation_files: Files to validate on.
        validation_share: Instead of them, the share of the documents that is kept for validation, chosen by their
            content.
        dataset: Instead of files, a data set of the hub, or a local folder that `datasets.load_dataset` reads.
        dataset_config: Its configuration.
        dataset_split: Its split.
        streaming: Read it once as a stream, without a copy on disk.
        text_column: Column of the text in JSON lines, Parquet files and data sets.
        packed: Rows of ``max_length`` tokens that run across documents, with separators between these; else a text a
            row, cut to ``max_length``.
        labels: What the labels are: "masked" tokens, of which the model sees masks; "next", the tokens themselves
            (but for one that follows padding), for a causal language model; or "none".
        mask_probability: Share of a row's tokens that are to be predicted.
        whole_words: Mask whole words.
        processes: Processes that pack; None is one for each core.
        group_by_length: Batches hold rows of similar length; None means so unless rows are packed.
        loading: The other options of `LoadingOptions`, by name: ``tokenizer``, ``batch_size``, ``max_length`` ...

    Raises:
        DataError: There is no source, or two; an option contradicts another one, or see `LoadingOptions`.

    >>> Corpus("texts/*.txt", validation_share=0.01, labels="masked", max_length=512).primary_metric
    'loss'
    """

    validation_required = False
    task_name = "corpus"
    #: The best checkpoint is that with the lowest loss on the validation rows.
    primary_metric = "loss"
    #: There are no labels of a task: sets are measured by the terms.
    labelled = False

    def __init__(
        self, files: str | list[str] | None = None, validation_files: str | list[str] | None = None,
        validation_share: float = 0.0, dataset: str | None = None, dataset_config: str | None = None,
        dataset_split: str = "train", streaming: bool = False, text_column: str = "text", packed: bool = True,
        labels: Labels = "none", mask_probability: float = 0.15, whole_words: bool = False,
        processes: int | None = None, group_by_length: bool | None = None, **loading: Any,
    ) -> None:  # fmt: skip
        _check_packed(packed, group_by_length, loading)
        grouped = not packed if group_by_length is None else group_by_length
        super().__init__(LoadingOptions(group_by_length=grouped, **loading))
        self.source = _source(files, dataset, dataset_config, dataset_split, text_column, streaming)
        self.validation_source = None if validation_files is None else TextFiles(validation_files, text_column)
        _check_share(validation_share, validation_files)
        self.validation_share, self.packed = float(validation_share), packed
        _check_labels(labels, mask_probability, whole_words)
        self.labels: Labels = labels
        self.draws_rows = labels == "masked"
        self.mask_probability, self.whole_words = mask_probability, whole_words
        if processes is not None and (type(processes) is not int or processes < 1):
            raise DataError(f"processes is {processes!r}; it must be a whole number, at least 1, or null.")
        self.processes = processes
        self._splits: dict[str, Rows] = {}

    # What the other rooms ask: see `ildistil.data.Task` -----------------------------------------------------------

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets for logs."""
        return ["val"] if self._validates else []

    @property
    def head(self) -> Head | None:
        """Kind of head that the labels are for."""
        heads: dict[str, Head] = {"masked": "masked-lm", "next": "causal-lm"}
        return heads.get(self.labels)

    def metrics(self) -> None:
        """Return None: there is no task to measure."""
        return

    @property
    def fingerprint(self) -> str:
        """What the training batches depend on, beside the size of a step: rows, tokenizer, order and masks."""
        options = self.options
        told: dict[str, Any] = {"seed": self.order_seed(), "group_by_length": options.group_by_length}
        told |= {"tokens_per_batch": options.tokens_per_batch, "limit_train": options.limit_train}
        told["labels"] = self.labels
        if self.labels == "masked":
            told |= {"mask_probability": self.mask_probability, "whole_words": self.whole_words}
        digest = self._splits["train"].digest[:12] if "train" in self._splits else ""
        return " ".join(["Corpus", digest, *(f"{name}={value}" for name, value in told.items() if value is not None)])

    def every_row(self) -> DataLoader[Any]:
        """Return batches that hold every training row exactly once, all on this process.

        Raises:
            DataError: The rows are others in each epoch.
        """
        if self.labels == "masked":
            raise DataError(
                "With labels='masked' the rows are masked anew in each epoch, so that what a teacher makes of them "
                "can't be stored. Use labels='none' or 'next', whose rows stay the same, or a teacher that runs."
            )
        return super().every_row()

    # Lightning's steps --------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Pack the corpus, unless the cache has it."""
        self._check_stage(None if self.trainer is None else getattr(self.trainer.state.fn, "value", None))
        self._each(lambda source, kind: pack(source, kind, self.options.cache_dir, self.processes))

    def setup(self, stage: str | None = None) -> None:
        """Open the packed corpus.

        Args:
            stage: "fit", "validate", or None for both.
        """
        self._check_stage(stage)
        self._position = None
        found = self._each(lambda source, kind: open_packed(source, kind, self.options.cache_dir))
        splits = {"train": found["train"].train}
        if self._validates:
            held_out = found["validation"].train if self.validation_source else found["train"].validation
            assert held_out is not None
            splits["validation"] = held_out
        told, self._splits = self._splits, splits
        if not told:
            self._tell()

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return the loader of the validation rows, if there are any; they are masked alike in every epoch."""
        if not self._validates:  # which Lightning takes for a mistake
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return [self.loader(Numbered(self._splits["validation"]))]

    # Parts --------------------------------------------------------------------------------------------------------

    @property
    def _validates(self) -> bool:
        return self.validation_source is not None or self.validation_share > 0

    def _each(self, use: Callable[[TextFiles | HubText, Packing], Packed]) -> dict[str, Packed]:
        """Return what packing makes of each source."""
        kind = Packing(self.load_tokenizer(), self.max_length, self.packed, self.whole_words, self.validation_share)
        found = {"train": use(self.source, kind)}
        if self.validation_source is not None:
            found["validation"] = use(self.validation_source, kind)
        return found

    def _check_stage(self, stage: str | None) -> None:
        if stage in ("test", "predict"):
            raise DataError(
                f"A Corpus has no rows to {stage} with: it serves training and its validation. Use TextData or Glue."
            )
        if stage == "validate" and not self._validates:
            raise DataError("The Corpus has nothing to validate on. Set validation_files or validation_share.")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer that can't make the batches."""
        super().check_tokenizer(tokenizer)
        if self.labels == "masked":
            check_mask_token(tokenizer)

    def train_rows(self) -> "Numbered":
        """Return the training rows, or those of them that ``limit_train`` keeps."""
        rows, limit = self._splits["train"], self.options.limit_train
        if limit is None or limit >= len(rows):
            return Numbered(rows)
        return Numbered(rows, np.sort(Permutation(len(rows), [self.order_seed(), 0])(np.arange(limit))))

    def lengths(self, rows: "Numbered") -> torch.Tensor:
        """Return the number of tokens of every row."""
        chosen = slice(None) if rows.chosen is None else rows.chosen
        return torch.from_numpy(np.array(rows.rows.lengths[chosen]))

    def collate(self) -> "CorpusCollate":
        """Return what makes a batch of rows."""
        masking = None
        if self.labels == "masked":
            masking = Masking.of(self.tokenizer, self.mask_probability, self.whole_words, self.order_seed())
        return CorpusCollate(self.tokenizer, self.labels, masking)

    def _tell(self) -> None:
        """Print what will be read."""
        train, held_out = self._splits["train"], self._splits.get("validation")
        rows = len(self.train_rows())
        lines = [f"Corpus: {len(train):,} rows, {train.tokens:,} tokens, labels: {self.labels}"]
        lines += [f"  train on {rows:,} of them"] if rows < len(train) else []
        if self.options.tokens_per_batch is None:
            at_once = self.items_of_step
            lines.append(f"  an epoch: {math.ceil(rows / at_once):,} steps of {at_once:,} rows")
        if held_out is not None:
            lines.append(f"  validation: {len(held_out):,} rows, {held_out.tokens:,} tokens")
        rank_zero_info("\n".join(lines))


@dataclass(frozen=True, eq=False)
class Numbered(Dataset[Any]):
    """Rows by numbers that carry the epoch: ``epoch * len + row``; without one it is epoch 0.

    Args:
        rows: Packed rows.
        chosen: Numbers of those to use; None is all.
    """

    rows: Rows
    chosen: np.ndarray | None = field(default=None)

    def __len__(self) -> int:
        return len(self.rows) if self.chosen is None else len(self.chosen)

    def __getitem__(self, item: int | Sequence[int]) -> Any:
        """Return a row, or the rows of several numbers."""
        if isinstance(item, Sequence):
            return [self[each] for each in item]
        epoch, place = divmod(item, len(self))
        row = place if self.chosen is None else int(self.chosen[place])
        return {**self.rows[row], "row_id": row, "epoch": epoch}


@dataclass(frozen=True, eq=False)
class CorpusCollate:
    """Make a batch of rows, with its labels.

    Args:
        tokenizer: The tokenizer, which says how to pad.
        labels: What the labels are.
        masking: What draws masked tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    labels: Labels
    masking: Masking | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask``, ``row_id``, and ``labels`` if there are any."""
        batch = Collate(self.tokenizer)(rows)
        real = batch["attention_mask"].bool()
        if self.labels == "next":
            # A token after padding would be predicted from padding.
            after_real = torch.nn.functional.pad(real, (1, -1), value=True)
            batch["labels"] = batch["input_ids"].masked_fill(~(real & after_real), IGNORED)
        if self.masking is not None:
            left = self.tokenizer.padding_side == "left"
            starts = None
            if self.masking.whole_words:
                starts = padded([row["word_starts"] for row in rows], 0, left).astype(bool)
            row_ids, epochs = (np.array([row[name] for row in rows]) for name in ("row_id", "epoch"))
            seen, labels = self.masking(batch["input_ids"].numpy(), real.numpy(), row_ids, epochs, starts)
            batch |= {"input_ids": torch.from_numpy(seen), "labels": torch.from_numpy(labels)}
        return batch


def _source(
    files: str | list[str] | None, dataset: str | None, config: str | None, split: str, column: str, streaming: bool
) -> TextFiles | HubText:
    if (files is None) == (dataset is None):
        both = "both" if files is not None else "neither"
        raise DataError(f"A Corpus is made of files or of a dataset, got {both}. Set one of them.")
    if files is not None and (config is not None or split != "train" or streaming):
        raise DataError("dataset_config, dataset_split and streaming belong to a dataset. Leave them out with files.")
    return TextFiles(files, column) if files is not None else HubText(str(dataset), config, split, column, streaming)


def _check_packed(packed: bool, grouped: bool | None, loading: Mapping[str, Any]) -> None:
    if packed and (grouped or loading.get("tokens_per_batch") is not None):
        raise DataError(
            "Packed rows are all of max_length tokens: leave out group_by_length and tokens_per_batch, and set "
            "batch_size; or set packed: false, for rows of a text each."
        )


def _check_share(share: float, files: str | list[str] | None) -> None:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise DataError(f"validation_share is {share!r}; it must be at least 0 and below 1, such as 0.01.")
    if share and files is not None:
        raise DataError("validation_files and validation_share both say what to validate on. Leave one of them out.")


def _check_labels(labels: str, probability: float, whole_words: bool) -> None:
    if labels not in get_args(Labels):
        raise DataError(f"labels is {labels!r}; it must be 'masked', 'next' or 'none'.")
    if isinstance(probability, bool) or not isinstance(probability, int | float) or not 0 < probability <= 1:
        raise DataError(f"mask_probability is {probability!r}; it must be above 0 and at most 1.")
    if whole_words and labels != "masked":
        raise DataError(
            f"whole_words masks whole words, and labels is {labels!r}. Set labels: masked, or leave it out."
        )
