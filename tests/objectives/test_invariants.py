"""What every objective must hold (the rows of table.py), whatever it computes."""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from transformers import PreTrainedModel

import handmade
import tiny
from ildistil import Distillation, mappings, objectives
from ildistil.stages import Step
from table import CASES, Case, run_by_hand

Models = tuple[PreTrainedModel, PreTrainedModel]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def models() -> Models:
    return tiny.bert(2, seed=1), tiny.bert(4, seed=2)


def step(case: Case, models: Models, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The term and its gradients by parameter name, on fresh copies, always with the same projections."""
    student, teacher = copy.deepcopy(models)
    torch.manual_seed(3)
    engine = Distillation(student, teacher, [case.make()])
    term = engine(batch, Step(0)).total
    term.backward()
    return term.detach(), {n: p.grad for n, p in engine.named_parameters() if p.grad is not None}


def assert_same(
    left: tuple[Tensor, dict[str, Tensor]], right: tuple[Tensor, dict[str, Tensor]], tolerance: float
) -> None:
    torch.testing.assert_close(left[0], right[0], rtol=tolerance, atol=tolerance)
    assert left[1].keys() == right[1].keys()
    for name in left[1]:
        torch.testing.assert_close(left[1][name], right[1][name], rtol=100 * tolerance, atol=100 * tolerance, msg=name)


def test_equals_a_reference_in_loops(case: Case, models: Models) -> None:
    student, teacher = (m.double() for m in models)
    batch = tiny.batch()
    expected_student, expected_teacher = copy.deepcopy((student, teacher))
    engine = Distillation(student, teacher, [case.make()])
    (learned,) = copy.deepcopy(list(engine.projections.values())) or [nn.ModuleDict()]
    with torch.no_grad():
        teacher_run = run_by_hand(expected_teacher, batch)
    student_run = run_by_hand(expected_student, batch)
    expected = case.reference(student_run, teacher_run, batch["attention_mask"], batch["labels"], learned)
    expected.backward()
    term = engine(batch, Step(0)).total
    term.backward()
    torch.testing.assert_close(term, expected, rtol=1e-10, atol=1e-12)
    mine_all = [*student.named_parameters(), *engine.projections.named_parameters()]
    for (name, mine), theirs in zip(mine_all, [*expected_student.parameters(), *learned.parameters()], strict=True):
        if theirs.grad is None:
            assert mine.grad is None, name
        else:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("padding", [{"right": 5}, {"left": 3}, {"left": 1, "right": 2}], ids=str)
def test_padding_changes_nothing(case: Case, models: Models, padding: dict[str, int]) -> None:
    if padding.get("left") and case.make().taps[0] in ("loss", "logits"):
        pytest.skip("BERT's head reads the first position, padding or not")
    doubled = tuple(m.double() for m in models)
    assert_same(step(case, doubled, tiny.batch()), step(case, doubled, tiny.batch(**padding)), 1e-10)


def test_an_all_padding_row_contributes_nothing(case: Case, models: Models) -> None:
    doubled = tuple(m.double() for m in models)
    without, full = tiny.batch((7, 4)), tiny.batch((7, 4, 5))
    full["attention_mask"][2] = 0
    full["labels"][2] = -100  # the models' own loss knows no other way to leave a row out
    full["labels"][:2] = without["labels"]
    assert_same(step(case, doubled, without), step(case, doubled, full), 1e-10)


def test_zero_for_identical_models(case: Case) -> None:
    if not case.zero:
        pytest.skip("not zero by its mathematics")
    model = tiny.bert(4)
    objective = case.make()
    if isinstance(objective, objectives.MappedObjective):
        objective.mapping = mappings.First()
    engine = Distillation(model, copy.deepcopy(model), [objective])
    assert engine(tiny.batch(), Step(0)).total.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_under_autocast(case: Case, models: Models, dtype: torch.dtype) -> None:
    student, teacher = models
    engine = Distillation(student, teacher, [case.make()])
    batch = tiny.batch((7, 1, 4))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        term = engine(batch, Step(0)).total
    term.backward()
    assert term.dtype == torch.float32
    assert torch.isfinite(term)
    grads = [p.grad for p in engine.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)


def test_gradients_reach_student_and_projections_never_the_teacher(case: Case, models: Models) -> None:
    student, teacher = models
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    engine = Distillation(student, teacher, [case.make()])
    engine(tiny.batch(), Step(0)).total.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is not None for p in engine.projections.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert student.training
    assert not teacher.training


def test_eager_equals_sdpa(case: Case, models: Models) -> None:
    eager = tuple(copy.deepcopy(m) for m in models)
    for model in eager:
        model.set_attn_implementation("eager")
    assert models[0].config._attn_implementation == "sdpa"
    doubled = [tuple(m.double() for m in pair) for pair in (models, eager)]
    batch = tiny.batch()
    assert_same(step(case, doubled[0], batch), step(case, doubled[1], batch), 1e-9)


def test_gradcheck(case: Case) -> None:
    """The gradient of the term with respect to all that was captured of the student, by finite differences."""
    if case.make().taps == ("loss",):
        pytest.skip("the student's own loss")
    objective = handmade.built(case, torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    made = [torch.randn(s).double() for s in handmade.shapes(handmade.TEACHER)]
    teacher = handmade.activations(made, handmade.TEACHER, mask)
    inputs = tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in handmade.shapes(handmade.STUDENT))

    def term(*tensors: Tensor) -> Tensor:
        student = handmade.activations(tensors, handmade.STUDENT, mask)
        return objective.loss(student, teacher, handmade.batch(2))

    assert gradcheck(term, inputs)


def test_the_table_is_complete() -> None:
    """Every exported objective has a row."""
    classes = {name: getattr(objectives, name) for name in objectives.__all__}
    concrete = {n for n, c in classes.items() if issubclass(c, objectives.Objective) and not inspect.isabstract(c)}
    assert concrete == {name.split("-")[0] for name in CASES}
