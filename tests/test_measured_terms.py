"""Sets without labels of a task, or of a student whose head no term trains, are measured by the terms."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
)

import tiny
from ildistil import Distiller, Stage, init_student, mappings, objectives, schedules
from ildistil.data import TextData
from ildistil.errors import CaptureError, CheckpointError, ConfigError, DataError, ModelError, ObjectiveError
from ildistil.objectives import Objective
from ildistil.students import load
from ildistil.teachers import StoredTeacher
from ildistil.training import export
from test_distiller import pair, trainer

LENGTHS = (7, 3, 5, 2, 9, 4, 6)


class Texts(L.LightningDataModule):
    """Rows without labels of a task: none at all, or those of tokens."""

    labelled = False
    primary_metric = "loss"
    head: str | None = None

    def __init__(self, size: int = 3, *, masked: bool = False, labelled: bool = False) -> None:
        super().__init__()
        batch = tiny.batch(LENGTHS)
        if masked:
            generator = torch.Generator().manual_seed(3)
            chosen = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.4) & (batch["attention_mask"] == 1)
            batch["labels"] = torch.where(chosen, batch["input_ids"], -100)
        elif not labelled:
            del batch["labels"]
        self.labelled = labelled
        self.rows = [{k: v[i] for k, v in batch.items()} for i in range(len(LENGTHS))]
        self.size = size

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, self.size)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


def masked_lm(layers: int = 2, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=32, initializer_range=0.3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertForMaskedLM(config)


def validated(module: Distiller, data: L.LightningDataModule, *terms: Objective, **options: Any) -> dict[str, float]:
    run = trainer(*terms, **options)
    run.validate(module, data, verbose=False)
    return {key: float(value) for key, value in run.callback_metrics.items()}


@torch.no_grad()
def hidden_by_hand(student: PreTrainedModel, teacher: PreTrainedModel, rows: list[dict[str, Tensor]]) -> float:
    """The squared distance of the last states, row by row, token by token, in float64."""
    models = [copy.deepcopy(m).double().eval() for m in (student, teacher)]
    values = []
    for row in rows:
        inputs = {k: row[k][None] for k in ("input_ids", "attention_mask", "position_ids")}
        s, t = (m(**inputs, output_hidden_states=True).hidden_states[-1][0] for m in models)
        real = [i for i, m in enumerate(row["attention_mask"].tolist()) if m]
        values.append(sum(float(((s[i] - t[i]) ** 2).mean()) for i in real) / len(real))
    return sum(values) / len(values)


def last(**options: Any) -> Objective:
    return objectives.HiddenMSE(mapping=mappings.Last(), projection="never", **options)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_terms_are_means_over_all_rows_of_a_set_without_labels(size: int) -> None:
    student, teacher = pair()
    data = Texts(size)
    found = validated(Distiller(student, teacher), data, last(weight=3.0))
    assert found.keys() == {"val/loss", "val/hidden_mse"}
    expected = hidden_by_hand(student, teacher, data.rows)
    assert found["val/hidden_mse"] == pytest.approx(expected, rel=1e-5)
    assert found["val/loss"] == pytest.approx(3 * expected, rel=1e-5)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("terms", [["task"], ["logits"], ["logits", "task"]])
def test_perplexity_and_accuracy_of_masked_tokens(size: int, terms: list[str]) -> None:
    student, teacher = masked_lm(2, 1), masked_lm(4, 2)
    data = Texts(size, masked=True)
    given = {"task": objectives.TaskLoss(name="task"), "logits": objectives.LogitsKL(name="logits")}
    found = validated(Distiller(student, teacher), data, *(given[name] for name in terms))
    model, values, hits = copy.deepcopy(student).double().eval(), [], []
    with torch.no_grad():
        for row in data.rows:
            inputs = {k: row[k][None] for k in ("input_ids", "attention_mask", "position_ids")}
            for logits, label in zip(model(**inputs).logits[0], row["labels"].tolist(), strict=True):
                if label != -100:
                    values.append(-float(logits.log_softmax(-1)[label]))
                    hits.append(int(logits.argmax()) == label)
    assert found.keys() == {"val/loss", "val/perplexity", "val/accuracy", *(f"val/{name}" for name in terms)}
    assert found["val/perplexity"] == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-4)
    assert found["val/accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1e-6)
    if "task" in terms:
        assert found["val/task"] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_tokens_are_not_measured_where_no_term_reads_logits() -> None:
    found = validated(Distiller(masked_lm(2, 1), masked_lm(4, 2)), Texts(masked=True), last())
    assert found.keys() == {"val/loss", "val/hidden_mse"}


def test_labels_of_a_task_whose_head_no_term_trains() -> None:
    student, teacher = pair()
    data = Texts(labelled=True)
    found = validated(Distiller(student, teacher), data, last())
    assert found.keys() == {"val/loss", "val/hidden_mse", "val/accuracy"}
    assert found["val/loss"] == found["val/hidden_mse"] == pytest.approx(hidden_by_hand(student, teacher, data.rows))
    with_head = validated(Distiller(*pair()), data, last(), objectives.TaskLoss())
    assert with_head.keys() == {"val/loss", "val/accuracy"}
    assert with_head["val/accuracy"] == found["val/accuracy"]


def test_a_training_measures_the_terms_of_its_stage_with_the_weights_at_its_end() -> None:
    student, teacher = pair()
    seen: list[dict[str, float]] = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})
            assert all(m.training is False for m in module.student.modules())  # type: ignore[union-attr]

    terms = [last(), objectives.AttentionKL(weight=schedules.Linear(0.0, 2.0), mapping=mappings.Last())]
    stages = [Stage(["hidden_mse"], epochs=1), Stage(["hidden_mse", "attention_kl"], epochs=1)]
    trainer(*terms, Watch(), num_sanity_val_steps=0).fit(Distiller(student, teacher, stages=stages), Texts())
    assert [set(each) - {"val/loss"} for each in seen] == [
        {"val/hidden_mse"},
        {"val/hidden_mse", "val/attention_kl"},
    ]
    assert seen[0]["val/loss"] == seen[0]["val/hidden_mse"]
    assert seen[1]["val/loss"] == pytest.approx(seen[1]["val/hidden_mse"] + 2 * seen[1]["val/attention_kl"], rel=1e-5)


def test_measuring_changes_nothing_of_the_training() -> None:
    def trained(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        teacher = tiny.bert(4)
        student = init_student(teacher, layers=[1, 2], config={"hidden_dropout_prob": 0.1})
        terms = [last(), objectives.CLSContrast(negatives=4)]
        trainer(*terms, **options).fit(Distiller(student, teacher), Texts(labelled=True))
        return list(student.parameters())

    pairs = zip(trained(limit_val_batches=0), trained(val_check_interval=1), strict=True)
    assert all(torch.equal(*each) for each in pairs)


def test_a_set_without_labels_and_a_training_without_terms() -> None:
    with pytest.raises(DataError, match="no labels of a task, and there are no objectives"):
        validated(Distiller(*pair()), Texts())


def test_an_objective_named_like_a_metric() -> None:
    with pytest.raises(ConfigError, match="has the name of a metric, 'accuracy'"):
        validated(Distiller(*pair()), Texts(labelled=True), last(name="accuracy"))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_the_projections_of_a_checkpoint_are_measured(tmp_path: Path) -> None:
    student, teacher = pair()
    term = objectives.HiddenMSE(mapping=mappings.Last(), projection="always")
    keep = ModelCheckpoint(tmp_path / "kept here", "best", monitor="val/loss")
    run = trainer(term, keep, enable_checkpointing=True)
    run.fit(Distiller(student, teacher), Texts())
    best = float(keep.best_model_score or 0)
    again = trainer(objectives.HiddenMSE(mapping=mappings.Last(), projection="always"))
    again.validate(
        Distiller(*pair()), Texts(), str(tmp_path / "kept here" / "best.ckpt"), verbose=False, weights_only=True
    )
    assert float(again.callback_metrics["val/loss"]) == pytest.approx(best, rel=1e-6)
    with pytest.raises(CheckpointError, match="made with other projections"):
        trainer(last()).validate(
            Distiller(*pair()), Texts(), str(tmp_path / "kept here" / "best.ckpt"), weights_only=True
        )


def test_an_untrained_head_is_not_exported(tmp_path: Path) -> None:
    tiny.save_teacher(tmp_path / "teacher", layers=4)
    student, teacher = pair()
    keep = ModelCheckpoint(tmp_path / "kept here", "best", monitor="val/loss")
    module = Distiller(student, teacher, tokenizer=str(tmp_path / "teacher"))
    trainer(last(), keep, enable_checkpointing=True).fit(module, Texts(labelled=True))
    export(str(tmp_path / "kept here" / "best.ckpt"), str(tmp_path / "encoder"))
    card = (tmp_path / "encoder" / "README.md").read_text()
    assert "It has no head: fine-tune it" in card
    model, info = AutoModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    best = torch.load(tmp_path / "kept here" / "best.ckpt", weights_only=True)["state_dict"]
    prefix = "distillation.student.bert."
    assert all(torch.equal(value, best[prefix + name]) for name, value in model.state_dict().items())
    export(str(tmp_path / "kept here" / "best.ckpt"), str(tmp_path / "kept"), keep_head=True)
    assert "Its head was trained by no objective" in (tmp_path / "kept" / "README.md").read_text()
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "kept")


def test_texts_without_a_column_of_labels(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\n" + "\n".join(f"w{i} w{i + 1}" for i in range(9)), encoding="utf-8")
    tiny.save_teacher(tmp_path / "teacher", layers=4)
    file = str(tmp_path / "texts.csv")
    data = TextData(
        file, file, label_column=None, tokenizer=str(tmp_path / "teacher"), cache_dir=str(tmp_path), max_length=16
    )
    assert (data.num_labels, data.label_names, data.metrics(), data.primary_metric) == (None, None, None, "loss")
    run = trainer(last())
    run.fit(Distiller(*pair()), data)
    assert run.callback_metrics["val/loss"] == run.callback_metrics["val/hidden_mse"]
    assert "labels" not in next(iter(data.train_dataloader()))


def test_stored_targets_are_those_of_validation_rows_too(tmp_path: Path) -> None:
    class Split(Texts):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.rows[:4], 2)  # type: ignore[arg-type]

    student, teacher = pair()
    data, stored = Split(), StoredTeacher(tmp_path, teacher, dtype="float32")
    run = trainer(last())
    run.fit(Distiller(student, stored), data)
    assert len(stored.store) == len(LENGTHS)
    found = hidden_by_hand(student, teacher, data.rows)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("headless", ["student", "teacher"])
def test_soft_labels_of_tokens_need_both_heads(headless: str) -> None:
    student, teacher = masked_lm(2), masked_lm(4)
    models = (student.bert, teacher) if headless == "student" else (student, teacher.bert)
    with pytest.raises(
        ObjectiveError, match=f"reads logits, and the {headless}, a BertModel, has no head.*ildistil finetune"
    ):
        trainer(objectives.LogitsKL()).fit(Distiller(*models), Texts(masked=True))


def test_labels_of_tokens_at_other_positions_are_refused() -> None:
    """A decoder taken from an encoder-decoder doesn't shift its labels."""
    size = {"vocab_size": tiny.VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 2}
    bart = BartConfig(d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=16, **size)
    data = Texts(masked=True)
    data.head = "causal-lm"
    for row in data.rows:
        row["labels"] = torch.where(row["attention_mask"] == 1, row["input_ids"], -100)
    with pytest.raises(DataError, match="it would learn to copy"):
        trainer(objectives.TaskLoss(), num_sanity_val_steps=0).fit(Distiller(BartForCausalLM(bart)), data)


