"""Stored targets: the same training as with the teacher, and never targets of something else."""

import copy
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from ildistil import Distillation, Distiller, Stage, init_student, mappings, objectives
from ildistil.capture import Capture
from ildistil.objectives import Objective
from ildistil.targets import StoredTeacher, TargetsError, estimate, precompute
from table import CASES
from test_distiller import loader, trainer

LENGTHS = (7, 4, 6, 2)


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny.bert(2, seed=1), tiny.bert(4, seed=2)


def stored(folder: Path, terms: Iterable[Objective], batches: Any = None, **options: Any) -> StoredTeacher:
    """The targets of these terms, without the teacher."""
    student, teacher = models()
    made = StoredTeacher(folder, teacher, **options)
    precompute(made, terms, student, [tiny.batch(LENGTHS)] if batches is None else batches)
    return StoredTeacher(folder)


def step(
    terms: list[Objective], teacher: nn.Module, batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms and the gradients by parameter name, always from the same student and projections."""
    torch.manual_seed(3)
    engine = Distillation(models()[0], teacher, terms)
    found = engine(batch, step=0)
    found.total.backward()
    gradients = {n: p.grad for n, p in engine.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in found.values.items()}, gradients


def assert_same(left: Any, right: Any, tolerance: float) -> None:
    for mine, theirs in zip(left, right, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def selected() -> list[Objective]:
    return [
        objectives.AttentionKL(),
        objectives.HiddenMSE(projection="always", mapping=mappings.Random()),
        objectives.LogitsKL(weight=0.5),
        objectives.TaskLoss(weight=0.5),
    ]


@pytest.mark.parametrize("name", [n for n in CASES if n != "TaskLoss"])
def test_the_same_losses_and_gradients_as_with_the_teacher(name: str, tmp_path: Path) -> None:
    batch = tiny.batch(LENGTHS)
    teacher = stored(tmp_path, [CASES[name].make()], dtype="float32")
    assert_same(step([CASES[name].make()], teacher, batch), step([CASES[name].make()], models()[1], batch), 1e-6)
