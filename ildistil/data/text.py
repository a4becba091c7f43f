"""The user's own files."""

from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ildistil.data.files import table_column
from ildistil.data.labels import derive_label_names
from ildistil.data.module import FileSource, Source, TextDataModule
from ildistil.errors import DataError


class TextData(TextDataModule):
    """Texts or pairs of texts from the user's own TSV (no quoting), CSV, JSON, JSON lines or Parquet files.

    See `TextDataModule` for batches, cache and order.

    Args:
        train_file: File to train on.
        validation_file: File to validate on; None trains without validation.
        test_file: File to test on and to predict for; it may lack the label column.
        text_column: Column of the text.
        text_pair_column: Column of the second text of pairs.
        label_column: Column of the labels: words, or numbers from 0.
        label_names: The classes in the order of their indices; None takes the train file's labels, sorted.
        regression: The labels are numbers on a scale.
        name: What the task is called in logs and tables.
        tokenizer: A folder, a hub name or a loaded tokenizer; None takes that of the model the Trainer runs.
        batch_size: Rows per batch and process in training; None is 32.
        tokens_per_batch: Instead of ``batch_size``: tokens per batch and process in training, padding included.
        eval_batch_size: Rows per batch and process otherwise; None is ``batch_size``.
        max_length: Rows are cut to this many tokens.
        group_by_length: Batches hold rows of similar length.
        seed: Seed of the order and of the rows ``limit_train`` keeps; None is that of ``seed_everything``, else 0.
        num_workers: Worker processes per data loader.
        cache_dir: Folder of the cache; None is ``$ILDISTIL_CACHE`` or ``~/.cache/ildistil``.
        limit_train: Train on this many rows, drawn at random with the seed.

    Raises:
        DataError: No file is given, label names go with a regression or occur twice, a number is not positive, or
            ``tokens_per_batch`` is given together with ``batch_size`` or without ``group_by_length``.

    >>> TextData(train_file="reviews.csv", text_column="review", label_names=["bad", "good"]).num_labels
    2
    """

    validation_required = False

    def __init__(
        self,
        train_file: str | None = None,
        validation_file: str | None = None,
        test_file: str | None = None,
        text_column: str = "text",
        text_pair_column: str | None = None,
        label_column: str = "label",
        label_names: list[str] | None = None,
        regression: bool = False,
        name: str = "text",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        eval_batch_size: int | None = None,
        max_length: int = 128,
        group_by_length: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        limit_train: int | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            batch_size,
            tokens_per_batch,
            eval_batch_size,
            max_length,
            group_by_length,
            seed,
            num_workers,
            cache_dir,
            limit_train,
        )
        self.files = {"train": train_file, "validation": validation_file, "test": test_file}
        if not any(self.files.values()):
            raise DataError("TextData needs a file: set train_file, validation_file or test_file.")
        _check_label_names(label_names, regression)
        self.task_name = name
        self.regression = regression
        self.text_columns = (text_column,) if text_pair_column is None else (text_column, text_pair_column)
        self.label_column = label_column
        self.metric_names = ("pearson", "spearman") if regression else ("accuracy", "f1")
        self._given_names = label_names

    @property
    def label_names(self) -> list[str] | None:
        """The classes in the order of their indices; the train file is read for them unless they were given."""
        if self.regression:
            return None
        return list(self._given_names or self._derived_names)

    @cached_property
    def _derived_names(self) -> list[str]:
        if self.files["train"] is None:
            raise DataError("Without a train_file the classes are unknown: set label_names, in the model's order.")
        source = FileSource(Path(self.files["train"]).expanduser())
        values = table_column(source.read(), self.label_column, source.where)
        return derive_label_names(values, f"{source.where}, column {self.label_column!r}")

    def sources(self, kind: str) -> dict[str, Source]:
        """Return the file of a kind ("train", "validation", "test") by its name; empty if there is none."""
        file = self.files[kind]
        return {} if file is None else {kind: FileSource(Path(file).expanduser())}

    def missing(self, kind: str) -> str:
        """Return the message for a kind that is needed and has no file."""
        given = ", ".join(f"{k}_file={v!r}" for k, v in self.files.items() if v is not None)
        return f"TextData has no {kind} file, which this step needs. Set {kind}_file; given: {given}."


def _check_label_names(names: list[str] | None, regression: bool) -> None:
    if names is None:
        return
    if regression:
        raise DataError("A regression has no classes: remove label_names, or set regression: false.")
    if len(names) < 2 or len(set(names)) < len(names):
        raise DataError(f"label_names is {names}; name at least two classes, each once.")
