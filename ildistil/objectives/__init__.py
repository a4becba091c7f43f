"""Objectives: composable terms of the distillation loss, given to the Trainer as callbacks."""

from ildistil.objectives.attention import QKVMSE, AttentionDIST, AttentionKL, AttentionMSE, AttentionOutputMSE
from ildistil.objectives.base import Count, Objective
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
from ildistil.objectives.mapped import JointObjective, MappedObjective, PairwiseObjective
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
    "Count",
    "EmbeddingMSE",
    "HiddenCKA",
    "HiddenConcatMSE",
    "HiddenCosine",
    "HiddenMSE",
    "JointObjective",
    "LogitsDIST",
    "LogitsKL",
    "LogitsMSE",
    "MappedObjective",
    "Objective",
    "PairwiseObjective",
    "Projection",
    "RelationKL",
    "TaskLoss",
    "ValueRelationKL",
]
