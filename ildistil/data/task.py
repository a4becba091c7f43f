"""What training, teachers and commands ask of a data module: one protocol, with a default for each question."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from inspect import getattr_static
from typing import Any, Literal, Protocol, TypeVar, cast, get_args

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from ildistil.errors import DataError
from ildistil.metrics import default_metrics
from ildistil.students.sources import Head

__all__ = ["Task", "Texts", "every_row", "label_config", "set_names", "task_of"]

Batches = Iterable[Mapping[str, Any]]
#: Texts of a set's rows, one or two a row, in the order of their ids.
Texts = Sequence[tuple[str, ...]]
T = TypeVar("T")


class Task(Protocol):
    """What training, teachers and commands ask of a data module.

    A `LightningDataModule` answers by attributes, properties or methods of these names. It need not inherit from this
    class, and may leave out any of them: `task_of` reads and checks the answers, and supplies the defaults.
    """

    @property
    def task_name(self) -> str | None:
        """Name of the task for logs and tables. Default: None."""

    @property
    def labelled(self) -> bool | None:
        """Whether rows have labels of a task, which the student's predictions are measured by; else the terms are.

        Default: None, by what the batches hold.
        """

    @property
    def head(self) -> Head | None:
        """Kind of head that the labels are for, which fine-tuning puts on a model. Default: None, by the labels."""

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes in the order of their indices, each once. Default: None, unknown or a regression."""

    @property
    def num_labels(self) -> int | None:
        """Outputs of the model's head. Default: the number of label names, 1 in a regression, else None, unknown."""

    @property
    def regression(self) -> bool:
        """Whether labels are numbers on a scale. Default: whether ``num_labels`` is 1."""

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels. Default: False."""

    @property
    def validation_names(self) -> list[str]:
        """Names of the validation sets for logs, in the order of the loaders. Default: ``["val"]``."""

    @property
    def test_names(self) -> list[str]:
        """Names of the test sets for logs, in the order of the loaders. Default: ``["test"]``."""

    @property
    def primary_metric(self) -> str | None:
        """Metric that chooses the best checkpoint: one of ``metrics``, or "loss". Default: None, no choice."""

    @property
    def primary_mode(self) -> Literal["min", "max"]:
        """Whether that metric is to fall or to rise. Default: as it states itself; "min" for the loss."""

    @property
    def max_length(self) -> int | None:
        """Most tokens of a row. Default: None, unknown."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the rows, at the latest after ``setup``. Default: None, unknown."""

    @property
    def fingerprint(self) -> str | None:
        """What the training batches depend on, in words: a run goes on from a checkpoint with the same alone.

        Default: None, unknown.
        """

    def metrics(self) -> MetricCollection | None:
        """Return new metrics, updated by ``preds`` and ``target``, and by ``logits=`` if they have such an argument.

        ``preds`` are class indices, floats in a regression, or 0 and 1 for each of several labels.

        Default: `default_metrics` of the labels; None where these are unknown.
        """

    def every_row(self) -> Batches:
        """Return batches that hold every training row exactly once, all on this process; usable after ``setup``.

        A teacher's targets are stored from them. They can be gone through repeatedly, and are best of rows of similar
        length. Default: those that the function `every_row` makes of the training loader.
        """

    def texts(self, kind: Literal["train", "validation", "test"]) -> Sequence[Texts] | None:
        """Return the texts of the rows of each set of a kind, in the order of ``row_id``, to be shown and compared.

        Default: None, unknown.
        """


def task_of(data: object) -> Task:
    """Return what a data module declares of its task, with the defaults of `Task` for what it does not.

    An answer is read and checked once, when it is first asked for: some are known only after ``setup``.

    Args:
        data: A data module, or None where there are only loaders.

    Raises:
        DataError: From the members of the result: an answer has the wrong type, or contradicts another one.

    >>> task = task_of(None)
    >>> task.num_labels, task.validation_names, task.metrics()
    (None, ['val'], None)
    """
    return _Checked(data)


