"""The GLUE tasks, from the hub or from local files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from ildistil.data.files import Source, expanded, file_source, files_near, find_table, similar
from ildistil.data.labelled import LabelledText
from ildistil.data.options import LoadingOptions
from ildistil.errors import DataError, MissingFileError, reading

HUB_REPOSITORY = "nyu-mll/glue"

_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class GlueTask:
    """Text columns of a task, its classes in the official order (None: a regression), and its metrics."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metric_names: tuple[str, ...] = ("accuracy",)


TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "stsb": GlueTask(("sentence1", "sentence2"), None, ("pearson", "spearman")),
    "mnli": GlueTask(("premise", "hypothesis"), _MNLI),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "rte": GlueTask(("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
    "ax": GlueTask(("premise", "hypothesis"), _MNLI, ("matthews", "accuracy")),
}


class Glue(LabelledText):
    """One of the nine GLUE tasks (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli), or the diagnostic set ax.

    Local files are ``train``, ``validation`` and, if there is one, ``test`` with the ending ``.tsv`` (no quoting),
    ``.csv``, ``.json``, ``.jsonl`` or ``.parquet``, with the hub's column names. MNLI has ``validation_matched`` and
    ``validation_mismatched``, and two validation loaders; ax has MNLI's classes and is for evaluation only. Labels are
    words or numbers. See `LabelledText` for what a batch holds.

    Args:
        task: Name of the task; "SST-2" and "sst2" are the same.
        path: Folder with the files, or the folder that holds a folder for each task; None loads from the hub.
        train_file: Another name for the train file, relative to the task's folder; needs ``path``.
        primary_metric: Another metric that chooses the best checkpoint than the task's official one, or "loss".
        loading: The options of `LoadingOptions`, by name: ``tokenizer``, ``batch_size`` ...

    Raises:
        DataError: The task is unknown, ``train_file`` has no ``path``, the metric doesn't suit the task, or see
            `LoadingOptions`.

    >>> Glue("MRPC").label_names, Glue("stsb").num_labels, Glue("mnli", batch_size=8).validation_names
    (['not_equivalent', 'equivalent'], 1, ['val', 'val_mismatched'])
    """

    def __init__(
        self, task: str, path: str | None = None, train_file: str | None = None, primary_metric: str | None = None,
        **loading: Any,
    ) -> None:  # fmt: skip
        if train_file is not None and path is None:
            raise DataError(f"train_file={train_file!r} needs path=<its folder>; the hub has its own train set.")
        name = _task_name(task)
        super().__init__(
            LoadingOptions(**loading), task_name=name, label_column="label", primary_metric=primary_metric,
            **vars(TASKS[name]),
        )  # fmt: skip
        self.path = path
        self.train_file = train_file
        self._hub: datasets.DatasetDict | None = None

    def split_names(self, kind: str) -> list[str]:
        """Return the names of the sources of a kind, without loading anything from the hub."""
        if self.path is not None:
            return super().split_names(kind)
        return [] if self.task_name == "ax" and kind != "test" else self._file_names(kind)

    def sources(self, kind: str) -> dict[str, Source]:
        """Return the sources of a kind ("train", "validation", "test") by their names; empty if there are none."""
        names = self._file_names(kind)
        if self.path is None:
            hub = self._from_hub()
            return {name: self._hub_source(name, hub[name]) for name in names if name in hub}
        folder = self._folder()
        if kind == "train" and self.train_file is not None:
            return {"train": file_source(folder / self.train_file)}
        found = {name: find_table(folder, name) for name in names}
        return {name: file_source(path) for name, path in found.items() if path is not None}

    def missing(self, kind: str) -> str:
        """Return the message for a kind that is needed and has no source."""
        if self.task_name == "ax":
            return f"ax, the diagnostic set, has no {kind} set here: train on mnli, and test or predict with ax."
        if self.path is None:
            return f"{HUB_REPOSITORY} has no {kind} set of {self.task_name}."
        hints = {"train": " If it has another name, set train_file.", "test": " Without one, validate."}
        found = files_near(self._folder()) + hints.get(kind, "")
        return f"There is no file {self._file_names(kind)[0]}.tsv (.csv, .json, .jsonl, .parquet). {found}"

    def _file_names(self, kind: str) -> list[str]:
        both_sets = self.task_name == "mnli" and kind != "train"
        return [f"{kind}_matched", f"{kind}_mismatched"] if both_sets else [kind]

    def _folder(self) -> Path:
        """Return the task's own folder: inside ``path`` if there is one of its name, else ``path`` itself."""
        path = expanded(str(self.path))
        if not path.is_dir():
            raise MissingFileError(f"path={self.path!r} is not a folder. {files_near(path)}")
        with reading(path):
            inside = [p for p in sorted(path.iterdir()) if p.is_dir() and _plain(p.name) == self.task_name]
        if len(inside) > 1:
            raise DataError(f"{path} holds several folders of {self.task_name}: {[p.name for p in inside]}. Name one.")
        return inside[0] if inside else path

    def _hub_source(self, split: str, rows: datasets.Dataset) -> Source:
        # The `datasets` library keeps a hash of the content.
        where = f"{self.task_name} {split} (from the hub)"
        return Source(where, lambda: rows[:], lambda: f"hub:{rows._fingerprint}")

    def _from_hub(self) -> datasets.DatasetDict:
        if self._hub is None:
            try:
                self._hub = datasets.load_dataset(HUB_REPOSITORY, self.task_name)
            except Exception as error:  # many libraries deep: connection, permission, cache and parsing errors
                raise MissingFileError(
                    f"GLUE's {self.task_name} could not be loaded from the hub ({HUB_REPOSITORY}): {error}\nCheck the "
                    "network connection, or use files that you have: Glue(..., path=<folder>)."
                ) from error
        return self._hub


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _task_name(task: str) -> str:
    if _plain(task) not in TASKS:
        raise DataError(f"Unknown GLUE task {task!r}.{similar(_plain(task), TASKS)} Known: {', '.join(TASKS)}.")
    return _plain(task)
