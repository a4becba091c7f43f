"""A teacher whose weights are kept in half precision, and a float32 student."""

import copy

import pytest
import torch

import tiny
from ildistil import Distillation, Distiller, objectives
from ildistil.stages import Step
from table import CASES
from test_distiller import every_kind, loader, pair, trainer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", CASES)
def test_terms_are_near_those_of_the_float_teacher(name: str, autocast: bool, dtype: torch.dtype) -> None:
    student, teacher = tiny.bert(2, seed=1), tiny.bert(4, initializer_range=0.1)
    values = []
    for t in (teacher, copy.deepcopy(teacher).to(dtype)):
        torch.manual_seed(0)
        engine = Distillation(copy.deepcopy(student), t, [CASES[name].make()])
        for step in range(2):  # the bank has something to compare with from the second step on
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                term = engine(tiny.batch(), Step(step)).total
        assert term.dtype == torch.float32
        term.backward()
        gradients = [p.grad for p in engine.student.parameters() if p.grad is not None]
        assert gradients
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)
        assert all(p.dtype == torch.float32 for p in engine.projections.parameters())
        values.append(term.detach())
    torch.testing.assert_close(values[1], values[0], rtol=0.05, atol=0.02)


def test_a_fit_leaves_the_half_teacher_as_it_was() -> None:
    student, teacher = pair()
    before = copy.deepcopy(teacher.bfloat16().state_dict())
    run = trainer(*every_kind(), objectives.QKVMSE(projection="always"), max_epochs=1)
    module = Distiller(student, teacher)
    run.fit(module, loader(), loader())
    after = teacher.state_dict()
    assert all(value.dtype == torch.bfloat16 and torch.equal(value, before[n]) for n, value in after.items())
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert not any("teacher" in name for name in module.state_dict())
