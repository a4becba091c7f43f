import copy
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import tiny
from ildistil import Distillation, Distiller, Stage, init_student, mappings, objectives
from ildistil.capture import Activations
from ildistil.errors import CheckpointError, ObjectiveError
from ildistil.objectives import Objective
from ildistil.teachers import StoredTeacher
from ildistil.training import load_student


def loader(rows: int = 16, batch_size: int = 4, labels: int = 3, shuffle: bool = False) -> DataLoader[Any]:
    batch = tiny.batch(tuple(3 + i % 5 for i in range(rows)), labels=labels)
    return DataLoader([{k: v[i] for k, v in batch.items()} for i in range(rows)], batch_size, shuffle=shuffle)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**{"max_epochs": 2, "accelerator": "cpu"} | quiet | options, callbacks=list(callbacks))


def every_kind() -> list[Objective]:
    return [
        objectives.AttentionKL(),
        objectives.HiddenMSE(projection="always"),
        objectives.LogitsKL(weight=0.5),
        objectives.TaskLoss(weight=0.5),
    ]


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    teacher = tiny.bert(4)
    return init_student(teacher, layers=[1, 2]), teacher


class Watch(L.Callback):
    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Distiller, *args: object) -> None:  # type: ignore[override]
        self.modes.append(
            (all(m.training for m in module.student.modules()), any(m.training for m in module.teacher.model.modules()))
        )


def test_the_teacher_stays_and_the_student_trains() -> None:
    student, teacher = pair()
    student.eval()  # as from_pretrained returns it
    before, start = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    watch = Watch()
    trainer(watch, *every_kind()).fit(Distiller(student, teacher), loader(), loader())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert any(not torch.equal(value, start[name]) for name, value in student.state_dict().items())
    assert watch.modes == [(True, False)] * 8


def test_terms_shares_and_metrics_are_logged() -> None:
    student, teacher = pair()
    run = trainer(*every_kind())
    run.fit(Distiller(student, teacher), loader(), loader())
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    shares = [value for key, value in logged.items() if key.startswith("train/share/")]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1.0)
    total = logged["train/attention_kl"] + logged["train/hidden_mse"]
    total += 0.5 * (logged["train/logits_kl"] + logged["train/task_loss"])
    assert logged["train/loss"] == pytest.approx(total, rel=1e-5)
    assert 0 <= logged["val/accuracy"] <= 1
    assert logged["val/loss"] > 0


def test_validation_measures_the_student() -> None:
    student, teacher = pair()
    run = trainer()
    run.validate(Distiller(student, teacher), loader(), verbose=False)
    rows = [
        row
        for batch in loader()
        for row in zip(*(batch[k] for k in ("input_ids", "attention_mask", "position_ids", "labels")), strict=True)
    ]
    student.eval()
    hits = [
        student(input_ids=i[None], attention_mask=m[None], position_ids=p[None]).logits.argmax().item() == y.item()
        for i, m, p, y in rows
    ]
    assert float(run.callback_metrics["val/accuracy"]) == pytest.approx(sum(hits) / len(hits))


def test_the_plan_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = pair()
    student.config.attention_probs_dropout_prob = 0.1
    with caplog.at_level(logging.INFO):
        trainer(objectives.AttentionKL(mapping=mappings.FromInit()), max_epochs=1).fit(
            Distiller(student, teacher), loader()
        )
    plan = next(r.getMessage() for r in caplog.records if "Distillation plan" in r.getMessage())
    for part in (
        "BertForSequenceClassification", "frozen", "from teacher layers 1 2", "AttentionKL", "1<-1 2<-2",
        "student: attention 1 2", "teacher: attention 1 2; it runs no further than layer 2",
        "are reached by no term", "attention dropout is 0.1",
    ):  # fmt: skip
        assert part in plan


def test_a_dry_run_leaves_no_trace() -> None:
    student, teacher = pair()
    engine = Distillation(student.eval(), teacher, every_kind())
    engine.train()
    student.bert.encoder.eval()
    modes = [m.training for m in engine.modules()]
    state, random = copy.deepcopy(engine.state_dict()), torch.get_rng_state()
    engine.dry_run(tiny.batch())
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in engine.state_dict().items())
    assert all(p.grad is None for p in engine.parameters())
    assert modes == [m.training for m in engine.modules()]


