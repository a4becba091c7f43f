"""Internal: models as they are to be compared: loaded, checked against each other and the data, before any runs."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import lightning as L

from ildistil.capture import ModelInfo
from ildistil.data.task import Task, task_of
from ildistil.engine.checks import check_label_order
from ildistil.errors import ConfigError, DataError, IldistilError, ModelError
from ildistil.students.sources import Dtype, load
from ildistil.study.comparison.outputs import Reading, prepared
from ildistil.training.checks import check_task

__all__ = ["readings"]


def readings(
    paths: Sequence[str], data: L.LightningDataModule, trainer: L.Trainer, set_name: str, dtype: Dtype
) -> list[Reading]:
    """Load models, and refuse those that can't be compared.

    Args:
        paths: Folders or hub names, the teacher first.
        data: The task.
        trainer: Says which device and stage it is.
        set_name: Of the set.
        dtype: Precision of the weights.

    Raises:
        ConfigError: No model is named, or one twice.
        ModelError: One can't be loaded, has no trained head, or other labels than the teacher.
        DataError: The data has no labels, or others than the models.
    """
    if not paths:
        raise ConfigError("Name at least one model: ildistil compare TEACHER STUDENT ...")
    if twice := [path for path, count in Counter(paths).items() if count > 1]:
        raise ConfigError(f"The model {twice[0]!r} is named twice. Name each once.")
    task = task_of(data)
    if task.labelled is False:
        raise DataError("The data has no labels, so there is nothing to compare models by. Name their column.")
    if task.multi_label or task.head not in (None, "sequence-classification"):
        raise DataError("Models are compared by one class or one number a row, which these data haven't.")
    models = [load(path, dtype=dtype) for path in paths]
    infos = [ModelInfo.of(model) for model in models]
    for path, info in zip(paths, infos, strict=True):
        _check(task, path, info, infos[0], paths[0])
    batches = [prepared(data, trainer, path, set_name, model) for path, model in zip(paths, models, strict=True)]
    return [Reading(*each) for each in zip(_names(paths), paths, models, infos, batches, strict=True)]


def _check(task: Task, path: str, info: ModelInfo, teacher: ModelInfo, its_path: str) -> None:
    """Refuse a model whose labels are not the teacher's, or not the data's."""
    if info.labels != teacher.labels:
        raise ModelError(
            f"The model {path!r} has {info.labels} labels, the teacher {its_path!r} has {teacher.labels}. Compare "
            "models that were trained for the same labels."
        )
    try:
        check_label_order(info, teacher.label_names, f"the teacher {its_path!r}")
        check_task(task, info)
    except IldistilError as error:
        raise type(error)(f"{path}: {error}") from error


def _names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths where they differ, else the paths."""
    short = [Path(path).name or path for path in paths]
    return short if len(set(short)) == len(short) else list(paths)
