"""The shortest comparison, at the end of a training: what the best student keeps of its teacher, and what it costs."""

from contextlib import closing, suppress
from functools import partial
from statistics import median
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import ModelCheckpoint

from ildistil.capture import ModelInfo, Tap
from ildistil.capture.inputs import real_labels
from ildistil.commands._run import Run
from ildistil.data.task import task_of
from ildistil.errors import IldistilError
from ildistil.study.comparison import kept_in_words
from ildistil.study.comparison.cost import timed
from ildistil.teachers import Teacher

__all__ = ["beside_teacher"]

# Batches on which both models are timed, the first as a warm-up; and how long the teacher may take for all.
_TIMED, _MOST_SECONDS = 11, 60.0


def beside_teacher(run: Run) -> str | None:
    """Return how the best student compares with the teacher on the first validation set; None where that isn't known.

    The student was measured in the training. The teacher is run over the set once, if it runs at all, has a head for
    the task's labels, and takes no longer than a minute.

    Args:
        run: A training that has ended.
    """
    module, task, metric = run.model, task_of(run.datamodule), task_of(run.datamodule).primary_metric
    teacher, score = module.teacher, _best(run)
    may_run = teacher is not None and teacher.runs and teacher.info.labels == task.num_labels
    if score is None or teacher is None or not may_run or run.trainer.world_size > 1:
        return None
    reached, faster = 0.0, None
    with suppress(IldistilError), closing(teacher):  # nothing of it may end a training that went well
        reached, faster = _measured(run, teacher) or (0.0, None)
    if not reached > 0:
        return None
    size = ModelInfo.of(module.student).parameters / teacher.info.parameters
    kept = f"{100 * score / reached:.1f} %"
    return f"The student {kept_in_words(str(metric), kept, faster, size)} (teacher: {metric} {reached:.4f})."


def _best(run: Run) -> float | None:
    """Return the best student's metric on the whole first validation set, where it was measured, and rises."""
    task, trainer = task_of(run.datamodule), run.trainer
    if not task.validation_names or task.primary_metric not in (task.metrics() or ()) or task.primary_mode != "max":
        return None
    if trainer.limit_val_batches != 1.0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    name = f"{task.validation_names[0]}/{task.primary_metric}"
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor == name and callback.best_model_score is not None:
            return float(callback.best_model_score)
    return None


@torch.no_grad()
def _measured(run: Run, teacher: Teacher) -> tuple[float, float | None] | None:
    """Return the teacher's metric, and how many times as fast the student is; None if it would take too long."""
    module, task, device = run.model, task_of(run.datamodule), run.trainer.strategy.root_device
    loaders: Any = run.datamodule.val_dataloader()
    batches = loaders[0] if isinstance(loaders, list | tuple) else loaders
    metrics: Any = task.metrics()
    metrics.to(device)
    module.to(device).eval()
    teacher.open({Tap("logits")})
    ratios, taken = [], 0.0
    for number, each in enumerate(batches):
        batch = move_data_to_device(real_labels(each), device)
        with run.trainer.precision_plugin.forward_context():
            said, seconds = timed(partial(teacher, batch, {Tap("logits")}), device)
            if number < _TIMED:
                student = partial(module.student, **module.distillation.student_inputs(batch))
                ratios.append(seconds / timed(student, device)[1])
        metrics.update(module.evaluation.predictions(said.logits, batch["labels"]), batch["labels"], logits=said.logits)
        taken += seconds
        if number == _TIMED and taken / number * len(batches) > _MOST_SECONDS:
            return None
    return float(metrics[task.primary_metric].compute()), median(ratios[1:]) if len(ratios) > 1 else None