def test_the_plan_does_not_change_the_order_of_the_data() -> None:
    seen: list[list[int]] = []

    class Rows(L.Callback):
        def on_train_batch_start(self, trainer: object, module: object, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
            seen[-1].extend(batch["row_id"].tolist())

    for dry in (True, False):
        seen.append([])
        student, teacher = pair()
        module = Distiller(student, teacher)
        if not dry:
            module.on_train_start = lambda: None  # type: ignore[method-assign]
        torch.manual_seed(1)
        trainer(Rows(), objectives.LogitsKL(), max_epochs=2).fit(module, loader(shuffle=True))
    assert seen[0] == seen[1]


# Checkpoints


def fitted(tmp_path: Path, *terms: Objective) -> tuple[Distiller, Path, L.Trainer]:
    student, teacher = pair()
    module, run = Distiller(student, teacher), trainer(*(terms or every_kind()), max_epochs=1)
    run.fit(module, loader(), loader())
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    return module, path, run


def test_a_checkpoint_holds_student_and_projections_but_no_teacher(tmp_path: Path) -> None:
    module, path, _ = fitted(tmp_path)
    saved = torch.load(path, weights_only=True)
    assert len(saved["state_dict"]) == len(module.student.state_dict())
    assert all(key.startswith("distillation.student.") for key in saved["state_dict"])
    assert sorted(saved["ildistil"]["projections"]) == [
        f"distillation.projections.hidden_mse.{pair}.{part}" for pair in ("1_2", "2_4") for part in ("bias", "weight")
    ]


def test_loading_without_a_trainer_and_testing_under_another(tmp_path: Path) -> None:
    module, path, _ = fitted(tmp_path)
    student, teacher = pair()
    loaded = Distiller.load_from_checkpoint(path, student=student, teacher=teacher)
    for name, value in module.student.state_dict().items():
        assert torch.equal(loaded.student.state_dict()[name], value)
    student, teacher = pair()
    other = trainer()
    other.test(Distiller(student, teacher), loader(), ckpt_path=path, verbose=False, weights_only=True)
    assert "test/accuracy" in other.callback_metrics
    assert all(torch.equal(v, module.student.state_dict()[k]) for k, v in student.state_dict().items())


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None = None) -> Distiller:
        torch.manual_seed(0)
        student, teacher = pair()
        module = Distiller(student, teacher, schedule="constant", warmup=0.0)
        run = trainer(*every_kind(), max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=path, weights_only=True)
        if path is None and epochs == 1:
            run.save_checkpoint(tmp_path / "half.ckpt")
        return module

    run(1)
    resumed, straight = run(2, tmp_path / "half.ckpt"), run(2)
    for (name, value), other in zip(resumed.state_dict().items(), straight.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, msg=name)


def test_resuming_with_other_objectives_names_the_differences(tmp_path: Path) -> None:
    _, path, _ = fitted(tmp_path)

    def terms() -> list[Objective]:
        return [*every_kind()[:2], objectives.LogitsKL(temperature=4.0), objectives.TaskLoss(weight=0.5)]

    named = r"logits_kl: LogitsKL\(weight=0.5\).*temperature=4.0.*\n  steps: 4 in the checkpoint, 8 now"
    module = Distiller(*pair())
    with pytest.raises(CheckpointError, match=named):
        trainer(*terms(), max_epochs=2).fit(module, loader(), ckpt_path=path, weights_only=True)
    module = Distiller(*pair(), accept_changes=True)
    with pytest.warns(UserWarning, match=named):
        trainer(*terms(), max_epochs=2).fit(module, loader(), ckpt_path=path, weights_only=True)
    with pytest.raises(ValueError, match=r"made with other projections.*\['hidden_mse'\], this run \['none'\]"):
        trainer(objectives.LogitsKL()).fit(Distiller(*pair()), loader(), ckpt_path=path, weights_only=True)


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")
def test_an_averaging_callback_before_the_objectives_keeps_the_projections() -> None:
    student, teacher = pair()
    module = Distiller(student, teacher)
    ema = EMAWeightAveraging(decay=0.5)
    before: dict[str, Tensor] = {}

    class Note(L.Callback):
        def on_train_start(self, trainer: object, module: L.LightningModule) -> None:  # type: ignore[override]
            before.update({n: p.detach().clone() for n, p in module.named_parameters() if "projections" in n})

    trainer(ema, Note(), *every_kind()).fit(module, loader())
    assert len(before) == 4
    assert all(not torch.equal(value, dict(module.named_parameters())[name]) for name, value in before.items())


def test_a_saved_student_is_a_plain_transformers_model(tmp_path: Path) -> None:
    module, path, _ = fitted(tmp_path)
    student = load_student(path)
    student.save_pretrained(tmp_path / "student")
    plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.config._attn_implementation == "sdpa"
    inputs = {k: v for k, v in tiny.batch().items() if k not in ("row_id", "labels")}
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, module.student.eval()(**inputs).logits)


