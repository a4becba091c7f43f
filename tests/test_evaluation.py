"""What is measured is of all rows, whatever the batches and processes; what is wrong with it is said in words."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

import tiny
from ddp_numbers import SETS, Rows, balanced, measured, measured_terms, rows, without_labels
from ildistil import Distiller, objectives
from ildistil.errors import DataError, NotFiniteError
from test_distiller import loader, trainer
from test_finite import same


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ddp_numbers.py")
    result = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@torch.no_grad()
def by_hand(name: str) -> float:
    """The loss of every label or target token by itself, in float64."""
    model = SETS[name][0]().double().eval()
    values: list[float] = []
    for row in SETS[name][1]():
        inputs = {k: row[k][None] for k in ("input_ids", "attention_mask", "position_ids")}
        logits, label = model(**inputs).logits[0], row["labels"]
        if name == "regression":
            values.append(float((logits[0] - label) ** 2))
        elif name == "next tokens":
            pairs = zip(logits[:-1], label[1:], strict=True)
            values += [float(-z.log_softmax(-1)[y]) for z, y in pairs if y != -100]
        elif label != -100:
            values.append(float(-logits.log_softmax(-1)[label]))
    return sum(values) / len(values)


@pytest.mark.parametrize("name", SETS)
def test_the_loss_is_the_mean_over_all_rows_or_tokens(name: str, ranks: list[dict[str, Any]]) -> None:
    one, expected = measured(name, shared=False), by_hand(name)
    assert one["val/loss"] == pytest.approx(expected, rel=1e-5)
    for rank in ranks:
        assert rank[name].keys() == one.keys()
        for key, value in rank[name].items():
            assert value == pytest.approx(one[key], rel=1e-5), key


def test_terms_are_means_over_the_rows_of_all_processes(ranks: list[dict[str, Any]]) -> None:
    one = measured_terms(shared=False)
    assert one.keys() == {"val/loss", "val/hidden_mse", "val/attention_kl", "val/logits_kl"}
    for rank in ranks:
        assert rank["terms"] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("by", ["magnitude", "gradient"])
def test_sizes_are_those_of_the_whole_batch(by: str, ranks: list[dict[str, Any]]) -> None:
    one = balanced(by, shared=False)
    for rank in ranks:
        assert rank[by].keys() == one.keys()
        for name, size in rank[by].items():
            assert size == pytest.approx(one[name], rel=1e-6), name


@pytest.mark.parametrize("accumulated", [1, 2])
def test_all_processes_skip_alike(accumulated: int, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[f"skipped {accumulated}"] for rank in ranks)
    assert first["window"] == second["window"]
    assert len(first["weights"]) == 4
    assert all(same(*pair) for pair in zip(first["weights"], second["weights"], strict=True))
    assert same(first["weights"][0], first["weights"][1])
    assert not same(first["weights"][1], first["weights"][2])


def test_all_processes_stop_and_one_names_the_term(ranks: list[dict[str, Any]]) -> None:
    assert "at step 1 (epoch 0, row ids [4, 6])" in ranks[0]["stopped"]
    assert "the last batches of this process, run again, show none" in ranks[0]["stopped"]
    assert (
        "at step 1 (epoch 0, row ids [5, 7]), while the loss is. It is the gradient of: spoilt." in ranks[1]["stopped"]
    )


@pytest.mark.parametrize(("steps", "accumulated"), [(2, 1), (6, 1), (1, 2), (4, 1)])
def test_the_last_weights_are_measured_where_steps_end_within_an_epoch(steps: int, accumulated: int) -> None:
    """Four batches are an epoch."""

    class Measured(L.Callback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                self.steps.append(trainer.global_step)

    look = Measured()
    student = tiny.bert(2)
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": steps, "accumulate_grad_batches": accumulated}
    run = trainer(objectives.TaskLoss(), look, **options)
    run.fit(Distiller(student), loader(), loader())
    assert run.global_step == steps
    assert look.steps == [*range(4, steps, 4), steps]
    after = trainer()
    after.validate(Distiller(student), loader(), verbose=False)
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(float(after.callback_metrics["val/loss"]))


# Several labels a row


class Tags(L.LightningDataModule):
    multi_label = True
    label_names = ("art", "law", "war")

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(tagged(), 3)  # type: ignore[arg-type]

    predict_dataloader = val_dataloader


def tagged() -> Rows:
    found = rows((5, 4, 6, 3, 7, 2, 5, 4))
    for i, row in enumerate(found):
        row["labels"] = torch.tensor([float(i % 2), float(i % 3 == 0), float(i > 5)])
    return found


@pytest.mark.parametrize("declared", [True, False])
def test_several_labels_a_row(declared: bool) -> None:
    student = tiny.bert(2)
    student.config.problem_type = "multi_label_classification"
    run = trainer()
    data: Any = {"datamodule": Tags()} if declared else {"dataloaders": DataLoader(tagged(), 3)}  # type: ignore[arg-type]
    run.validate(Distiller(student), **data, verbose=False)
    hits = wrong = 0
    loss = 0.0
    for row in tagged():
        logits = student.eval()(**{k: row[k][None] for k in ("input_ids", "attention_mask", "position_ids")}).logits[0]
        for z, y in zip(logits.tolist(), row["labels"].tolist(), strict=True):
            hits, wrong = hits + (z > 0 and y == 1), wrong + ((z > 0) != (y == 1))
            loss += math.log1p(math.exp(-z if y else z)) / 3 / 8
    assert float(run.callback_metrics["val/micro_f1"]) == pytest.approx(2 * hits / (2 * hits + wrong))
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(loss, rel=1e-5)
    assert 0 < float(run.callback_metrics["val/average_precision"]) <= 1
    (batch,) = DataLoader(tagged(), 8)  # type: ignore[arg-type]
    found = Distiller(student).predict_step(batch, 0)
    assert torch.equal(found["prediction"], (found["logits"] > 0).long())


def test_labels_that_are_numbers_for_each_class_are_several_labels() -> None:
    """As in transformers, where the config doesn't say."""
    student = tiny.bert(2)
    student.config.problem_type = None
    run = trainer()
    run.validate(Distiller(student), DataLoader(tagged(), 3), verbose=False)  # type: ignore[arg-type]
    assert {"val/micro_f1", "val/average_precision", "val/loss"} == run.callback_metrics.keys()