def test_a_student_without_a_head_is_measured_by_the_terms_alone() -> None:
    student, teacher = masked_lm(2, 1).bert, masked_lm(4, 2).bert
    data = Texts(labelled=True)
    found = validated(Distiller(student, teacher), data, last())
    assert found.keys() == {"val/loss", "val/hidden_mse"}
    assert found["val/loss"] == pytest.approx(hidden_by_hand(student, teacher, data.rows))
    data.labelled = None  # type: ignore[assignment]
    assert validated(Distiller(student, teacher), data, last()) == found
    with pytest.raises(ModelError, match="has no head that predicts"):
        trainer().predict(Distiller(student, teacher), DataLoader(data.rows, batch_size=3))  # type: ignore[arg-type]


def test_labels_for_another_head_than_the_students() -> None:
    data = Texts(masked=True)
    data.head = "causal-lm"
    for term in (objectives.TaskLoss(), objectives.LogitsKL()):
        with pytest.raises(DataError, match="causal-lm head, and the student, a BertForMaskedLM, has a masked-lm"):
            trainer(term).fit(Distiller(masked_lm(2), masked_lm(4)), data)
    trainer(last()).fit(Distiller(masked_lm(2), masked_lm(4)), data)  # no term reads them


def test_a_loss_of_labels_that_are_not_there() -> None:
    with pytest.raises(CaptureError, match="labels: masked or next of a Corpus.*leave out the term"):
        trainer(objectives.TaskLoss()).fit(Distiller(*pair()), Texts())


def test_an_encoder_whose_tokens_see_the_next_ones_gets_no_causal_head(tmp_path: Path) -> None:
    masked_lm().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder: each of its tokens sees the next one.*is_decoder: true"):
        load(str(tmp_path), "causal-lm")
    model = load(str(tmp_path), "causal-lm", config={"is_decoder": True}).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    logits = model(input_ids=ids).logits
    assert torch.equal(logits[0, :3], logits[1, :3])


def test_a_tokenizer_with_more_tokens_than_the_models(tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text("text\nw1 w2\nw3\n", encoding="utf-8")
    tiny.save_teacher(tmp_path / "teacher", layers=4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    tokenizer.add_tokens(["added", *(f"added{i}" for i in range(tiny.VOCABULARY - len(tokenizer)))])
    file = str(tmp_path / "texts.csv")
    data = TextData(file, file, label_column=None, tokenizer=tokenizer, cache_dir=str(tmp_path), max_length=16)
    with pytest.raises(DataError, match=f"up to number {tiny.VOCABULARY} .*the models know {tiny.VOCABULARY}, from 0"):
        trainer(last()).fit(Distiller(*pair()), data)
