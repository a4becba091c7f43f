"""Store what a stored teacher lacks before training starts: nothing grows while it trains."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from ildistil.data.task import every_row, task_of
from ildistil.data.tokenizing import tokenizer_digest
from ildistil.objectives import Objective
from ildistil.teachers import Teacher

__all__ = ["prepare_targets"]


def prepare_targets(
    trainer: L.Trainer, teacher: Teacher | None, objectives: Sequence[Objective], student: nn.Module
) -> None:
    """Prepare the teacher for every row of the training set, on the Trainer's device.

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
            rows, digest = task.every_row(), None if task.tokenizer is None else tokenizer_digest(task.tokenizer)
        teacher.prepare(objectives, student, rows, tokenizer=digest, device=trainer.strategy.root_device)
