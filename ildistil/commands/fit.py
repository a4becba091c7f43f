"""Distil a student from a teacher."""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ildistil.capture import ModelInfo
from ildistil.commands._beside import beside_teacher
from ildistil.commands._distilling import DistillingRun
from ildistil.data.task import task_of
from ildistil.engine.checks import named_objectives
from ildistil.objectives import Objective
from ildistil.stages import check_names
from ildistil.training.checks import check_head
from ildistil.training.distiller import Distiller

__all__ = ["check_models", "main"]


class _Fit(DistillingRun):
    trains = True


def main(command: str, arguments: Sequence[str]) -> None:
    """Train, and print where the best student is."""
    run = _Fit(command, arguments, __doc__)
    objectives = named_objectives(run.objectives())
    if run.model.stages:
        check_names(run.model.stages, objectives)
    check_models(objectives.values(), run.model)
    check_head(task_of(run.datamodule), ModelInfo.of(run.model.student), list(objectives.values()))
    run.start(run.trainer.fit)
    run.report_best()
    if (compared := beside_teacher(run)) is not None:
        print(compared)


def check_models(objectives: Iterable[Objective], module: Distiller) -> None:
    """Refuse what doesn't fit the models before any data is prepared; on copies, since nothing is to be built yet."""
    student, teacher = ModelInfo.of(module.student), module.teacher
    assert teacher is not None, "make_distiller loads one"
    with torch.random.fork_rng(devices=[]):
        for objective in copy.deepcopy(list(objectives)):
            objective.projections = nn.ModuleDict()
            objective.build(student, teacher.info)
            objective.may_read("student", student)
            objective.may_read("teacher", teacher.info)
