"""Objectives: composable terms of the distillation loss, given to the Trainer as callbacks."""

from ildistil.objectives.attention import QKVMSE, AttentionDIST, AttentionKL, AttentionMSE, AttentionOutputMSE
from ildistil.objectives.base import LayerObjective, Objective
from ildistil.objectives.contrast import CLSContrast, CLSInBatchContrast
from ildistil.objectives.hidden import (
    CLSMSE,
    CLSAttentiveMSE,
    EmbeddingMSE,
    HiddenCKA,
    HiddenConcatMSE,
    HiddenCosine,
    HiddenMSE,
)
from ildistil.objectives.logits import LogitsDIST, LogitsKL, LogitsMSE
from ildistil.objectives.projection import Projection
from ildistil.objectives.relation import RelationKL, ValueRelationKL
from ildistil.objectives.task import TaskLoss

__all__ = [
    "CLSMSE",
    "QKVMSE",
    "AttentionDIST",
    "AttentionKL",
    "AttentionMSE",
    "AttentionOutputMSE",
    "CLSAttentiveMSE",
    "CLSContrast",
    "CLSInBatchContrast",
    "EmbeddingMSE",
    "HiddenCKA",
    "HiddenConcatMSE",
    "HiddenCosine",
    "HiddenMSE",
    "LayerObjective",
    "LogitsDIST",
    "LogitsKL",
    "LogitsMSE",
    "Objective",
    "Projection",
    "RelationKL",
    "TaskLoss",
    "ValueRelationKL",
]
