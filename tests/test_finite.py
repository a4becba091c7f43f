"""Steps whose gradient isn't finite: nothing of them is applied, and the message names the term."""

import copy
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from ildistil import Balance, Distiller, objectives
from ildistil.capture import Activations
from ildistil.engine.dry_run import look_finite
from ildistil.errors import ConfigError, NotFiniteError
from ildistil.objectives import Objective
from ildistil.training.finite import MOST_IN_SUCCESSION, NonFinite
from test_distiller import loader, pair, trainer


class _Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, by: float) -> Tensor:
        ctx.by = by
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient * ctx.by, None


class Spoilt(Objective):
    """A finite loss, whose gradient isn't at some rows."""

    taps = ("logits",)
    teacher_taps = ()

    def __init__(self, rows: set[int], by: float = float("nan"), name: str = "spoilt") -> None:
        super().__init__(1.0, name)
        self.rows, self.by, self.armed = rows, by, False

    def on_train_batch_start(self, *args: Any) -> None:
        self.armed = True  # the dry runs are over

    def loss(self, student: Activations, teacher: Activations, batch: Any) -> Tensor:
        hit = self.armed and not self.rows.isdisjoint(batch["row_id"].tolist())
        return _Spoil.apply(student.logits.square().mean(), self.by if hit else 1.0)  # type: ignore[no-any-return,no-untyped-call]


class States(L.Callback):
    """Weights and the optimiser's state after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Any]] = []
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        self.weights.append(copy.deepcopy(module.student.state_dict()))
        self.moments.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))
        self.logged.append(float(trainer.callback_metrics.get("train/skipped_steps", 0)))


def same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)


@pytest.mark.parametrize("by", [float("nan"), float("inf"), float("-inf")])
def test_a_spoilt_gradient_stops_before_it_is_applied(by: float) -> None:
    student, teacher = pair()
    states = States()
    run = trainer(objectives.LogitsKL(), Spoilt({9}, by), states)
    with pytest.raises(
        NotFiniteError, match=r"gradient is not finite at step 2 \(epoch 0, row ids \[8, 9, 10, 11\]\)"
    ) as e:
        run.fit(Distiller(student, teacher), loader())
    assert "gradient of: spoilt." in str(e.value)
    assert len(states.weights) == 2
    assert same(student.state_dict(), states.weights[1])


def test_the_term_is_found_among_accumulated_batches() -> None:
    student, teacher = pair()
    start = copy.deepcopy(student.state_dict())
    terms = [objectives.HiddenMSE(), Spoilt({1}, name="first"), Spoilt({13}, name="other")]
    with pytest.raises(NotFiniteError, match=r"step 0 \(epoch 0, row ids \[0, 1, 2, 3\]\).* of: first\. Nothing"):
        trainer(*terms, accumulate_grad_batches=3).fit(Distiller(student, teacher), loader())
    assert same(student.state_dict(), start)


def test_a_gradient_that_no_term_has_by_itself() -> None:
    class Hook(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: Any) -> None:
            next(p for p in module.parameters() if p.grad is not None).grad[0] = float("nan")

    with pytest.raises(NotFiniteError, match="isn't known: the last batches, run again, show none"):
        trainer(objectives.LogitsKL(), Hook()).fit(Distiller(*pair()), loader())


def test_a_loss_of_a_subclass_of_its_own() -> None:
    class Own(Distiller):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            logits = self(batch).logits
            return _Spoil.apply(logits.square().mean(), float("nan") if batch_idx == 1 else 1.0)  # type: ignore[no-any-return,no-untyped-call]

    student, teacher = pair()
    states = States()
    with pytest.raises(NotFiniteError, match=r"gradient is not finite at step 1 \(epoch 0\), while the loss is"):
        trainer(objectives.LogitsKL(), states).fit(Own(student, teacher), loader())
    assert same(student.state_dict(), states.weights[0])


def test_large_gradients_are_finite() -> None:
    """Their norm isn't in float32."""
    assert not look_finite([torch.full((4,), 1e30)])
    student, teacher = pair()
    states = States()
    trainer(objectives.LogitsKL(), Spoilt({9}, 1e25), states, max_epochs=1).fit(Distiller(student, teacher), loader())
    assert len(states.weights) == 4
    assert not same(states.weights[1], states.weights[2])


@pytest.mark.parametrize("balance", [None, Balance("gradient", every=1)])
def test_a_skipped_step_changes_nothing(balance: Balance | None) -> None:
    student, teacher = pair()
    states = States()
    module = Distiller(student, teacher, non_finite="skip", balance=balance)
    with pytest.warns(UserWarning, match="The gradient is not finite at step 1 .* The step is left out"):
        trainer(objectives.LogitsKL(), Spoilt({5, 9}), states, max_epochs=1).fit(module, loader(rows=20))
    weights, moments = states.weights, states.moments
    assert same(weights[0], weights[1])
    assert same(weights[1], weights[2])
    assert not same(weights[2], weights[3])
    assert same(moments[0], moments[1])
    assert same(moments[1], moments[2])
    assert states.logged == [0, 0, 1, 2, 2]
    assert all(value.isfinite().all() for value in student.state_dict().values())