def label_config(task: Task) -> dict[str, Any]:
    """Return the values of a transformers config that describe a task's labels; empty where they are unknown.

    >>> from ildistil.data import Glue
    >>> label_config(task_of(Glue("stsb")))
    {'num_labels': 1, 'problem_type': 'regression'}
    """
    if task.num_labels is None:
        return {}
    kind = "multi_label_classification" if task.multi_label else "single_label_classification"
    found: dict[str, Any] = {"num_labels": task.num_labels, "problem_type": "regression" if task.regression else kind}
    if task.label_names is not None:
        found["id2label"] = dict(enumerate(task.label_names))
        found["label2id"] = {name: i for i, name in enumerate(task.label_names)}
    return found


def set_names(declared: Sequence[str], count: int) -> list[str]:
    """Return a name for each evaluation set, given those that a task declares; a single one is numbered on.

    Args:
        declared: ``validation_names`` or ``test_names`` of a `Task`.
        count: Number of loaders.

    Raises:
        DataError: Several names are declared, and not one for each set.

    >>> set_names(["val"], 3), set_names(["val", "val_mismatched"], 2)
    (['val', 'val_1', 'val_2'], ['val', 'val_mismatched'])
    """
    if len(declared) == 1:
        return [*declared, *(f"{declared[0]}_{number}" for number in range(1, count))][:count]
    if len(declared) != count:
        raise DataError(
            f"The data module names {len(declared)} sets ({', '.join(declared) or 'none'}) and has {count} loaders. "
            "Let validation_names and test_names name one set for each loader, in the same order."
        )
    return list(declared)


def every_row(loader: object) -> Batches:
    """Return the batches of every row of a training loader's data set, in the data set's order.

    They are neither shuffled, nor shared among processes, nor is an incomplete last batch dropped; reading them leaves
    the global random state as it is. A stream, or another iterable than a `DataLoader`, is returned as it is.

    Args:
        loader: What ``train_dataloader`` returned.

    Raises:
        DataError: There are several loaders, or one that can't be read repeatedly, or not in another order.

    >>> rows = [{"row_id": i} for i in range(5)]
    >>> [batch["row_id"].tolist() for batch in every_row(DataLoader(rows, batch_size=2, shuffle=True, drop_last=True))]
    [[0, 1], [2, 3], [4]]
    """
    remedy = "Pass a data module with a method every_row() that returns batches of every training row, each once."
    if isinstance(loader, Sequence | Mapping | CombinedLoader):
        raise DataError(f"Training rows come from several loaders at once ({type(loader).__name__}). {remedy}")
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise DataError(f"The training loader is {loader!r:.80}, which can't be gone through repeatedly. {remedy}")
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    # Without a batch sampler the sampler's items are whole batches: numbers in a data set of batches, or lists of rows.
    plain = (SequentialSampler, RandomSampler, DistributedSampler)
    if loader.batch_sampler is None and type(loader.sampler) not in plain:
        raise DataError(f"{type(loader.sampler).__name__} makes whole batches in an order of its own. {remedy}")
    size = None if loader.batch_sampler is None else getattr(loader.batch_sampler, "batch_size", None) or 32
    return DataLoader(
        loader.dataset, batch_size=size, collate_fn=loader.collate_fn, num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn, multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )  # fmt: skip


