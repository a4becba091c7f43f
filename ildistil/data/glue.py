"""The GLUE tasks, from the hub or from local files."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from ildistil.data.files import Table, files_near, find_table
from ildistil.data.module import FileSource, Source, TextDataModule
from ildistil.errors import DataError, MissingFileError

HUB_REPOSITORY = "nyu-mll/glue"

_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Task:
    """The text columns of a task, its classes in the official order (None: a regression), its metrics."""

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)


TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy")),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "stsb": Task(("sentence1", "sentence2"), None, ("pearson", "spearman")),
    "mnli": Task(("premise", "hypothesis"), _MNLI),
    "qnli": Task(("question", "sentence"), _ENTAILMENT),
    "rte": Task(("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": Task(("sentence1", "sentence2"), ("not_entailment", "entailment")),
    "ax": Task(("premise", "hypothesis"), _MNLI, ("matthews", "accuracy")),
}


@dataclass(frozen=True)
class HubSource:
    """A split of the hub's data set."""

    task: str
    split: str
    rows: datasets.Dataset

    @property
    def where(self) -> str:
        """Task and split."""
        return f"{self.task} {self.split} (from the hub)"

    def read(self) -> Table:
        """Return all columns."""
        table: Table = self.rows[:]
        return table

    def fingerprint(self) -> str:
        """Return the hash that the `datasets` library keeps of the content."""
        return f"hub:{self.rows._fingerprint}"


class Glue(TextDataModule):
    """One of the nine GLUE tasks (cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli), or the diagnostic set ax.

    Local files are ``train``, ``validation`` and, if there is one, ``test`` with the ending ``.tsv`` (no quoting),
    ``.csv``, ``.json``, ``.jsonl`` or ``.parquet``, with the hub's column names. MNLI has ``validation_matched`` and
    ``validation_mismatched``, and two validation loaders; ax has MNLI's classes and is for evaluation only. Labels are
    words or numbers. See `TextDataModule` for batches, cache and order.

    Args:
        task: Name of the task; "SST-2" and "sst2" are the same.
        tokenizer: A folder, a hub name or a loaded tokenizer; None takes that of the model the Trainer runs.
        path: Folder with the files, or the folder that holds a folder for each task; None loads from the hub.
        batch_size: Rows per batch and process in training; None is 32.
        tokens_per_batch: Instead of ``batch_size``: tokens per batch and process in training, padding included.
        eval_batch_size: Rows per batch and process otherwise; None is ``batch_size``.
        max_length: Rows are cut to this many tokens.
        group_by_length: Batches hold rows of similar length.
        seed: Seed of the order and of the rows ``limit_train`` keeps; None is that of ``seed_everything``, else 0.
        num_workers: Worker processes per data loader.
        cache_dir: Folder of the cache; None is ``$ILDISTIL_CACHE`` or ``~/.cache/ildistil``.
        limit_train: Train on this many rows, drawn at random with the seed.
        train_file: Another name for the train file, relative to the task's folder; needs ``path``.

    Raises:
        DataError: The task is unknown, a number is not positive, or
            ``tokens_per_batch`` is given together with ``batch_size`` or without ``group_by_length``.

    >>> Glue("MRPC").label_names, Glue("stsb").num_labels, Glue("mnli").validation_names
    (['not_equivalent', 'equivalent'], 1, ['val', 'val_mismatched'])
    """

    def __init__(
        self,
        task: str,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        path: str | None = None,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        eval_batch_size: int | None = None,
        max_length: int = 128,
        group_by_length: bool = True,
        seed: int | None = None,
        num_workers: int = 0,
        cache_dir: str | None = None,
        limit_train: int | None = None,
        train_file: str | None = None,
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
        self.task_name = _task_name(task)
        self.task = TASKS[self.task_name]
        if train_file is not None and path is None:
            raise DataError(f"train_file={train_file!r} needs path=<its folder>; the hub has its own train set.")
        self.path = path
        self.train_file = train_file
        self.regression = self.task.label_names is None
        self.text_columns = self.task.text_columns
        self.label_column = "label"
        self.metric_names = self.task.metrics
        self._hub: datasets.DatasetDict | None = None

    @property
    def label_names(self) -> list[str] | None:
        """The classes in the official order; None for STS-B, a regression."""
        return None if self.task.label_names is None else list(self.task.label_names)

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets for logs, known without loading anything from the hub."""
        if self.path is None:
            return {"mnli": ["val", "val_mismatched"], "ax": []}.get(self.task_name, ["val"])
        return super().validation_names

    def sources(self, kind: str) -> dict[str, Source]:
        """Return the sources of a kind ("train", "validation", "test") by their names; empty if there are none."""
        both_sets = self.task_name == "mnli" and kind != "train"
        names = [f"{kind}_matched", f"{kind}_mismatched"] if both_sets else [kind]
        if self.path is None:
            hub = self._from_hub()
            return {name: HubSource(self.task_name, name, hub[name]) for name in names if name in hub}
        folder = self._folder()
        if kind == "train" and self.train_file is not None:
            return {"train": FileSource(folder / self.train_file)}
        found = {name: find_table(folder, name) for name in names}
        return {name: FileSource(path) for name, path in found.items() if path is not None}

    def missing(self, kind: str) -> str:
        """Return the message for a kind that is needed and has no source."""
        if self.task_name == "ax":
            return f"ax, the diagnostic set, has no {kind} set here: train on mnli, and test or predict with ax."
        if self.path is None:
            return f"{HUB_REPOSITORY} has no {kind} set of {self.task_name}."
        name = f"{kind}_matched" if self.task_name == "mnli" and kind != "train" else kind
        hints = {"train": " If it has another name, set train_file.", "test": " Without one, validate."}
        found = files_near(self._folder()) + hints.get(kind, "")
        return f"There is no file {name}.tsv (.csv, .json, .jsonl, .parquet). {found}"

    def _folder(self) -> Path:
        """Return the task's own folder: inside ``path`` if there is one of its name, else ``path`` itself."""
        path = Path(str(self.path)).expanduser()
        if not path.is_dir():
            raise MissingFileError(f"path={self.path!r} is not a folder. {files_near(path)}")
        inside = [p for p in sorted(path.iterdir()) if p.is_dir() and _plain(p.name) == self.task_name]
        return inside[0] if inside else path

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
    if _plain(task) in TASKS:
        return _plain(task)
    close = difflib.get_close_matches(_plain(task), TASKS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise DataError(f"Unknown GLUE task {task!r}.{hint} Known: {', '.join(TASKS)}.")
