"""The binary estimator of CLSContrast: its constant is estimated once, from the first step, and kept."""

import copy
import math

import pytest
import torch
from test_ranks import Lockstep
from torch import Tensor
from torch.nn.functional import normalize

import tiny
from ildistil import Distillation, distributed, functional, objectives
from ildistil.stages import Step

T = 0.3


def contrast(**options: object) -> objectives.CLSContrast:
    return objectives.CLSContrast(size=6, temperature=T, estimator="nce", **options)  # type: ignore[arg-type]


def vectors(seed: int, number: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = normalize(torch.randn(2, number, 6, generator=generator, dtype=torch.float64), dim=-1)
    return made[0].float(), made[1].float()


CLASSES = torch.tensor([0, 1, 2, 0, 1, 0, 0])


def meet(term: objectives.CLSContrast, rows: Tensor, seed: int = 0) -> None:
    """What a step leaves to learn of some of seven texts."""
    s, t = vectors(seed)
    term._now = [rows, CLASSES[rows], s[rows], t[rows]]
    term.remember()


def mean_by_loops(seed: int = 0) -> list[float]:
    """The mean of exp(similarity / T) over each text's own vector of the other model and those of other classes."""
    found = []
    for a, b in (vectors(seed), vectors(seed)[::-1]):
        similarities = []
        for i in range(len(a)):
            similarities.append(float(a[i].double() @ b[i].double()) / T)
            similarities += [
                float(a[i].double() @ b[k].double()) / T for k in range(len(b)) if CLASSES[k] != CLASSES[i]
            ]
        found.append(sum(math.exp(x) for x in similarities) / len(similarities))
    return found


def test_the_constant_is_that_of_the_first_step_and_kept() -> None:
    term = contrast()
    term.begin(Step(0))
    term.learn(Step(0))
    assert len(term.state_dict()["log_normalizers"]) == 0
    meet(term, torch.arange(7))
    term.begin(Step(1))
    term.learn(Step(1))
    first = term.state_dict()["log_normalizers"]
    assert first.exp().tolist() == pytest.approx(mean_by_loops(), rel=1e-6)
    meet(term, torch.arange(7), seed=1)
    term.begin(Step(2))
    term.learn(Step(2))
    assert torch.equal(term.state_dict()["log_normalizers"], first)


def test_of_one_class_nothing_is_estimated_until_there_is_another() -> None:
    term = contrast()
    for step, rows in enumerate(([0, 3], [5], [1])):
        term.begin(Step(step))
        term.learn(Step(step))
        assert len(term.state_dict()["log_normalizers"]) == 0
        meet(term, torch.tensor(rows))
    term.begin(Step(3))
    term.learn(Step(3))
    assert torch.isfinite(term.state_dict()["log_normalizers"]).all()


def test_batches_of_a_step_and_processes_estimate_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = contrast()
    meet(whole, torch.arange(7))
    whole.begin(Step(1))
    whole.learn(Step(1))
    parts = contrast()
    for rows in ([4, 1], [0, 2, 3], [6, 5]):
        meet(parts, torch.tensor(rows))
    parts.begin(Step(1))
    parts.learn(Step(1))
    wanted = whole.state_dict()["log_normalizers"]
    torch.testing.assert_close(parts.state_dict()["log_normalizers"], wanted)
    lockstep = Lockstep(2)
    monkeypatch.setattr(distributed, "dist", lockstep)
    terms = [contrast(), contrast()]
    lockstep.run(lambda rank: meet(terms[rank], torch.arange(7)[rank::2]))
    for term in terms:
        term.begin(Step(1))
        term.learn(Step(1))
    first, second = (term.state_dict()["log_normalizers"] for term in terms)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, wanted)


def test_a_resumed_run_goes_on_with_the_same_constant() -> None:
    """As a run that was never interrupted, whatever the draws; and released, it begins anew."""
    student, teacher = tiny.bert(2, seed=1), tiny.bert(4, seed=2)
    term = contrast(negatives=2)
    engine = Distillation(student, teacher, [term])
    batches = [tiny.batch(seed=seed) | {"row_id": torch.arange(3) + 3 * seed} for seed in range(4)]
    for step in range(3):
        value = engine(batches[step], Step(step)).total
        assert (value == 0) == (step == 0)
    state, projections = copy.deepcopy(term.state_dict()), copy.deepcopy(term.projections.state_dict())
    wanted = engine(batches[3], Step(3)).total
    again = contrast(negatives=2)
    resumed = Distillation(copy.deepcopy(student), copy.deepcopy(teacher), [again])
    again.projections.load_state_dict(projections)
    again.load_state_dict(state)
    assert torch.equal(resumed(batches[3], Step(3)).total, wanted)
    assert torch.equal(again.state_dict()["log_normalizers"], state["log_normalizers"])
    engine.release()
    assert len(term.state_dict()["log_normalizers"]) == 0


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 1000.0])
def test_the_binary_loss_is_finite_and_near_float64(temperature: float) -> None:
    s, t = vectors(2)
    allowed = CLASSES[:, None] != CLASSES
    exact = []
    for dtype in (torch.float64, torch.float32):
        a, b = s.to(dtype).requires_grad_(), t.to(dtype)
        constant = functional.log_normalizer(a.detach(), b, b, allowed, temperature)
        values = functional.nce(a, b, b, allowed, temperature, constant)
        (gradient,) = torch.autograd.grad(values.sum(), a)
        exact.append((values.detach().double(), gradient.double()))
    for found, wanted in zip(exact[1], exact[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_an_anchor_without_negatives_has_no_loss() -> None:
    s, t = vectors(3)
    allowed = CLASSES[:, None] != CLASSES
    allowed[2] = False
    s.requires_grad_()
    values = functional.nce(s, t, t, allowed, T, torch.tensor(0.2))
    assert values[2] == 0
    assert (values[[0, 1, 3, 4, 5, 6]] > 0).all()
    (gradient,) = torch.autograd.grad(values.sum(), s)
    assert (gradient[2] == 0).all()
    none = functional.nce(s, t, t[:0], allowed[:, :0], T, torch.tensor(0.2))
    assert none.tolist() == [0.0] * 7


@pytest.mark.parametrize("estimator", ["info_nce", "nce"])
@pytest.mark.parametrize("number", [0, 1, 9])
def test_a_measurement_within_a_step_changes_nothing(estimator: str, number: int) -> None:
    """Sets may be measured between the accumulated batches of a step."""
    kept = []
    for measures in (False, True):
        term = objectives.CLSContrast(negatives=2, size=6, estimator=estimator)  # type: ignore[arg-type]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            distill = Distillation(tiny.bert(2), tiny.bert(4, seed=1), [term]).train()
        values = []
        for step in (0, 0, 1, 1, 2, 2):
            batch = tiny.batch(seed=len(values)) | {"row_id": torch.arange(3) + 3 * len(values)}
            values.append(distill(batch, Step(step)).total.detach())
            if measures:
                distill.measure(tiny.batch(seed=99), Step(number))
        kept.append((torch.stack(values), {k: v for k, v in term.state_dict().items() if isinstance(v, Tensor)}))
    (values, bank), (other_values, other_bank) = kept
    assert torch.equal(values, other_values)
    assert all(torch.equal(bank[name], other_bank[name]) for name in bank)