def test_after_training_nothing_stays_frozen() -> None:
    student, teacher = pair()
    trainer(objectives.HiddenMSE(), max_epochs=1).fit(Distiller(student, teacher), loader())
    assert all(p.requires_grad for p in student.parameters())


def test_fit_twice_keeps_what_the_projections_learned() -> None:
    student, teacher = pair()
    module, terms = Distiller(student, teacher), every_kind()
    trainer(*terms, max_epochs=1).fit(module, loader())
    first = module.distillation.projections["hidden_mse"]
    trainer(*terms, max_epochs=1).fit(module, loader())
    assert module.distillation.projections["hidden_mse"] is first


# Bad input


class Nan(Objective):
    taps = ("logits",)
    teacher_taps = ()
    steps = 0
    only: int | None = None

    def loss(self, student: Activations, teacher: Activations, batch: Any) -> Tensor:
        self.steps += 1
        bad = self.steps > 4 if self.only is None else self.steps == self.only
        return student.logits.sum() * (float("nan") if bad else 1.0)


def test_a_nan_loss_stops_with_step_term_and_rows() -> None:
    student, teacher = pair()
    with pytest.raises(FloatingPointError, match=r"step 2 \(epoch 0, row ids \[8, 9, 10, 11\]\): nan = nan"):
        trainer(objectives.LogitsKL(), Nan()).fit(Distiller(student, teacher), loader())


@pytest.mark.parametrize("accumulated", [1, 2])
def test_nothing_of_a_nan_step_is_applied(accumulated: int) -> None:
    """Also where a later batch of the same optimiser step is finite."""
    student, teacher = pair()
    seen: list[dict[str, Tensor]] = []

    class Look(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, module: Any, loss: Tensor) -> None:
            seen.append(copy.deepcopy(module.student.state_dict()))

    nan = Nan()
    nan.only = 5  # the third batch's, after the two dry runs
    run = trainer(objectives.LogitsKL(), nan, Look(), accumulate_grad_batches=accumulated)
    with pytest.raises(FloatingPointError, match=rf"step {2 // accumulated} \(epoch 0, row ids \[8, 9, 10, 11\]\)"):
        run.fit(Distiller(student, teacher), loader())
    assert len(seen) == 2 + accumulated
    assert all(torch.equal(value, seen[2][name]) for name, value in student.state_dict().items())


# The optimiser


class Optimizer(L.Callback):
    """Whether it is fused, and the greatest norm of a gradient when it steps."""

    norm, fused = 0.0, None

    def on_before_zero_grad(self, trainer: L.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.norm = max(self.norm, float(torch.nn.utils.get_total_norm(gradients)))
        self.fused = optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clipping_works_whatever_the_optimiser(precision: Any) -> None:
    """Lightning refuses to clip what a fused optimiser offers to unscale."""
    look = Optimizer()
    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]}
    run = trainer(*every_kind(), look, gradient_clip_val=0.01, accumulate_grad_batches=2, **options)
    run.fit(Distiller(*pair()), loader())
    assert look.fused
    assert 0 < look.norm <= 0.0101


