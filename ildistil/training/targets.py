"""Store what a stored teacher lacks before training starts: nothing grows while it trains."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from ildistil.capture import ModelInfo
from ildistil.data.task import Batches, every_row, task_of
from ildistil.data.tokenizing import tokenizer_digest
from ildistil.objectives import Objective
from ildistil.teachers import Teacher
from ildistil.training.evaluation import measures_terms

__all__ = ["prepare_targets", "rows_to_store"]


def prepare_targets(
    trainer: L.Trainer, teacher: Teacher | None, objectives: Sequence[Objective], student: nn.Module
) -> None:
    """Prepare the teacher for every row that the training will ask it for, on the Trainer's device.

    Raises:
        TargetsError: they can't be stored, or were made with another tokenizer.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if teacher is None or not teacher.prepares:
        return
    with isolate_rng():  # the training is to be the same whether or not there was anything to store
        if data is None:  # loaders, which Lightning has not set up yet
            rows, digest = every_row(trainer.fit_loop._data_source.dataloader()), None
        else:
            data.setup("fit")
            task = task_of(data)
            rows = rows_to_store(data, objectives, student, validates=trainer.limit_val_batches != 0)
            digest = None if task.tokenizer is None else tokenizer_digest(task.tokenizer)
        teacher.prepare(objectives, student, rows, tokenizer=digest, device=trainer.strategy.root_device)


def rows_to_store(data: Any, objectives: Sequence[Objective], student: nn.Module, validates: bool = True) -> Batches:
    """Return batches of every training row, and of every validation row where sets are measured by the terms.

    Args:
        data: a data module, set up for fitting.
        objectives: the terms.
        student: the student.
        validates: whether there will be a validation.
    """
    task = task_of(data)
    by_terms = validates and measures_terms(task, objectives, ModelInfo.of(student))
    loaders = data.val_dataloader() if by_terms else []
    sets = loaders if isinstance(loaders, Sequence) else [loaders]
    return _Chained([task.every_row(), *map(every_row, sets)]) if sets else task.every_row()


class _Chained:
    """Batches one set after the other, as often as they are gone through."""

    def __init__(self, sets: Sequence[Batches]) -> None:
        self._sets = sets

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batches in self._sets:
            yield from batches
