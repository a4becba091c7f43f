"""Store what a stored teacher lacks before training starts: nothing grows while it trains."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import nn

from ildistil.data.task import task_of
from ildistil.data.tokenizing import tokenizer_digest
from ildistil.objectives import Objective
from ildistil.teachers import Teacher

__all__ = ["prepare_targets"]


def prepare_targets(
    trainer: L.Trainer, teacher: Teacher | None, objectives: Sequence[Objective], student: nn.Module
) -> None:
    """Let the teacher prepare for every row of a data module's training set, on the Trainer's device.

    Raises:
        TargetsError: they can't be stored, or were made with another tokenizer.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if teacher is None or data is None or not teacher.prepares:
        return
    data.setup("fit")
    task = task_of(data)
    digest = None if task.tokenizer is None else tokenizer_digest(task.tokenizer)
    teacher.prepare(objectives, student, task.every_row(), tokenizer=digest, device=trainer.strategy.root_device)
