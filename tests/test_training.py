"""Weights over time, stages and balancing: what takes part at which step, and at what cost."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

import tiny
from exact import masked_models, masked_rows
from ildistil import Balance, Distillation, Distiller, Stage, init_student, mappings, objectives
from ildistil.capture import Capture
from ildistil.errors import CheckpointError, ObjectiveError
from ildistil.objectives import Objective
from ildistil.schedules import Cosine, Linear, Schedule, Window
from ildistil.stages import Step
from test_distiller import loader, pair, trainer

STAGES = [Stage(["hidden_mse"], epochs=2), Stage(["logits_kl", "task_loss"], epochs=2, learning_rate=2e-4)]


def staged() -> list[Objective]:
    return [objectives.HiddenMSE(), objectives.LogitsKL(), objectives.TaskLoss()]


class Record(L.Callback):
    """What is logged, the learning rate, and how much the optimiser remembers, at every step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.rates: list[float] = []
        self.moments: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Distiller, *args: object) -> None:  # type: ignore[override]
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})
        (optimizer,) = trainer.optimizers
        self.moments.append(max(float(s["step"]) for s in optimizer.state.values()))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Spy(objectives.HiddenMSE):
    """Counts how often its loss is asked for."""

    calls = 0

    def loss(self, *args: Any) -> Tensor:
        type(self).calls += 1
        return super().loss(*args)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Linear(1.0, 0.0), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (Linear(0.0, 2.0, begin=0.5), [0.0, 0.0, 0.0, 1.0, 2.0]),
        (Cosine(1.0, 0.0, until=0.5), [1.0, 0.5, 0.0, 0.0, 0.0]),
        (Window(0.3, 0.25, 0.75), [0.0, 0.3, 0.3, 0.0, 0.0]),
        (Window(0.3, 0.5), [0.0, 0.0, 0.3, 0.3, 0.3]),
    ],
    ids=str,
)
def test_schedules(schedule: Schedule, expected: list[float]) -> None:
    assert [schedule(p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx(expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(1.0, -1.0),
        lambda: Linear(0.0, 0.0),
        lambda: Window(float("inf")),
        lambda: Window(1.0, 0.5, 0.5),
        lambda: Cosine(1.0, 0.0, until=1.5),
    ],
)
def test_impossible_schedules_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"weights must be finite|begin and until are shares"):
        make()


