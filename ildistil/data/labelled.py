"""Texts, or pairs of texts, with one label each, a class or a number; or without."""

from collections.abc import Sequence
from typing import Any

import datasets
from torchmetrics import MetricCollection

from ildistil.data.files import ROWS_FROM_ZERO, Source, Table, quoted, similar, table_column
from ildistil.data.labels import all_hidden, encode_classes, encode_numbers
from ildistil.data.loading import TokenizedDataModule
from ildistil.data.options import LoadingOptions
from ildistil.data.task import Texts
from ildistil.data.tokenizing import tokenize
from ildistil.errors import DataError
from ildistil.metrics import OF_CLASSES, OF_NUMBERS, Positive, metric_collection


class LabelledText(TokenizedDataModule):
    """Base of data modules that make classification or regression batches of texts or pairs of texts.

    A batch is a dict: ``input_ids`` and ``attention_mask`` (batch x longest row, int64), ``token_type_ids`` if the
    tokenizer has them, ``labels`` (int64, or float32 in a regression; absent where they are secret, or there is no
    column of them) and ``row_id`` (int64): the row's position in its file, which neither shuffling nor ``limit_train``
    changes. An empty text is allowed, a missing one is not.

    Args:
        options: How rows are tokenised, batched and ordered.
        task_name: Name of the task for logs and tables.
        text_columns: Column of the text, or the two columns of pairs.
        label_column: Column of the labels; None where rows have none.
        label_names: The classes in the order of their indices; None in a regression.
        metric_names: Of `ildistil.metrics.METRICS`; the first is the primary one. None without labels.
        primary_metric: Another metric that chooses the best checkpoint: any of classes or numbers, whichever the labels
            are, or "loss".

    Raises:
        DataError: A column is named twice, or a metric doesn't exist or doesn't suit the labels.
    """

    def __init__(
        self, options: LoadingOptions, *, task_name: str, text_columns: Sequence[str], label_column: str | None,
        label_names: Sequence[str] | None, metric_names: Sequence[str],
        primary_metric: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(options)
        if len({*text_columns, label_column}) < len(text_columns) + 1:
            raise DataError(f"Texts ({', '.join(text_columns)}) and label ({label_column}) need a column each.")
        self.task_name = task_name
        self.text_columns = tuple(text_columns)
        self.texts_per_row = len(text_columns)
        self.label_column = label_column
        self._label_names = label_names
        self.metric_names: tuple[str, ...] = ()
        if self.labelled:
            self.metric_names = _checked_metrics(metric_names, primary_metric, regression=label_names is None)
        self._primary_metric = primary_metric or [*self.metric_names, "loss"][0]

    @property
    def labelled(self) -> bool:
        """Whether rows have labels."""
        return self.label_column is not None

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices; None in a regression, and without labels."""
        return None if self._label_names is None else list(self._label_names)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers on a scale."""
        return self.labelled and self._label_names is None

    @property
    def num_labels(self) -> int | None:
        """Outputs that the model's head needs: the number of classes, 1 in a regression; None without labels."""
        return len(self.label_names or [""]) if self.labelled else None

    @property
    def primary_metric(self) -> str:
        """Metric that chooses the best checkpoint."""
        return self._primary_metric

    @property
    def positive(self) -> Positive:
        """Class that f1 and average_precision are of: see `ildistil.metrics.metric_collection`."""
        return None

    def metrics(self) -> MetricCollection | None:
        """Return new metrics; see `Task.metrics` for what they are updated by."""
        if self.num_labels is None:
            return None
        return metric_collection(self.metric_names, self.num_labels, self.positive)

    def texts(self, kind: str) -> list[Texts]:
        """Return the texts of the rows of each source of a kind, as their files have them."""
        return [
            list(zip(*self._texts(source.read(), source.where), strict=True)) for source in self.sources(kind).values()
        ]

    def made_of(self, kind: str) -> dict[str, Any]:
        """Return columns and label names, and whether labels may be hidden."""
        labels = {"label_column": self.label_column, "label_names": self.label_names, "hidden": kind == "test"}
        return {"text_columns": self.text_columns, **labels}

    def tokenized(self, kind: str, source: Source) -> datasets.Dataset:
        """Return the rows of a source, checked and tokenised, with their labels unless these are hidden."""
        table, where = source.read(), source.where
        texts = self._texts(table, where)
        return tokenize(texts, self._labels(table, kind, where), self.tokenizer, self.max_length, where)

    def _texts(self, table: Table, where: str) -> list[list[str]]:
        """Return each column of texts."""
        return [_checked_texts(table_column(table, name, where), name, where) for name in self.text_columns]

    def _labels(self, table: Table, kind: str, where: str) -> list[int] | list[float] | None:
        """Return the labels as the model learns them; None for a test set that has none or keeps them secret."""
        names, column = self.label_names, self.label_column
        if column is None:
            return None
        may_hide = kind == "test" and "-1" not in (names or [])
        if may_hide and (column not in table or all_hidden(table[column])):
            return None
        values, where = labels_column(table, column, where), f"{where}, column {column!r}"
        return encode_numbers(values, where) if names is None else encode_classes(values, names, where)


def labels_column(table: Table, name: str, where: str) -> list[Any]:
    """Return the column of the labels.

    Raises:
        DataError: There is none of this name.
    """
    try:
        return table_column(table, name, where)
    except DataError as error:
        raise DataError(
            f"{error} Rows without labels serve objectives that read none, such as AttentionKL: set label_column to "
            "None (null in YAML)."
        ) from error


def _checked_metrics(names: Sequence[str], primary: str | None, regression: bool) -> tuple[str, ...]:
    """Return the metrics of a task, with the primary one among them."""
    known, kind = (OF_NUMBERS, "a regression") if regression else (OF_CLASSES, "classes")
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise DataError(f"metric_names is {names!r}; it must be a list of metrics. Those of {kind}: {quoted(known)}.")
    wanted = [*names, *([] if primary in (None, "loss") else [primary])]
    for name in wanted:
        if name not in known:
            near, loss = similar(str(name), known), " The primary one may also be 'loss'." if name == primary else ""
            raise DataError(f"There is no metric {name!r} of {kind}.{near} Those of {kind}: {quoted(known)}.{loss}")
    return tuple(dict.fromkeys(wanted))


def _checked_texts(values: Sequence[Any], name: str, where: str) -> list[str]:
    for row, value in enumerate(values):
        if not _is_text(value):
            raise DataError(
                f"{where}: row {row} ({ROWS_FROM_ZERO}) has {value!r:.80} in the column {name!r}, not a text. Fill in "
                "the text (it may be empty) or remove the row."
            )
    return list(values)


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair, as broken JSON has them: no tokenizer takes it
        return False