def test_a_skipped_step_is_one_without_its_rows() -> None:
    """Its window's averages are those of the windows that counted, so the rest goes on as if it had not been."""
    ended: list[dict[str, Tensor]] = []
    for spoilt in (True, False):
        student, teacher = pair()
        module = Distiller(student, teacher, non_finite="skip", schedule="constant", warmup=0.0)
        rows = loader(rows=24).dataset
        data = rows if spoilt else [rows[i] for i in (*range(8), *range(16, 24))]
        terms = [objectives.LogitsKL(), objectives.TaskLoss(), Spoilt({11} if spoilt else set())]
        run = trainer(*terms, accumulate_grad_batches=2, max_epochs=1)
        with pytest.warns(UserWarning, match="left out") if spoilt else nullcontext():
            run.fit(module, DataLoader(data, 4))  # type: ignore[arg-type]
        ended.append({**student.state_dict(), "window": torch.tensor(list(module.window.state_dict().values()))})
    assert same(*ended)


def test_a_nan_loss_is_skipped_too_and_stays_in_no_bank() -> None:
    class Lost(Spoilt):
        def loss(self, student: Activations, teacher: Activations, batch: Any) -> Tensor:
            hit = self.armed and not self.rows.isdisjoint(batch["row_id"].tolist())
            return student.logits.mean() * (float("nan") if hit else 1.0)

    student, teacher = pair()
    states = States()
    module = Distiller(student, teacher, non_finite="skip")
    with pytest.warns(UserWarning, match="The loss is not finite at step 1 .*spoilt = nan"):
        trainer(Lost({5}), objectives.LogitsKL(), states, max_epochs=1).fit(module, loader())
    assert same(states.weights[0], states.weights[1])
    assert not same(states.weights[1], states.weights[2])


def test_a_bank_keeps_no_vector_that_is_not_finite() -> None:
    student, teacher = pair()
    bank = objectives.CLSContrast(negatives=4)
    poisoned: list[int] = []

    class Poison(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
            if index == 1:
                poisoned.extend(batch["row_id"].tolist())
                layer = module.student.bert.encoder.layer[0]
                self.handle = layer.register_forward_hook(lambda m, a, out: out * float("nan"))

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if index == 1:
                self.handle.remove()

    module = Distiller(student, teacher, non_finite="skip")
    with pytest.warns(UserWarning, match="left out"):
        trainer(bank, Poison(), max_epochs=1).fit(module, loader(rows=20))
    assert module._finite.skipped == 1
    assert all(vectors.isfinite().all() for vectors in bank._bank.values())


def test_too_many_skipped_steps_end_it() -> None:
    module = Distiller(*pair(), non_finite="skip")
    terms = [objectives.LogitsKL(), Spoilt(set(range(16)))]
    with pytest.warns(UserWarning, match="left out"), pytest.raises(NotFiniteError, match="number 100 in succession"):
        trainer(*terms, max_epochs=MOST_IN_SUCCESSION).fit(module, loader(rows=16, batch_size=4))


def test_the_choice_is_checked() -> None:
    with pytest.raises(ConfigError, match="non_finite must be one of"):
        Distiller(*pair(), non_finite="ignore")  # type: ignore[arg-type]


# float16


def scaled(scale: float) -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_gradients_that_overflow_in_float16_are_left_to_the_scaler(non_finite: NonFinite, accumulated: int) -> None:
    student, teacher = pair()
    states = States()
    module = Distiller(student, teacher, non_finite=non_finite)
    terms = [objectives.LogitsKL(), objectives.HiddenMSE()]
    options: Any = {"plugins": scaled(2.0**40), "accumulate_grad_batches": accumulated}
    run = trainer(*terms, states, max_epochs=16, **options)
    run.fit(module, loader())
    scaler = run.precision_plugin.scaler  # type: ignore[attr-defined]
    assert 0 < module._finite.skipped < 40
    assert scaler.get_scale() == 2.0 ** (40 - module._finite.skipped)
    assert same(states.weights[0], states.weights[accumulated])
    assert not same(states.weights[-1], states.weights[-1 - accumulated])
    assert states.logged[-1] == module._finite.skipped
    assert all(value.isfinite().all() for value in student.state_dict().values())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_gradient_that_is_nan_at_any_scale_is_no_overflow() -> None:
    student, teacher = pair()
    start = copy.deepcopy(student.state_dict())
    run = trainer(objectives.LogitsKL(), Spoilt(set(range(16))), plugins=scaled(8.0))
    with pytest.raises(NotFiniteError, match=r"at step 3 .* gradient of: spoilt\."):
        run.fit(Distiller(student, teacher), loader())
    assert same(student.state_dict(), start)
