"""Objectives: composable terms of the distillation loss, given to the Trainer as callbacks."""

from ildistil.objectives.attention import AttentionKL, AttentionMSE
from ildistil.objectives.base import LayerObjective, Objective, ObjectiveError
from ildistil.objectives.hidden import HiddenMSE
from ildistil.objectives.logits import LogitsKL, LogitsMSE
from ildistil.objectives.task import TaskLoss

__all__ = [
    "AttentionKL",
    "AttentionMSE",
    "HiddenMSE",
    "LayerObjective",
    "LogitsKL",
    "LogitsMSE",
    "Objective",
    "ObjectiveError",
    "TaskLoss",
]
