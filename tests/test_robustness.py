"""Uses that are unlike the usual ones, and misuse: each once failed, or failed without a word."""

import copy
import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import tiny
from ildistil import Distillation, Distiller, cli, init_student, mappings, objectives
from ildistil.capture import Capture, Tap
from ildistil.engine.synthetic import synthetic_batch
from ildistil.errors import CaptureError, DataError, ModelRunError, ObjectiveError
from ildistil.objectives import Objective
from ildistil.stages import Step
from test_distiller import loader, pair, trainer

# Streams and samplers


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(loader(rows=8).dataset)  # type: ignore[call-overload]


def test_a_stream_trains_without_losing_a_batch() -> None:
    student, teacher = pair()
    seen: list[int] = []

    class Watch(objectives.LogitsKL):
        def loss(self, student: Any, teacher: Any, batch: Any) -> Any:
            seen.extend(batch["row_id"].tolist() if self.counting else [])
            return super().loss(student, teacher, batch)

        counting = False

        def on_train_batch_start(self, *args: Any) -> None:
            self.counting = True

    run = trainer(Watch(), max_epochs=1, max_steps=2)
    run.fit(Distiller(student, teacher), DataLoader(Stream(), batch_size=4))
    assert seen == list(range(8))


def test_the_dry_run_draws_from_no_random_state() -> None:
    class Random(Dataset[Any]):
        rows = loader().dataset

        def __len__(self) -> int:
            return 16

        def __getitem__(self, row: int) -> Any:
            random.random()
            return self.rows[row]

    order: list[list[int]] = []
    for dry in (True, False):
        student, teacher = pair()
        module = Distiller(student, teacher)
        if not dry:
            module.on_train_start = lambda: None  # type: ignore[method-assign]
        random.seed(3)
        shuffled = DataLoader(Random(), 4, shuffle=True, generator=torch.Generator().manual_seed(5))
        rows: list[int] = []

        class Note(objectives.LogitsKL):
            def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
                rows.extend(batch["row_id"].tolist())  # noqa: B023

        trainer(Note(), max_epochs=1).fit(module, shuffled)
        order.append([*rows, random.random()])
    assert order[0] == order[1]


# Models of other kinds


def test_problem_type_is_left_to_the_real_labels() -> None:
    teacher = tiny.bert(4)
    teacher.config.problem_type = None
    student = init_student(teacher, layers=[1, 2])
    data = loader()
    for row in data.dataset:  # type: ignore[attr-defined]
        row["labels"] = torch.eye(3)[row["labels"]]
    trainer(objectives.TaskLoss(), objectives.HiddenMSE(), max_epochs=1).fit(Distiller(student, teacher), data)
    assert student.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize("head", ["BertForTokenClassification", "BertForQuestionAnswering", "BertForMultipleChoice"])
def test_heads_with_labels_of_their_own_kind_get_no_made_up_batch(head: str) -> None:
    model = getattr(tf, head)(tiny.bert(2).config)
    assert Distillation(model, tiny.bert(4)).synthetic_batch() is None


@pytest.mark.parametrize("head", ["BartModel", "BartForConditionalGeneration", "BartForSequenceClassification"])
def test_encoder_decoders_get_a_made_up_batch(head: str) -> None:
    config = tf.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = getattr(tf, head)(config)
    batch = synthetic_batch(model)
    seen = Capture(model, {Tap("attention", 1, stack) for stack in ("encoder", "decoder", "cross")})(batch, verify=True)
    for stack in ("encoder", "decoder"):
        mask = seen.stack(stack).mask
        assert mask[0].all()
        assert not mask[1].all()
        assert mask[1].any()


def test_a_causal_classifier_without_padding_token_trains_on_single_rows() -> None:
    config = tf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, num_labels=3, bos_token_id=0, eos_token_id=0)
    teacher = tf.GPT2ForSequenceClassification(config)
    rows = [{k: v for k, v in row.items() if k != "position_ids"} for row in loader(rows=4).dataset]  # type: ignore[attr-defined]
    student = init_student(teacher, layers=[1])
    trainer(objectives.AttentionKL(), max_epochs=1).fit(Distiller(student, teacher), DataLoader(rows, 1))


