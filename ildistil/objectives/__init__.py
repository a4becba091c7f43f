"""Objectives: composable terms of the distillation loss, given to the Trainer as callbacks."""

from ildistil.objectives.attention import AttentionKL, AttentionMSE
from ildistil.objectives.base import LayerObjective, Objective, ObjectiveError
from ildistil.objectives.hidden import CLSMSE, HiddenCosine, HiddenMSE
from ildistil.objectives.logits import LogitsKL, LogitsMSE
from ildistil.objectives.relation import RelationKL, ValueRelationKL
from ildistil.objectives.task import TaskLoss

__all__ = [
    "CLSMSE",
    "AttentionKL",
    "AttentionMSE",
    "HiddenCosine",
    "HiddenMSE",
    "LayerObjective",
    "LogitsKL",
    "LogitsMSE",
    "Objective",
    "ObjectiveError",
    "RelationKL",
    "TaskLoss",
    "ValueRelationKL",
]
