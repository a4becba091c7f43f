"""The user's own files."""

from functools import cached_property
from typing import Any

from ildistil.data.files import Source, file_source, quoted, similar
from ildistil.data.labelled import LabelledText, labels_column
from ildistil.data.labels import derive_label_names
from ildistil.data.options import LoadingOptions
from ildistil.errors import DataError
from ildistil.metrics import Positive


class TextData(LabelledText):
    """Texts or pairs of texts from the user's own TSV (no quoting), CSV, JSON, JSON lines or Parquet files.

    See `LabelledText` for what a batch holds.

    Args:
        train_file: File to train on.
        validation_file: File to validate on; None trains without validation.
        test_file: File to test on and to predict for; it may lack the label column.
        text_column: Column of the text.
        text_pair_column: Column of the second text of pairs.
        label_column: Column of the labels: words, or numbers from 0. None (null in YAML) for rows without labels, which
            serve objectives that read none; sets are then measured by the terms.
        label_names: The classes in the order of their indices; None takes the train file's labels, sorted.
        regression: The labels are numbers on a scale.
        positive_label: The class that the metrics f1 and average_precision are of; None takes their mean over the
            classes, whichever of two comes first in the alphabet.
        metric_names: Metrics to measure: accuracy, f1, macro_f1, average_precision, matthews; pearson and spearman in a
            regression. None is accuracy and f1, with a positive label average_precision too; both in a regression.
        primary_metric: The metric that chooses the best checkpoint, or "loss"; None is the first.
        name: Name of the task in logs and tables.
        loading: The options of `LoadingOptions`, by name: ``tokenizer``, ``batch_size`` ...

    Raises:
        DataError: No file is given, a column is named twice, label names go with a regression, occur twice or are no
            list of strings, the positive label is none of them, a metric doesn't exist, or see `LoadingOptions`.

    >>> TextData(train_file="reviews.csv", text_column="review", label_names=["bad", "good"], batch_size=8).num_labels
    2
    """

    validation_required = False

    def __init__(
        self, train_file: str | None = None, validation_file: str | None = None, test_file: str | None = None,
        text_column: str = "text", text_pair_column: str | None = None, label_column: str | None = "label",
        label_names: list[str] | None = None, regression: bool = False, positive_label: str | None = None,
        metric_names: list[str] | None = None, primary_metric: str | None = None, name: str = "text", **loading: Any,
    ) -> None:  # fmt: skip
        _check_label_names(label_names, regression)
        of_labels = {"label_names": label_names, "positive_label": positive_label, "metric_names": metric_names}
        told = [n for n, v in {**of_labels, "regression": regression or None}.items() if v is not None]
        if label_column is None and told:
            raise DataError(f"label_column is None, so there are no labels: leave out {', '.join(told)}.")
        if positive_label is not None and (regression or not isinstance(positive_label, str)):
            raise DataError(f"positive_label is {positive_label!r}; it must be the name of a class, in quotes.")
        usual = ["accuracy", "f1", *(["average_precision"] if positive_label is not None else [])]
        super().__init__(
            LoadingOptions(**loading),
            task_name=name,
            text_columns=[text_column] if text_pair_column is None else [text_column, text_pair_column],
            label_column=label_column,
            label_names=None if regression or label_column is None else label_names or [],
            metric_names=(["pearson", "spearman"] if regression else usual) if metric_names is None else metric_names,
            primary_metric=primary_metric,
        )
        self.positive_label = positive_label
        if label_names:
            self.positive  # noqa: B018 (refused now rather than when the file is read)
        self.files = {"train": train_file, "validation": validation_file, "test": test_file}
        if not any(self.files.values()):
            raise DataError("TextData needs a file: set train_file, validation_file or test_file.")

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices; read from the train file unless they were given.

        None in a regression, and without labels.
        """
        given = not self.labelled or self.regression or self._label_names
        return super().label_names if given else list(self._derived_names)

    @property
    def positive(self) -> Positive:
        """Class that f1 and average_precision are of, or "all" for their mean over the classes."""
        names, positive = self.label_names or [], self.positive_label
        if positive is None:
            return "all"
        if positive not in names:
            raise DataError(f"positive_label is {positive!r}.{similar(positive, names)} The classes: {quoted(names)}.")
        return names.index(positive)

    @cached_property
    def _derived_names(self) -> list[str]:
        if self.files["train"] is None:
            raise DataError("Without a train_file the classes are unknown: set label_names, in the model's order.")
        assert self.label_column is not None, "asked only where there are labels"
        source = file_source(self.files["train"])
        values = labels_column(source.read(), self.label_column, source.where)
        return derive_label_names(values, f"{source.where}, column {self.label_column!r}")

    def sources(self, kind: str) -> dict[str, Source]:
        """Return the file of a kind ("train", "validation", "test") by its name; empty if there is none."""
        file = self.files[kind]
        return {} if file is None else {kind: file_source(file)}

    def missing(self, kind: str) -> str:
        """Return the message for a kind that is needed and has no file."""
        given = ", ".join(f"{k}_file={v!r}" for k, v in self.files.items() if v is not None)
        return f"TextData has no {kind} file, which this step needs. Set {kind}_file; given: {given}."


def _check_label_names(names: list[str] | None, regression: bool) -> None:
    if names is not None and regression:
        raise DataError("A regression has no classes: remove label_names, or set regression: false.")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names or []):
        raise DataError(f"label_names is {names!r}; it must be a list of strings, such as ['0', '1'].")
    if names is not None and len(set(names)) < max(2, len(names)):
        raise DataError(f"label_names is {names}; name at least two classes, each once.")