# What is said in words


class Named(L.LightningDataModule):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.label_names = names

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(rows((5, 4, 6, 3)), 2)  # type: ignore[arg-type]


def constant(label: int, names: bool = True) -> Any:
    student = tiny.bert(2)
    with torch.no_grad():
        student.classifier.weight.zero_()
        student.classifier.bias.copy_(torch.nn.functional.one_hot(torch.tensor(label), 3))
    return student


def test_a_constant_prediction_is_pointed_out_once() -> None:
    module, run = Distiller(constant(1)), trainer()
    with pytest.warns(UserWarning, match=r"one class for all 4 rows of val: 'maybe' \(number 1\).*labels are of \d"):
        run.validate(module, datamodule=Named("no", "maybe", "yes"), verbose=False)


def test_it_is_pointed_out_once_in_a_training(recwarn: pytest.WarningsRecorder) -> None:
    class Still(Distiller):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            optimizer.zero_grad()

    trainer(objectives.TaskLoss()).fit(Still(constant(2)), loader(), loader())
    assert sum("one class for all" in str(w.message) for w in recwarn.list) == 1
    assert "for all 16 rows of val: 'label_2' (number 2)" in next(
        str(w.message) for w in recwarn.list if "one class" in str(w.message)
    )


def test_a_constant_prediction_of_constant_labels_is_right(recwarn: pytest.WarningsRecorder) -> None:
    data = rows((5, 4, 6))
    for row in data:
        row["labels"] = torch.tensor(1)
    trainer().validate(Distiller(constant(1)), DataLoader(data, 2), verbose=False)  # type: ignore[arg-type]
    assert not [w for w in recwarn.list if "one class" in str(w.message)]


@pytest.mark.parametrize("method", ["validate", "test", "predict", "fit"])
def test_logits_that_are_nan_are_refused(method: str) -> None:
    student = constant(1)
    with torch.no_grad():
        student.classifier.bias[0] = math.nan
    run, module = trainer(objectives.HiddenMSE(), max_epochs=1), Distiller(student, tiny.bert(2))
    data: Any = (loader(), loader()) if method == "fit" else (loader(),)
    if method == "predict":
        call, arguments = module.predict_step, (next(iter(loader())), 0)
    else:
        call, arguments = getattr(run, method), (module, *data)
    with pytest.raises(NotFiniteError, match=r"logits are NaN for \d+ rows"):
        call(*arguments)


def test_rows_without_labels_do_not_count(recwarn: pytest.WarningsRecorder) -> None:
    run = trainer()
    student = tiny.bert(2)
    run.validate(Distiller(student), DataLoader(without_labels(rows((5, 4, 6)), 0, 1, 2), 2), verbose=False)  # type: ignore[arg-type]
    assert math.isnan(run.callback_metrics["val/loss"])  # of no row


def test_a_student_whose_forward_takes_no_labels_is_measured_without_a_loss() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny.bert(2)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    class Labelled(L.LightningDataModule):
        num_labels = 3

        def val_dataloader(self) -> DataLoader[Any]:
            return loader()

    run = trainer()
    run.validate(Distiller(Plain()), datamodule=Labelled(), verbose=False)
    assert run.callback_metrics.keys() == {"val/accuracy"}


# Names of sets


def test_sets_that_are_not_named_are_refused() -> None:
    class Two(L.LightningDataModule):
        validation_names = ("matched", "mismatched")

        def val_dataloader(self) -> list[DataLoader[Any]]:
            return [loader(), loader(), loader()]

    with pytest.raises(DataError, match=r"names 2 sets \(matched, mismatched\) and has 3 loaders"):
        trainer().validate(Distiller(tiny.bert(2)), datamodule=Two(), verbose=False)


def test_several_sets_without_names_are_numbered() -> None:
    run = trainer()
    run.validate(Distiller(tiny.bert(2)), [loader(), loader(rows=8)], verbose=False)
    assert {"val/accuracy", "val_1/accuracy", "val/loss", "val_1/loss"} == run.callback_metrics.keys()


# Labels that the models don't know


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["no", "yes"], r"has 2 labels, the models have 3\. Fine-tune"),
        (["no", "maybe", "yes", "perhaps"], r"4 labels.*don't know 'perhaps'; their labels are no, maybe, yes\."),
        (["no", "perhaps", "maybe"], r"in another order: no, perhaps, maybe\. The models don't know 'perhaps'"),
    ],
)
def test_unknown_labels_are_named(names: list[str], message: str) -> None:
    student = tiny.bert(2)
    student.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    with pytest.raises(DataError, match=message):
        trainer().validate(Distiller(student), datamodule=Named(*names), verbose=False)


def test_a_label_of_another_name_at_its_place_is_pointed_out() -> None:
    student = tiny.bert(2)
    student.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    with pytest.warns(UserWarning, match="taken for the models' in their order. The models don't know 'perhaps'"):
        trainer().validate(Distiller(student), datamodule=Named("no", "perhaps", "yes"), verbose=False)
