"""What is refused before training starts: settings, data and models that don't go together."""

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from ildistil.capture import ModelInfo
from ildistil.data.task import Task
from ildistil.engine.checks import check_label_order
from ildistil.errors import ConfigError, DataError, ModelError, ObjectiveError
from ildistil.objectives import Objective
from ildistil.schedules import has_schedules
from ildistil.stages import Stage, Timeline, check_names
from ildistil.training.lifecycle import watches
from ildistil.training.progress import ResumeCheckpoint

__all__ = ["check_gaps", "check_head", "check_kinds", "check_task", "check_trainer", "check_vocabulary"]


def check_kinds(student: object, teacher: object) -> None:
    """Refuse what is no model.

    Raises:
        ModelError: the student is none, or the teacher is a name.
    """
    if not isinstance(student, nn.Module):
        raise ModelError(f"The student is a {type(student).__name__}, not a model. Make one with init_student.")
    if isinstance(teacher, str):
        raise ModelError("The teacher is a name, not a model. Load it, with transformers' from_pretrained.")


def check_trainer(trainer: L.Trainer, objectives: Mapping[str, Objective], stages: Sequence[Stage]) -> None:
    """Compare a Trainer's settings with what is to be trained.

    Raises:
        ConfigError: stages name other objectives, or last other epochs than the Trainer.
        ObjectiveError: an objective can't be accumulated.
    """
    accumulated = trainer.accumulate_grad_batches
    coupled = [name for name, objective in objectives.items() if objective.batch_coupled]
    if coupled and accumulated > 1:
        raise ObjectiveError(
            f"{coupled[0]} compares the examples of a batch with each other, so that {accumulated} accumulated batches "
            "are not one large batch. Use accumulate_grad_batches=1 with larger batches or more devices, or leave this "
            "objective out."
        )
    if stages:
        check_names(stages, objectives)
        _check_epochs(trainer, stages)
        _check_checkpoints(trainer)


def _check_epochs(trainer: L.Trainer, stages: Sequence[Stage]) -> None:
    epochs = sum(stage.epochs for stage in stages)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_epochs != epochs or trainer.max_steps != -1:
        limit = f"max_epochs={trainer.max_epochs}" if trainer.max_steps == -1 else f"max_steps={trainer.max_steps}"
        raise ConfigError(
            f"The stages last {epochs} epochs together, the Trainer has {limit}. Set max_epochs={epochs} and no "
            "max_steps."
        )


def _check_checkpoints(trainer: L.Trainer) -> None:
    checkpoints = [c for c in trainer.callbacks if isinstance(c, ModelCheckpoint)]  # type: ignore[attr-defined]
    resumable = any(isinstance(c, ResumeCheckpoint) for c in trainer.callbacks)  # type: ignore[attr-defined]
    if checkpoints and all(watches(c) for c in checkpoints) and not resumable:
        rank_zero_warn(
            "Every ModelCheckpoint monitors a metric, so none is written before the last stage. To be able to resume "
            "in an earlier one, add ResumeCheckpoint()."
        )


def check_gaps(objectives: Mapping[str, Objective], timeline: Timeline) -> None:
    """Refuse a training that comes to a step without any term.

    Raises:
        ObjectiveError: all weights are 0 at a step.
    """
    if not has_schedules(objectives):
        return
    for number, (names, steps) in enumerate(timeline.parts(), start=1):
        active = [objective for name, objective in objectives.items() if names is None or name in names]
        checked = int(min(steps, 100_000))
        for i in range(checked):
            if not any(objective.weight_at(i / checked) for objective in active):
                where = f" of stage {number}" if timeline.stages else ""
                raise ObjectiveError(
                    f"At {i / checked:.1%}{where} of the training all terms have weight 0: nothing would be learned. "
                    "Let the schedules overlap."
                )


def check_task(task: Task, student: ModelInfo, objectives: Sequence[Objective] = ()) -> None:
    """Compare what the data module says of itself with the student.

    Raises:
        DataError: labels or lengths don't fit.
        ModelError: the labels come in another order.
    """
    check_head(task, student, objectives)
    labels, names = task.num_labels, [name.lower() for name in task.label_names or []]
    known = student.label_names
    unknown = [name for name in names if known and name not in known]
    listed = f" The models don't know {', '.join(map(repr, unknown))}; their labels are {', '.join(known)}."
    if labels is not None and student.labels is not None and labels != student.labels:
        raise DataError(
            f"The data has {labels} labels, the models have {student.labels}.{listed if unknown else ''} Fine-tune a "
            "teacher for this task first (ildistil finetune), or choose the data it was trained for."
        )
    check_label_order(student, names, "the data")
    if unknown and len(unknown) < len(names):  # with none in common they may be names for the same
        moved = [name for number, name in enumerate(names) if name in known and known.index(name) != number]
        if moved:
            raise DataError(
                f"Some of the data's labels are the models', in another order: {', '.join(names)}.{listed} Bring them "
                "into one order by label_names, or choose the data that the teacher was trained for."
            )
        rank_zero_warn(f"The data's labels are taken for the models' in their order.{listed}")
    longest, positions = task.max_length, student.positions
    if longest is not None and positions is not None and longest > positions:
        raise DataError(
            f"The data cuts texts at max_length={longest} tokens, the student has {positions} positions. Set "
            f"max_length={positions} or less."
        )


def check_head(task: Task, student: ModelInfo, objectives: Sequence[Objective]) -> None:
    """Refuse labels for another head than the student's, where a term reads what the head makes.

    Raises:
        DataError: they are for another head.
    """
    reads_head = any(o.weight != 0 and o.may_train_head for o in objectives)
    if reads_head and None not in (task.head, student.head) and task.head != student.head:
        raise DataError(
            f"The data's labels are for a {task.head} head, and the student, a {student.name}, has a {student.head} "
            f"one, whose loss would mean something else. Load the models with head: {task.head}, or choose labels for "
            "the head that they have (labels: masked or next of a Corpus)."
        )


def check_vocabulary(task: Task, student: ModelInfo) -> None:
    """Refuse a tokenizer, which is loaded by now, with more tokens than the student knows.

    Raises:
        DataError: it has.
    """
    known = student.vocabulary
    if task.tokenizer is None or known is None:
        return
    word, number = max(task.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if number >= known:
        raise DataError(
            f"The data's tokenizer has tokens up to number {number} ({word!r}), and the models know {known:,}, from 0. "
            "Use the tokenizer that they were trained with; for added tokens, resize their embeddings first "
            "(model.resize_token_embeddings) and save them."
        )
