"""The same examples give the same gradient as one batch, as accumulated batches, and on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import exact
from ildistil import objectives
from ildistil.data import TokenBudgetSampler
from ildistil.errors import ObjectiveError
from table import CASES

APART = [name for name, case in CASES.items() if not case.make().batch_coupled]
COUPLED = [name for name in CASES if name not in APART]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], name: str = "") -> None:
    assert found.keys() == expected.keys()
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-8, atol=1e-10, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", APART)
def test_accumulated_batches_of_unequal_size_are_one_batch(name: str) -> None:
    """Batches of 3, 3 and 2 rows, one of them without a token, in a window that would take four."""
    whole = exact.step([CASES[name].make()], exact.rows(), exact.models(), 8)
    parts = exact.step([CASES[name].make()], exact.rows(), exact.models(), 3, accumulate_grad_batches=4)
    assert_same(parts, whole)


@pytest.mark.parametrize("name", COUPLED)
def test_objectives_that_couple_a_batch_refuse_accumulation(name: str) -> None:
    with pytest.raises(ObjectiveError, match="4 accumulated batches are not one large batch"):
        exact.step([CASES[name].make()], exact.rows(), exact.models(), 2, accumulate_grad_batches=4)


def test_what_couples_a_batch_is_declared() -> None:
    assert sorted(COUPLED) == ["AttentionDIST-sentences", "CLSInBatchContrast", "HiddenCKA", "LogitsDIST"]


def test_accumulated_target_tokens_of_a_language_model_count_once_each() -> None:
    terms = lambda: [objectives.LogitsKL(), objectives.TaskLoss(weight=0.5)]  # noqa: E731
    whole = exact.step(terms(), exact.masked_rows(), exact.masked_models(), 8)
    parts = exact.step(terms(), exact.masked_rows(), exact.masked_models(), 3, accumulate_grad_batches=3)
    assert_same(parts, whole)


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Every objective, plain ddp without any setting, 3 examples on one process and 4 on the other."""
    script = Path(__file__).parents[1] / "exact.py"
    command = [sys.executable, str(script), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = {name: exact.step([case.make()], exact.rows(), exact.models(), 8) for name, case in CASES.items()}
    expected["masked language model"] = exact.step(exact.several(), exact.masked_rows(), exact.masked_models(), 8)
    expected["accumulated"] = expected["AttentionKL"]
    shares = [list(TokenBudgetSampler(exact.budget(14).lengths, 14, 2, rank)) for rank in range(2)]
    assert sorted(len(batch) for share in shares for batch in share) == [1, 2, 2, 2]
    expected["token budget"] = exact.step(exact.several(), exact.budget_rows(), exact.models(), 7)
    expected["token budget, accumulated"] = expected["token budget"]
    assert first.keys() == expected.keys()
    for name in expected:
        assert_same(first[name], expected[name], name)
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name]), name