def test_a_term_of_weight_zero_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't computed, its layers aren't recorded, and no teacher runs for it."""
    student, teacher = pair()
    Spy.calls, runs = 0, []
    run = Capture.__call__

    def noted(self: Capture, batch: Any, *, wanted: Any = None, verify: bool = False) -> Any:
        runs.append((self.role, sorted(map(str, wanted))))
        return run(self, batch, wanted=wanted, verify=verify)

    monkeypatch.setattr(Capture, "__call__", noted)
    spy = Spy(weight=Window(until=0.5))
    engine = Distillation(student, teacher, [spy, objectives.TaskLoss(), objectives.LogitsKL(weight=0)])
    batch = tiny.batch()
    assert sorted(engine(batch, Step(progress=0.0)).values) == ["spy", "task_loss"]
    assert runs == [("teacher", ["hidden[2]", "hidden[4]"]), ("student", ["hidden[1]", "hidden[2]", "loss"])]
    runs.clear()
    terms = engine(batch, Step(progress=0.5))
    assert list(terms.values) == ["task_loss"]
    assert runs == [("student", ["loss"])]
    assert Spy.calls == 1


def test_scheduled_weights_in_a_fit() -> None:
    student, teacher = pair()
    record = Record()
    terms = [objectives.LogitsKL(weight=Linear(1.0, 0.0)), objectives.TaskLoss(weight=Window(until=0.5))]
    trainer(record, *terms, max_epochs=1).fit(Distiller(student, teacher), loader())
    for i, logged in enumerate(record.logged):
        expected = (1 - i / 4) * logged["train/logits_kl"] + (logged["train/task_loss"] if i < 2 else 0.0)
        assert logged["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_schedule_needs_to_know_how_far_training_is() -> None:
    engine = Distillation(*pair(), [objectives.HiddenMSE(weight=Linear(1.0, 0.0))])
    with pytest.raises(ObjectiveError, match=r"hidden_mse is a schedule.*progress=step / steps"):
        engine(tiny.batch())


def test_a_training_that_comes_to_nothing_is_refused_before_it_starts() -> None:
    terms = [objectives.LogitsKL(weight=Window(until=0.4)), objectives.TaskLoss(weight=Window(begin=0.6))]
    with pytest.raises(ObjectiveError, match=r"At 50.0% of the training all terms have weight 0"):
        trainer(*terms).fit(Distiller(*pair()), loader())


def test_a_schedule_without_an_end_is_refused() -> None:
    module = Distiller(*pair(), schedule="constant")
    with pytest.raises(ValueError, match="a weight's schedule needs to know the number of steps"):
        trainer(objectives.LogitsKL(weight=Linear(1.0, 0.0)), max_epochs=-1).fit(module, loader())


def test_a_schedule_of_ones_own_is_checked() -> None:
    class Bad(Schedule):
        def __call__(self, progress: float) -> float:
            return 0.5 - progress

    with pytest.raises(ObjectiveError, match=r"not always a finite number >= 0: it goes from -0.5 to 0.5"):
        Distillation(*pair(), [objectives.HiddenMSE(weight=Bad())])


def test_schedules_are_told_in_short() -> None:
    assert str(Linear(1.0, 0.0)) == "Linear 1 to 0"
    assert str(Cosine(0.0, 2.5, until=0.5)) == "Cosine 0 to 2.5 in 0-0.5"
    assert str(Window(0.3, 0.25)) == "Window 0.3 in 0.25-1"


# Layers drawn at random


def test_drawn_layers_change_with_the_step_and_only_they_are_compared() -> None:
    engine = Distillation(*pair(), [objectives.HiddenMSE(mapping=mappings.Random(seed=3))])
    values = [engine(tiny.batch(), Step(i)).total.item() for i in (0, 1, 2, 3, 0)]
    assert len(set(values)) > 1
    assert values[0] == values[-1]
    with pytest.raises(ObjectiveError, match="draws its layers anew at every step"):
        engine(tiny.batch())


# Stages


def test_stages_train_their_terms_with_a_fresh_start() -> None:
    student, teacher = pair()
    record = Record()
    module = Distiller(student, teacher, stages=STAGES, learning_rate=1e-4, warmup=0.25)
    trainer(record, *staged(), max_epochs=4).fit(module, loader())
    names = [{k.removeprefix("train/") for k in step if "share" not in k} for step in record.logged]
    # Lightning keeps what was logged last; the first stage must not have known the second's terms.
    assert all(step == {"loss", "hidden_mse", "stage"} for step in names[:8])
    assert all({"logits_kl", "task_loss"} <= step for step in names[8:])
    assert [step["train/stage"] for step in record.logged] == [1.0] * 8 + [2.0] * 8
    assert record.moments == [*range(1, 9), *range(1, 9)]
    first, second = record.rates[:8], record.rates[8:]
    assert first[2] == max(first) == pytest.approx(1e-4)
    assert second == pytest.approx([2 * rate for rate in first])
    assert second[0] < second[1] < second[2]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_resuming_in_either_stage_goes_on_as_if_nothing_had_happened(epochs: int, tmp_path: Path) -> None:
    student, teacher = pair()
    start = copy.deepcopy(student)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Distiller(student, teacher, stages=STAGES)
    trainer(keep, *staged(), max_epochs=4, enable_checkpointing=True).fit(module, loader())
    again = Distiller(start, teacher, stages=STAGES)
    path = tmp_path / f"epoch={epochs - 1}.ckpt"
    trainer(*staged(), max_epochs=4).fit(again, loader(), ckpt_path=path, weights_only=True)
    for name, value in student.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]), name


def test_stopping_and_the_best_checkpoint_watch_the_last_stage_only(tmp_path: Path) -> None:
    class Judge(Distiller):
        """Says that the first stage is far better than the second."""

        def on_validation_epoch_end(self) -> None:
            self.log("score", 10.0 if self.current_epoch < 3 else float(self.current_epoch))

    stages = [Stage(["hidden_mse"], epochs=3), Stage(["logits_kl", "task_loss"], epochs=3)]
    stop = EarlyStopping("score", mode="max", patience=1)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="score", mode="max")
    last = ModelCheckpoint(tmp_path, filename="last")
    run = trainer(stop, best, last, *staged(), max_epochs=6, enable_checkpointing=True)
    before = list(run.callbacks)
    run.fit(Judge(*pair(), stages=stages), loader(), loader())
    assert run.current_epoch == 6
    assert float(best.best_model_score) == 5.0
    assert [c for c in run.callbacks if c in before] == before


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (STAGES, {"max_epochs": 3}, r"last 4 epochs together, the Trainer has max_epochs=3\. Set max_epochs=4"),
        (STAGES, {"max_epochs": 4, "max_steps": 5}, "the Trainer has max_steps=5"),
        ([Stage(["hidden"], 4)], {"max_epochs": 4}, "names 'hidden', and there is no such objective"),
        ([Stage(["hidden_mse", "task_loss"], 4)], {"max_epochs": 4}, "'logits_kl' takes part in no stage"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: list[Stage], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(*staged(), **options).fit(Distiller(*pair(), stages=stages), loader())


def test_impossible_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one epoch"):
        Stage(["a"], epochs=0)
    with pytest.raises(ValueError, match="a list of names"):
        Stage("a", epochs=1)
    with pytest.raises(ValueError, match="learning_rate must be > 0"):
        Stage(["a"], epochs=1, learning_rate=0.0)


def test_what_a_stage_does_not_train_stays_as_it_was() -> None:
    """No weight decay on the head while hidden states are learned, also with gradients accumulated."""
    student, teacher = pair()
    head = student.classifier.weight.detach().clone()
    heads = []

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            heads.append(module.student.classifier.weight.detach().clone())

    module = Distiller(student, teacher, stages=STAGES, weight_decay=0.5, learning_rate=1e-2)
    trainer(Look(), *staged(), max_epochs=4, accumulate_grad_batches=2).fit(module, loader())
    assert torch.equal(heads[1], head)
    assert not torch.equal(heads[2], head)


def test_a_best_checkpoint_alone_is_warned_of(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/loss")
    with pytest.warns(UserWarning, match="none is written before the last stage"):
        trainer(best, *staged(), max_epochs=4, enable_checkpointing=True).fit(
            Distiller(*pair(), stages=STAGES), loader(), loader()
        )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resuming_with_other_stages_names_the_differences(tmp_path: Path) -> None:
    student, teacher = pair()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(keep, *staged(), max_epochs=4, enable_checkpointing=True).fit(
        Distiller(student, teacher, stages=STAGES), loader()
    )
    other = [Stage(["hidden_mse"], 1), Stage(["logits_kl", "task_loss"], 3)]
    with pytest.raises(CheckpointError, match="stage 1: hidden_mse, 2 epochs in the checkpoint, hidden_mse, 1 epochs"):
        trainer(*staged(), max_epochs=4).fit(
            Distiller(student, teacher, stages=other), loader(), ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True
        )


def test_a_stream_without_a_known_length() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(loader().dataset)  # type: ignore[arg-type]

    stream = torch.utils.data.DataLoader(Stream(), 4)
    with pytest.raises(ValueError, match="needs to know the number of steps"):
        trainer(objectives.TaskLoss(), max_epochs=2).fit(Distiller(*pair()), stream)
    with pytest.raises(ValueError, match="Stages last whole epochs, and the data's length isn't known"):
        trainer(*staged(), max_epochs=4).fit(Distiller(*pair(), stages=STAGES, schedule="constant"), stream)


def test_terms_that_take_part_are_named_in_a_list() -> None:
    engine = Distillation(*pair(), staged())
    assert list(engine(tiny.batch(), Step(only=["task_loss"])).values) == ["task_loss"]
    for only in ("task_loss", ["task"]):
        with pytest.raises(ObjectiveError, match="only names some of the objectives"):
            engine(tiny.batch(), Step(only=only))


def test_a_weight_may_be_raised_from_zero() -> None:
    hidden = objectives.HiddenMSE(weight=0.0)
    engine = Distillation(*pair(), [hidden, objectives.TaskLoss()])
    assert list(engine(tiny.batch()).values) == ["task_loss"]
    hidden.weight = 1.0
    assert sorted(engine(tiny.batch()).values) == ["hidden_mse", "task_loss"]


def test_unlabelled_rows_leave_the_other_terms_exact_under_accumulation() -> None:
    """The second batch has no label: it still teaches hidden states."""
    import exact

    rows = exact.rows()
    for row in rows[4:]:
        row["labels"] = torch.tensor(-100)
    terms = lambda: [objectives.HiddenMSE(), objectives.TaskLoss(weight=1e-9)]  # noqa: E731
    whole = exact.step(terms(), rows, exact.models(), 8)
    parts = exact.step(terms(), rows, exact.models(), 4, accumulate_grad_batches=2)
    for name, expected in whole.items():
        if "classifier" not in name and "pooler" not in name:
            torch.testing.assert_close(parts[name], expected, rtol=1e-6, atol=1e-8, msg=name)


# Balancing


@pytest.mark.parametrize("by", ["magnitude", "gradient"])
def test_balanced_terms_have_their_shares(by: Any) -> None:
    terms = [objectives.HiddenMSE(weight=3.0), objectives.LogitsKL(weight=1.0)]
    engine = Distillation(*pair(), terms, balance=Balance(by))
    found = engine(tiny.batch(), Step(0))
    plain = {"hidden_mse": 3.0 * found.values["hidden_mse"], "logits_kl": found.values["logits_kl"]}
    if by == "magnitude":
        assert float(found.shares()["hidden_mse"]) == pytest.approx(0.75)
        assert found.total.item() == pytest.approx(sum(plain.values()).item(), rel=1e-5)
        return
    assert float(found.gradients["hidden_mse"]) == pytest.approx(0.75)
    parameters = list(engine.student.parameters())
    norms = {}
    for name, value in found.values.items():
        gradients = torch.autograd.grad(found.weights[name] * value, parameters, retain_graph=True, allow_unused=True)
        norms[name] = sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5
    assert norms["hidden_mse"] == pytest.approx(3 * norms["logits_kl"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_balancing_measures_every_few_steps_and_resumes(tmp_path: Path) -> None:
    terms = lambda: [objectives.HiddenMSE(), objectives.LogitsKL()]  # noqa: E731
    student, teacher = pair()
    start = copy.deepcopy(student)
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Distiller(student, teacher, balance=Balance("gradient", every=2))
    trainer(keep, *terms(), enable_checkpointing=True).fit(module, loader())
    again = Distiller(start, teacher, balance=Balance("gradient", every=2))
    trainer(*terms()).fit(again, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, start.state_dict()[name], rtol=1e-5, atol=1e-7, msg=name)


def test_impossible_balancing_is_refused() -> None:
    with pytest.raises(ValueError, match="by is 'magnitude' or 'gradient'"):
        Balance("size")  # type: ignore[arg-type]


def test_balancing_does_not_measure_in_evaluation() -> None:
    engine = Distillation(*pair(), [objectives.HiddenMSE(), objectives.LogitsKL()], balance=Balance("gradient"))
    engine.eval()
    with torch.no_grad():
        assert [float(w) for w in engine(tiny.batch()).weights.values()] == [1.0, 1.0]
    engine.train()(tiny.batch())
    sizes = dict(engine.balance.sizes)
    with torch.no_grad():
        engine.eval()(tiny.batch(seed=1))
    assert engine.balance.sizes == sizes


# The memory bank


def bank_fit(student: Any, teacher: Any, **options: Any) -> tuple[objectives.CLSContrast, L.Trainer]:
    term = objectives.CLSContrast(negatives=5, size=8)
    run = trainer(
        term, objectives.TaskLoss(), enable_checkpointing="ckpt_path" in options, **options.pop("trainer", {})
    )
    run.fit(Distiller(student, teacher), loader(), **options)
    return term, run


def test_the_bank_keeps_a_vector_of_every_row_and_resumes(tmp_path: Path) -> None:
    student, teacher = pair()
    start = copy.deepcopy(student)
    term, run = bank_fit(student, teacher, trainer={"max_epochs": 1})
    state = term.state_dict()
    assert len(state["row_ids"]) == 12  # the last step's four are learned when the next one begins
    assert len(state["waiting"][0][0]) == 4
    labels = {int(r): int(y) for b in loader() for r, y in zip(b["row_id"], b["labels"], strict=True)}
    assert {int(r): int(y) for r, y in zip(state["row_ids"], state["classes"], strict=True)}.items() <= labels.items()
    assert state["student"].norm(dim=1) == pytest.approx(torch.ones(12))
    run.save_checkpoint(tmp_path / "run.ckpt")
    term, _ = bank_fit(student, teacher, trainer={"max_epochs": 1})  # another run starts with an empty bank
    again = objectives.CLSContrast(negatives=5, size=8)
    resumed = trainer(again, objectives.TaskLoss(), max_epochs=1)
    module = Distiller(start, teacher)
    resumed.fit(module, loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    restored = again.state_dict()
    assert all(torch.equal(restored[key], state[key]) for key in ("row_ids", "classes", "student", "teacher"))
    assert all(torch.equal(x, y) for x, y in zip(restored["waiting"][0], state["waiting"][0], strict=True))


def test_the_bank_is_untouched_by_dry_runs_and_within_a_step() -> None:
    term = objectives.CLSContrast(negatives=5, size=8)
    engine = Distillation(*pair(), [term])
    batch = tiny.batch()
    engine(batch, Step(0))
    engine(batch, Step(1))
    before = copy.deepcopy(term._bank["student"])
    engine.dry_run(batch)
    assert torch.equal(term._bank["student"], before)
    first = engine(batch, Step(2)).total
    assert torch.equal(engine(batch, Step(2)).total, first)


def test_the_bank_moves_by_its_momentum() -> None:
    term = objectives.CLSContrast(size=2, momentum=0.25)
    rows = torch.tensor([3, 1])
    for vectors in ([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]):
        states = torch.tensor(vectors)
        term._now = [rows, torch.tensor([0, 1]), states, states]
        term.remember()
        term._learn()
    expected = torch.nn.functional.normalize(torch.tensor([0.25, 0.75]), dim=0)
    state = term.state_dict()
    assert state["row_ids"].tolist() == [1, 3]
    assert state["classes"].tolist() == [1, 0]
    torch.testing.assert_close(state["teacher"][1], expected)


def test_the_bank_draws_other_texts_at_every_step_and_grows_with_texts_not_ids() -> None:
    term = objectives.CLSContrast(size=8, negatives=2)
    engine = Distillation(*pair(), [term])
    batch = tiny.batch((4,) * 12) | {"row_id": torch.arange(12) * 10**12}
    for step in range(3):
        engine(batch, Step(step))
    assert term.state_dict()["student"].shape == (12, 8)
    drawn = {tuple(term._others(0, torch.Generator().manual_seed(seed)).tolist()) for seed in range(20)}
    assert len(drawn) > 3
    many = objectives.CLSContrast(size=1, negatives=2)
    many.load_state_dict({
        "row_ids": torch.arange(100), "classes": torch.arange(100) % 2, "student": torch.ones(100, 1),
        "teacher": torch.ones(100, 1), "waiting": [], "log_normalizers": torch.empty(0),
    })  # fmt: skip
    for seed in range(20):
        found = many._others(1, torch.Generator().manual_seed(seed))
        assert len(set(found.tolist())) == 2
        assert (many._classes[found] == 0).all()
    with pytest.raises(ObjectiveError, match="draws texts anew at every step"):
        engine(batch)


def test_the_bank_is_of_one_pair_of_models() -> None:
    term = objectives.CLSContrast(size=8)
    engine = Distillation(*pair(), [term])
    for step in range(2):
        engine(tiny.batch(), Step(step))
    engine.release()
    assert len(term.state_dict()["row_ids"]) == 0


@pytest.mark.parametrize(("missing", "message"), [("row_id", "has no 'row_id'"), ("labels", "'labels' are no classes")])
def test_a_batch_that_the_bank_cannot_use_is_refused(missing: str, message: str) -> None:
    engine = Distillation(*pair(), [objectives.CLSContrast()])
    batch = {key: value for key, value in tiny.batch().items() if key != missing}
    with pytest.raises(ObjectiveError, match=message):
        engine(batch, Step(0))


# Language models


def test_next_token_logits_count_the_targets_only() -> None:
    """GPT-2: the logits at i are compared where the label at i + 1 is a target."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = {"n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    student, teacher = (GPT2LMHeadModel(GPT2Config(n_layer=n, **config)).double() for n in (1, 2))
    batch = {key: value for key, value in tiny.batch().items() if key in ("input_ids", "attention_mask")}
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :2] = -100
    engine = Distillation(student.eval(), teacher, [objectives.LogitsKL(temperature=1.5)])
    term = engine.eval()(batch)
    with torch.no_grad():
        s, t = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (student, teacher)
        )
    values = []
    for b in range(3):
        for i in range(6):
            if batch["labels"][b, i + 1] != -100:
                p, q = torch.softmax(t[b, i] / 1.5, 0), torch.softmax(s[b, i] / 1.5, 0)
                values.append(1.5**2 * (p * (p / q).log()).sum())
    torch.testing.assert_close(term.total, torch.stack(values).mean())
    assert int(term.counts["logits_kl"].number) == len(values)