class _Checked:
    """The answers of one data module, checked."""

    def __init__(self, data: Any) -> None:
        self._data = data

    @cached_property
    def task_name(self) -> str | None:
        return self._read("task_name", str)

    @cached_property
    def labelled(self) -> bool | None:
        return self._read("labelled", bool)

    @cached_property
    def head(self) -> Head | None:
        found = self._read("head", str)
        if found is not None and found not in get_args(Head):
            raise self._wrong("head", found, f"one of {', '.join(get_args(Head))}")
        return cast(Head | None, found)

    @cached_property
    def label_names(self) -> list[str] | None:
        return self._strings("label_names") or None

    @cached_property
    def num_labels(self) -> int | None:
        names, count, regression = self.label_names, self._number("num_labels"), self._read("regression", bool)
        if names and regression:
            raise self._wrong("label_names", names, "None in a regression")
        if names and count not in (None, len(names)):
            raise self._wrong("num_labels", count, f"{len(names)}, the number of label_names")
        if count == 1 and regression is False:
            raise self._wrong("num_labels", count, "at least 2 where regression is False")
        return count or (len(names) if names else 1 if regression else None)

    @cached_property
    def regression(self) -> bool:
        declared = self._read("regression", bool)
        return self.num_labels == 1 if declared is None else declared

    @cached_property
    def multi_label(self) -> bool:
        found = self._read("multi_label", bool) or False
        if found and self.regression:
            raise self._wrong("multi_label", found, "False in a regression")
        return found

    @cached_property
    def validation_names(self) -> list[str]:
        return self._set_names("validation_names", "val")

    @cached_property
    def test_names(self) -> list[str]:
        return self._set_names("test_names", "test")

    @cached_property
    def primary_metric(self) -> str | None:
        name, metrics = self._read("primary_metric", str), self.metrics()
        if name not in (None, "loss") and metrics is not None and name not in metrics:
            raise self._wrong("primary_metric", name, f"'loss' or one of {list(metrics)}, its metrics")
        return name

    @cached_property
    def primary_mode(self) -> Literal["min", "max"]:
        declared, name, metrics = self._read("primary_mode", str), self.primary_metric, self.metrics()
        if declared not in (None, "min", "max"):
            raise self._wrong("primary_mode", declared, "'min' or 'max'")
        stated = name != "loss"
        if name is not None and metrics is not None and name in metrics:
            stated = metrics[name].higher_is_better is not False
        return "min" if declared == "min" or (declared is None and not stated) else "max"

    @cached_property
    def max_length(self) -> int | None:
        return self._number("max_length")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self._read("tokenizer", PreTrainedTokenizerBase)

    @cached_property
    def fingerprint(self) -> str | None:
        return self._read("fingerprint", str)

    def metrics(self) -> MetricCollection | None:
        make = _member(self._data, "metrics")
        if make is None:
            return default_metrics(self.num_labels, self.regression, self.multi_label)
        made: Any = make() if callable(make) and not isinstance(make, MetricCollection) else ...
        if made is not None and not isinstance(made, MetricCollection):
            raise self._wrong("metrics", make, "a method that returns a new torchmetrics.MetricCollection")
        return made

    def every_row(self) -> Batches:
        make = _member(self._data, "every_row")
        if make is None:
            if self._data is None:
                raise DataError("Without a data module the training rows are unknown. Pass one to trainer.fit().")
            return every_row(self._data.train_dataloader())
        batches: Any = make() if callable(make) else None
        if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
            raise self._wrong("every_row", make, "a method whose batches can be gone through repeatedly")
        return batches

    def texts(self, kind: Literal["train", "validation", "test"]) -> Sequence[Texts] | None:
        make = _member(self._data, "texts")
        found: Any = make(kind) if callable(make) else make
        if found is not None and not isinstance(found, Sequence):
            raise self._wrong("texts", make, "a method that returns the texts of each set of a kind")
        return found

    def _read(self, name: str, kind: type[T]) -> T | None:
        value = _member(self._data, name)
        if value is not None and not isinstance(value, kind):
            raise self._wrong(name, value, f"of type {kind.__name__}")
        return value

    def _number(self, name: str) -> int | None:
        value = self._read(name, int)
        if value is not None and (isinstance(value, bool) or value < 1):
            raise self._wrong(name, value, "at least 1")
        return value

    def _strings(self, name: str) -> list[str] | None:
        value: Any = _member(self._data, name)
        good = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, str) for v in value)
        if value is not None and (not good or len(set(value)) < len(value)):
            raise self._wrong(name, value, "a list of different strings")
        return None if value is None else list(value)

    def _set_names(self, name: str, default: str) -> list[str]:
        names = self._strings(name)
        if any(not each or "/" in each or each == "train" for each in names or []):
            raise self._wrong(
                name, names, "names without a slash and other than 'train', since log keys start with them"
            )
        return [default] if names is None else names

    def _wrong(self, name: str, value: object, what: str) -> DataError:
        return DataError(
            f"{type(self._data).__name__}.{name} is {value!r:.80}; it must be {what}, or be left out. "
            "ildistil.data.Task describes what a data module may declare."
        )


def _member(data: object, name: str) -> Any:
    """Return a member or None; unlike ``getattr`` with a default, let an `AttributeError` inside a property pass."""
    return getattr(data, name) if getattr_static(data, name, None) is not None else getattr(data, name, None)