def test_labels_may_come_first_in_a_batch() -> None:
    batch = tiny.batch()
    del batch["attention_mask"], batch["position_ids"]
    batch = {"labels": batch["labels"], "input_ids": batch["input_ids"]}
    assert Distillation(tiny.bert(2), tiny.bert(4), [objectives.LogitsKL()])(batch).total > 0


def test_a_plain_transformer_with_padding() -> None:
    def plain(depth: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    engine, states = Distillation(plain(2), plain(4), [objectives.HiddenMSE()]), torch.randn(2, 5, 16)
    unpadded = engine({"src": states}).total
    padded = torch.cat([states, torch.randn(2, 3, 16)], 1)
    mask = torch.arange(8).expand(2, 8) >= 5
    assert engine({"src": padded, "src_key_padding_mask": mask}).total.item() == pytest.approx(
        unpadded.item(), rel=1e-5
    )
    with pytest.raises(CaptureError, match="marks padding by 'my_padding_mask', which is not understood"):
        engine({"src": padded, "my_padding_mask": mask})


def test_a_config_that_is_not_transformers() -> None:
    class Own(nn.Module):
        config = {"layers": 3}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.linear(x)
            return logits

    assert Distillation(Own(), Own(), [objectives.LogitsKL()])({"x": torch.randn(2, 4)}).total > 0


# Several engines, several fits


def test_a_failed_fit_leaves_nothing_frozen() -> None:
    student, teacher = pair()
    module = Distiller(student, teacher)

    class Fail(objectives.HiddenMSE):
        def on_train_batch_start(self, *args: Any) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        trainer(Fail()).fit(module, loader())
    assert all(p.requires_grad for p in student.parameters())
    assert student.config._attn_implementation == "sdpa"


def test_after_a_fit_the_models_are_as_they_were(tmp_path: Path) -> None:
    student, teacher = pair()
    module = Distiller(student, teacher)
    terms: list[Objective] = [objectives.AttentionKL(), objectives.HiddenMSE()]
    for _ in range(2):
        trainer(*terms, max_epochs=1).fit(module, loader())
        for model in (student, teacher):
            assert model.config._attn_implementation == "sdpa"
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_engines_share_a_teacher() -> None:
    teacher = tiny.bert(4)
    first, second = (Distillation(tiny.bert(2, seed=i), teacher, [objectives.AttentionKL()]) for i in (1, 2))
    first.release()
    assert second(tiny.batch()).total > 0
    second.release()
    assert teacher.config._attn_implementation == "sdpa"


def test_a_refused_pair_of_models_is_refused_again() -> None:
    small = {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64}
    teacher = tf.XLNetForSequenceClassification(tf.XLNetConfig(**small, vocab_size=50, num_labels=3))
    student, terms = tiny.bert(2, labels=3), [objectives.AttentionKL()]
    engine = Distillation(student, teacher)
    for _ in range(2):
        with pytest.raises(CaptureError, match="The attention of the teacher XLNetForSequenceClassification can't"):
            engine.set_objectives(terms)
    assert student.config._attn_implementation == "sdpa"


def test_an_objective_belongs_to_one_pair_of_models() -> None:
    shared = objectives.HiddenMSE(projection="always")
    first = Distillation(tiny.bert(2), tiny.bert(4), [shared])
    with pytest.raises(ObjectiveError, match="in use by another pair of models"):
        Distillation(tiny.bert(2), tiny.bert(4), [shared])
    del first
    gc.collect()
    Distillation(tiny.bert(2), tiny.bert(4), [shared])


def test_metrics_are_those_of_the_data_at_hand() -> None:
    student, teacher = pair()
    module, run = Distiller(student, teacher), trainer(objectives.LogitsKL(), max_epochs=1)
    run.fit(module, loader(), [loader(), loader()])
    assert {"val/accuracy", "val_1/accuracy"} <= run.callback_metrics.keys()


# Misuse


def test_learnable_parts_outside_projections_are_refused() -> None:
    class Forgotten(objectives.LogitsMSE):
        def build(self, student: Any, teacher: Any) -> None:
            self.map = nn.Linear(3, 3)

    with pytest.raises(ObjectiveError, match=r"keeps learnable parts in \['map'\].*self.projections"):
        Distillation(tiny.bert(2), tiny.bert(4), [Forgotten()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distillation(tiny.bert(2), tiny.bert(4), objectives.LogitsKL()), "Objectives come in a list"),
        (lambda: Distillation(tiny.bert(2), tiny.bert(4), [nn.MSELoss()]), "is not an objective"),  # type: ignore[list-item]
        (lambda: objectives.HiddenMSE(mapping="Uniform"), "mapping must be a LayerMapping"),  # type: ignore[arg-type]
        (lambda: objectives.HiddenMSE(mappings.Uniform()), "weight must be a finite number"),  # type: ignore[arg-type]
        (lambda: Distillation(tiny.bert(2), tiny.bert(4), [objectives.LogitsKL(name="values")]), "is no method of a"),
        (
            lambda: Distillation(tiny.bert(2), tiny.bert(4), [objectives.LogitsKL()])([1, 2]),
            "A batch must be a mapping",
        ),
    ],
)
def test_misuse_has_a_remedy(make: Any, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        make()


def test_labels_in_another_order_are_refused() -> None:
    student, teacher = tiny.bert(2), tiny.bert(4)
    names = ["a", "b", "c"]
    teacher.config.id2label, student.config.id2label = dict(enumerate(names)), dict(enumerate(reversed(names)))
    with pytest.raises(ValueError, match=r"student numbers its labels \['c', 'b', 'a'\], the teacher"):
        Distillation(student, teacher)


def test_the_first_step_checks_the_masks() -> None:
    student = tiny.bert(2, is_decoder=True)
    for layer in student.bert.encoder.layer:
        layer.attention.self.is_causal = False
    with pytest.raises(CaptureError, match="a mask that is not its padding mask"):
        Distillation(student, tiny.bert(4), [objectives.AttentionKL()])(tiny.batch())


def test_a_teacher_switched_to_train_mode_is_switched_back() -> None:
    teacher = tiny.bert(4)
    engine = Distillation(tiny.bert(2), teacher, [objectives.LogitsKL()])
    teacher.train()
    engine(tiny.batch())
    assert not teacher.training


def test_a_projected_hidden_state_by_hand() -> None:
    student, teacher = tiny.bert(2, width=16).double(), tiny.bert(4).double()
    objective = objectives.HiddenMSE(mapping=mappings.Last())
    engine = Distillation(copy.deepcopy(student), copy.deepcopy(teacher), [objective])
    batch = tiny.batch()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
    s, t = (m(**inputs, output_hidden_states=True).hidden_states[-1] for m in (student, teacher))
    linear, expected = objective.projections["2_4"], 0.0
    assert isinstance(linear, nn.Linear)
    for b, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for i in range(length):
            error = (linear.weight @ s[b, i] + linear.bias - t[b, i]).detach()
            expected += float(error @ error) / (3 * length * 32)
    assert engine(batch).total.item() == pytest.approx(expected, rel=1e-10)


def test_predicting_two_sets_writes_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(Path("teacher"), layers=2, labels=3)
    Path("glue/mnli").mkdir(parents=True)
    lines = ["premise\thypothesis\tlabel", *(f"good film\tfilm is {w}\t{i % 3}" for i, w in enumerate(tiny.WORDS))]
    for split in ("train", "validation_matched", "validation_mismatched"):
        Path(f"glue/mnli/{split}.tsv").write_text("\n".join(lines) + "\n")
    cli.main([
        "predict", "--model.teacher.class_path=pretrained", "--model.teacher.init_args.path=./teacher",
        "--model.student.layers=[1]", "--data=Glue", "--data.task=mnli", "--data.path=glue", "--data.cache_dir=cache",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--untrained=true",
    ])  # fmt: skip
    written = sorted(p.name for p in Path("runs/predict").rglob("*.tsv"))
    assert written == ["predictions_val.tsv", "predictions_val_mismatched.tsv"]


# What is whose fault


class Buggy(Objective):
    """Has a bug, which is its author's to see."""

    taps = ("logits",)

    def loss(self, student: Any, teacher: Any, batch: Any) -> Any:
        return student.logits.sum() + batch["no such key"]


def test_a_bug_in_an_objective_is_no_refusal() -> None:
    with pytest.raises(KeyError, match="no such key"):
        trainer(Buggy()).fit(Distiller(*pair()), loader())


def test_a_model_that_fails_is_named_with_its_batch() -> None:
    engine = Distillation(*pair(), [objectives.LogitsKL()])
    batch = tiny.batch()
    batch["input_ids"][0, 0] = 10**6
    with pytest.raises(ModelRunError, match=r"The teacher BertFor\w+ failed on a batch of .*\(3, 7\).*: IndexError: "):
        engine(batch)
    assert engine(tiny.batch()).total.isfinite()  # nothing of the failed run is left


def test_an_objective_reads_no_more_than_it_says() -> None:
    class Twice(objectives.HiddenMSE):
        def pair_loss(self, pair: Any, student: Any, teacher: Any) -> Any:
            teacher.hidden.take(pair[1])
            return super().pair_loss(pair, student, teacher)

    with pytest.raises(CaptureError, match=r"hidden\[2\] is read more often than the objectives' reads\(\) name it"):
        Distillation(*pair(), [Twice()])(tiny.batch())


def test_a_count_without_a_unit_is_refused() -> None:
    class Plain(objectives.LogitsKL):
        def count(self, student: Any, batch: Any) -> Any:
            return student.mask.sum()

    with pytest.raises(ObjectiveError, match=r"count\(\) of plain must return a Count, .*; got a Tensor"):
        Distillation(*pair(), [Plain()])(tiny.batch())


def test_a_step_begins_once_for_a_batch() -> None:
    begun: list[int | None] = []

    class Watch(objectives.LogitsKL):
        def begin(self, step: Step) -> None:
            begun.append(step.number)

    run = trainer(Watch(), max_epochs=1)
    run.fit(Distiller(*pair()), loader(rows=8))
    steps = run.global_step
    assert begun[-steps:] == list(range(steps))
    assert begun[:-steps] == [0, 0]  # the dry runs


def test_the_label_of_a_row_of_padding_does_not_count() -> None:
    engine = Distillation(*pair(), [objectives.TaskLoss(), objectives.LogitsKL(weight=0.5)])
    batch = tiny.batch((7, 4, 6, 2))
    whole = engine({k: v[:3] for k, v in batch.items()})
    batch["attention_mask"][3] = 0
    padded = engine(batch)
    torch.testing.assert_close(padded.total, whole.total)
    assert int(padded.counts["task_loss"].number) == 3


def test_the_number_of_a_row_of_padding_is_refused() -> None:
    engine = Distillation(tiny.bert(2, labels=1), None, [objectives.TaskLoss()])
    batch = tiny.batch((7, 4, 6), labels=1)
    batch["attention_mask"][1] = 0
    with pytest.raises(DataError, match="Row 1 of a batch has no token and the label .*Leave rows of padding out"):
        engine.dry_run(batch)


def test_a_data_set_of_batches() -> None:
    batches = [dict(tiny.batch(seed=seed)) for seed in range(3)]
    run = trainer(objectives.TaskLoss(), objectives.LogitsKL(), max_epochs=1)
    run.fit(Distiller(*pair()), DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    assert run.global_step == 3


def test_a_loss_that_is_no_tensor_is_refused() -> None:
    class Number(objectives.LogitsKL):
        def loss(self, student: Any, teacher: Any, batch: Any) -> Any:
            return 1.0

    with pytest.raises(ObjectiveError, match="The loss of number must be a scalar, got a float"):
        Distillation(*pair(), [Number()])(tiny.batch())