# Widths and heads that differ


@pytest.mark.parametrize("objective", ["AttentionKL", "AttentionDIST"])
def test_heads_are_merged_only_when_asked_to(objective: str) -> None:
    student, teacher = tiny.bert(2, heads=4), tiny.bert(4, heads=2, seed=1)
    make = getattr(objectives, objective)
    with pytest.raises(ObjectiveError, match=r"student has 4 heads, the teacher 2\..*heads='merge'"):
        Distillation(student, teacher, [make()])
    engine = Distillation(student, teacher, [make(heads="merge")])
    term = engine(tiny.batch()).total
    term.backward()
    assert torch.isfinite(term)
    assert student.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    assert "merged to 2" in engine.objectives[next(iter(engine.objectives))].describe()


@pytest.mark.parametrize(
    ("projection", "keys"),
    [
        (objectives.Projection(), ["1_2", "2_4"]),
        (objectives.Projection(shared=True), ["shared"]),
        (objectives.Projection(norm=True, orthogonal=True), ["1_2", "2_4"]),
    ],
)
def test_projections_are_made_as_asked(projection: objectives.Projection, keys: list[str]) -> None:
    student, teacher = tiny.bert(2, width=16), tiny.bert(4)
    engine = Distillation(student, teacher, [objectives.HiddenMSE(projection=projection)])
    made = engine.projections["hidden_mse"]
    assert sorted(made) == keys
    first = made[keys[0]]
    linear = first[0] if projection.norm else first
    assert linear.weight.shape == (32, 16)
    if projection.orthogonal:
        torch.testing.assert_close(linear.weight.T @ linear.weight, torch.eye(16), rtol=1e-5, atol=1e-5)
    engine(tiny.batch()).total.backward()
    assert all(p.grad is not None for p in made.parameters())