@pytest.mark.parametrize("scaled", [False, True])
def test_the_fused_optimiser_takes_the_steps_of_the_plain_one(scaled: bool) -> None:
    """In float32 and scaled float16, with gradients accumulated and clipped, over a boundary of stages."""

    class Plain(Distiller):
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            for group in made["optimizer"].param_groups:
                group["fused"] = False
            return made

    stages = [Stage(["hidden_mse"], 1), Stage(["logits_kl"], 1)]
    students = []
    for kind in (Distiller, Plain):
        student, teacher = pair()
        scaler = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))] if scaled else []
        terms = [objectives.HiddenMSE(), objectives.LogitsKL()]
        run = trainer(*terms, plugins=scaler, gradient_clip_val=0.5, accumulate_grad_batches=2)
        run.fit(kind(student, teacher, stages=stages, learning_rate=1e-3), loader())
        students.append(student.state_dict())
    for name, value in students[0].items():
        if not name.endswith("key.bias"):  # the same for all keys of a query: its gradient is rounding alone
            torch.testing.assert_close(value, students[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("student", "teacher", "terms", "message"),
    [
        ({}, {}, [], "There is no objective"),
        ({}, {}, [objectives.HiddenMSE(), objectives.HiddenMSE()], "Two objectives are named 'hidden_mse'"),
        ({}, {}, [objectives.LogitsKL(weight=0)], "All objectives have weight 0"),
        ({}, {}, [objectives.LogitsKL(name="a.b")], "can't be named 'a.b'"),
        ({}, {}, [objectives.HiddenMSE(mapping=mappings.Explicit([[1, 9]]))], "teacher layer 9 is out of range"),
        ({"heads": 8}, {}, [objectives.AttentionKL()], "student has 8 heads, the teacher 4.*HiddenMSE"),
        ({"labels": 2}, {}, [objectives.LogitsKL()], "student has 2 labels, the teacher 3"),
        ({"labels": 1}, {"labels": 1}, [objectives.LogitsKL()], "a regression has none. Use LogitsMSE"),
        ({"width": 16}, {}, [objectives.HiddenMSE(projection="never")], "student's width is 16, the teacher's 32"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_the_objectives(
    student: dict[str, int], teacher: dict[str, int], terms: list[Objective], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(*terms).fit(Distiller(tiny.bert(2, **student), tiny.bert(4, **teacher)), loader())


def test_two_objectives_of_a_class_coexist_under_two_names() -> None:
    student, teacher = pair()
    terms = [
        objectives.HiddenMSE(mapping=mappings.Last()),
        objectives.HiddenMSE(mapping=mappings.First(1), name="first"),
    ]
    run = trainer(*terms, max_epochs=1)
    run.fit(Distiller(student, teacher), loader())
    assert {"train/hidden_mse", "train/first"} <= run.callback_metrics.keys()


def test_vocabularies_and_lengths_must_fit() -> None:
    teacher = tiny.bert(4)
    other = AutoModelForSequenceClassification.from_config(copy.deepcopy(teacher.config))
    other.config.vocab_size = 51
    with pytest.raises(ValueError, match="vocabulary has 51 entries, the teacher's 50"):
        Distillation(other, teacher)
    with pytest.raises(ValueError, match="40 tokens is longer than the models' 32 positions"):
        Distillation(tiny.bert(2), teacher, [objectives.LogitsKL()])(tiny.batch((40,)))


def test_a_student_that_is_the_teacher_is_refused() -> None:
    teacher = tiny.bert(2)
    with pytest.raises(ValueError, match="share parameters"):
        Distillation(teacher, teacher)


def test_a_term_that_reaches_nothing_is_refused() -> None:
    student, teacher = pair()
    student.requires_grad_(False)
    with pytest.raises(ObjectiveError, match="logits_kl reaches no trainable parameter. Is the student frozen"):
        trainer(objectives.LogitsKL()).fit(Distiller(student, teacher), loader())


def test_a_teacher_that_gives_nan_is_found_in_the_dry_run() -> None:
    student, teacher = pair()
    with torch.no_grad():
        teacher.classifier.weight.fill_(float("nan"))
    with pytest.raises(ObjectiveError, match="value of the term logits_kl is nan in the dry run"):
        trainer(objectives.LogitsKL()).fit(Distiller(student, teacher), loader())


def test_an_objective_without_its_teacher_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"logits_kl \(LogitsKL\) needs a teacher"):
        trainer(objectives.LogitsKL()).fit(Distiller(tiny.bert(2)), loader())


@pytest.mark.parametrize(
    "options", [{"learning_rate": 0.0}, {"warmup": 1.0}, {"weight_decay": -1.0}, {"schedule": "step"}]
)
def test_bad_optimiser_settings_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Distiller(tiny.bert(2), **options)


def test_plain_ddp_trains_what_some_terms_do_not_reach(tmp_path: Path) -> None:
    """Two gloo ranks, no 'unused parameters' setting, and in each stage parameters that no term reaches."""
    import subprocess
    import sys

    script = Path(__file__).with_name("ddp_fit.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(torch.equal(value, ranks[1]["student"][name]) for name, value in ranks[0]["student"].items())
    heads = ranks[0]["heads"]
    start = init_student(tiny.bert(4), layers=[1, 2]).classifier.weight
    assert torch.equal(heads[0][0], start)  # nothing but weight decay could have moved it in the first stage
    assert not torch.equal(heads[2][0], start)
    assert all(torch.equal(first, last) for first, last in zip(heads[0][1:], heads[2][1:], strict=True))
    check_shared_targets(ranks, tmp_path / "targets")


def check_shared_targets(ranks: list[dict[str, Any]], folder: Path) -> None:
    """One process stores all rows before the training, in which both read them."""
    assert [found["runs"] for found in ranks] == [
        1 + 2 + 4 + 4,
        0,
    ]  # for the layout, is padding read, four batches, four trials
    assert len(list(folder.glob("shard-*"))) == 1
    assert len(StoredTeacher(folder).store) == 16
    for name, value in ranks[0]["live"].items():
        for found in ranks:
            torch.testing.assert_close(found["stored"][name], value, rtol=1e-4, atol=1e-6)