@pytest.mark.parametrize(
    "objective", ["HiddenMSE", "AttentionOutputMSE", "QKVMSE", "HiddenConcatMSE", "CLSAttentiveMSE"]
)
def test_widths_that_differ_need_a_projection(objective: str) -> None:
    make = getattr(objectives, objective)
    with pytest.raises(ObjectiveError, match=rf"{objective}: the student's width is \d+, the teacher's \d+"):
        Distillation(tiny.bert(2, width=16), tiny.bert(4), [make(projection="never")])
    engine = Distillation(tiny.bert(2, width=16), tiny.bert(4), [make()])
    engine(tiny.batch()).total.backward()
    assert len(engine.projections)


class Weights(L.Callback):
    """The weights that training starts each epoch with."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seen.append({n: p.detach().clone() for n, p in module.named_parameters()})


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
def test_averaged_weights_are_those_of_the_projections_too() -> None:
    teacher, weights = tiny.bert(4), Weights()
    average = StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)
    module = Distiller(init_student(teacher, layers=[1, 2]), teacher)
    terms = [objectives.HiddenMSE(projection="always"), objectives.LogitsKL()]
    trainer(average, weights, *terms, max_epochs=4).fit(module, loader(rows=8))
    for name, found in module.named_parameters():
        mean = sum(seen[name] for seen in weights.seen) / 4  # Lightning counts epochs from 1 here
        torch.testing.assert_close(found, mean, msg=name)
    assert average._average_model.teacher.model is teacher


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_accumulated_batches_of_unequal_counts_resume_bit_equal(tmp_path: Path) -> None:
    """The averages behind a window's weights are in the checkpoint."""

    def fit(epochs: int, path: Path | None = None) -> Distiller:
        student, teacher = masked_models()
        keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        terms = [objectives.LogitsKL(), objectives.HiddenMSE()]
        module = Distiller(student.float(), teacher.float(), schedule="constant", warmup=0.0)
        data = DataLoader(masked_rows(), 2, shuffle=False)
        trainer(keep, *terms, max_epochs=epochs, accumulate_grad_batches=2, enable_checkpointing=True).fit(
            module, data, ckpt_path=path, weights_only=True
        )
        return module

    whole = fit(3)
    (tmp_path / "epoch=0.ckpt").rename(tmp_path / "first.ckpt")
    window = torch.load(tmp_path / "first.ckpt", weights_only=True)["ildistil"]["window"]
    assert {name: batches for name, (_, batches) in window.items()} == {"": 5, "hidden_mse": 5, "logits_kl": 5}
    resumed = fit(3, tmp_path / "first.ckpt")
    for (name, mine), theirs in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
