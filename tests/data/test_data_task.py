"""What other rooms ask of a data module: declared, by default, or refused."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from ildistil.data import Glue, LoadingOptions, Task, TextData, every_row, label_config, set_names, task_of
from ildistil.errors import DataError
from tiny_data import make_tokenizer

MEMBERS = [name for name in vars(Task) if not name.startswith("_")]


def declared(**members: Any) -> Task:
    """The task of a data module of somebody else, which has these members."""
    return task_of(type("Foreign", (L.LightningDataModule,), members)())


def test_the_defaults_of_a_module_that_declares_nothing() -> None:
    for task in (declared(), task_of(None)):
        assert (task.task_name, task.label_names, task.num_labels, task.max_length, task.tokenizer) == (None,) * 5
        assert (task.regression, task.multi_label, task.metrics()) == (False, False, None)
        assert (task.validation_names, task.test_names) == (["val"], ["test"])
        assert (task.primary_metric, task.primary_mode) == (None, "max")
        assert label_config(task) == {}


def test_one_answer_gives_others() -> None:
    named = declared(label_names=("bad", "good"))
    assert (named.label_names, named.num_labels, named.regression) == (["bad", "good"], 2, False)
    assert list(named.metrics() or ()) == ["accuracy"]
    assert label_config(named) == {
        "num_labels": 2,
        "problem_type": "single_label_classification",
        "id2label": {0: "bad", 1: "good"},
        "label2id": {"bad": 0, "good": 1},
    }
    for scored in (declared(regression=True), declared(num_labels=1)):
        assert (scored.num_labels, scored.regression, scored.label_names) == (1, True, None)
        assert list(scored.metrics() or ()) == ["pearson", "spearman"]
        assert label_config(scored) == {"num_labels": 1, "problem_type": "regression"}
    several = declared(num_labels=3, regression=True)
    assert (several.num_labels, several.metrics()) == (3, None)
    tags = declared(multi_label=True, label_names=["a", "b", "c"])
    assert list(tags.metrics() or ()) == ["average_precision", "micro_f1"]
    assert label_config(tags)["problem_type"] == "multi_label_classification"
    counted = declared(num_labels=4)
    assert label_config(counted) == {"num_labels": 4, "problem_type": "single_label_classification"}


def test_our_data_modules_declare_every_member(tmp_path: Any) -> None:
    tokenizer = make_tokenizer()
    for name in ("train", "validation"):
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\na good film\t1\ndull\t0\n")
    glue = Glue("sst2", path=str(tmp_path), tokenizer=tokenizer, max_length=9)
    text = TextData(str(tmp_path / "train.tsv"), text_column="sentence", tokenizer=tokenizer, max_length=9)
    for data, metrics in ((glue, ["accuracy"]), (text, ["accuracy", "f1"])):
        data.prepare_data()
        data.setup("fit")
        assert [n for n in MEMBERS if not hasattr(data, n)] == ["multi_label", "primary_mode"]  # as by default
        task = task_of(data)
        assert (task.label_names, task.num_labels) == (data.label_names, 2)
        assert (task.primary_metric, task.primary_mode) == ("accuracy", "max")
        assert (task.max_length, task.tokenizer, list(task.metrics() or ())) == (9, tokenizer, metrics)
        assert task.validation_names == data.validation_names


def test_nothing_is_read_before_it_is_asked_for_and_only_once() -> None:
    reads: list[str] = []

    def names(self: Any) -> list[str]:
        reads.append("label_names")
        return ["a", "b"]

    def tokenizer(self: Any) -> Any:
        raise RuntimeError("not loaded yet")

    task = declared(label_names=property(names), tokenizer=property(tokenizer))
    assert reads == []
    assert task.num_labels == len(task.label_names or ()) == len(label_config(task)["id2label"]) == 2
    assert reads == ["label_names"]
    with pytest.raises(RuntimeError, match="not loaded yet"):
        _ = task.tokenizer


def test_a_mistake_inside_a_property_is_not_taken_for_a_missing_member() -> None:
    task = declared(label_names=property(lambda self: self.lable_names))
    with pytest.raises(AttributeError, match="lable_names"):
        _ = task.label_names


@pytest.mark.parametrize(
    ("members", "asked", "message"),
    [
        ({"label_names": "ab"}, "label_names", r"Foreign\.label_names is 'ab'; it must be a list of different strings"),
        ({"label_names": [0, 1]}, "num_labels", r"label_names is \[0, 1\]; it must be a list of different strings"),
        ({"label_names": ["a", "a"]}, "label_names", "different strings"),
        ({"label_names": {"a": 0}}, "label_names", "different strings"),
        ({"label_names": ["a", "b"], "num_labels": 3}, "num_labels", "num_labels is 3; it must be 2, the number of"),
        ({"label_names": ["a", "b"], "regression": True}, "regression_and_labels", "must be None in a regression"),
        ({"num_labels": 1, "regression": False}, "num_labels", "num_labels is 1; it must be at least 2"),
        ({"num_labels": True}, "num_labels", "num_labels is True; it must be at least 1"),
        ({"num_labels": 0}, "num_labels", "num_labels is 0; it must be at least 1"),
        ({"num_labels": "2"}, "num_labels", "num_labels is '2'; it must be of type int"),
        ({"regression": "yes"}, "regression", "regression is 'yes'; it must be of type bool"),
        ({"multi_label": True, "regression": True}, "multi_label", "multi_label is True; it must be False in a"),
        ({"max_length": 0}, "max_length", "max_length is 0; it must be at least 1"),
        ({"tokenizer": "bert-base-uncased"}, "tokenizer", "it must be of type PreTrainedTokenizerBase"),
        ({"task_name": 3}, "task_name", "it must be of type str"),
        ({"validation_names": "val"}, "validation_names", "validation_names is 'val'; it must be a list"),
        ({"validation_names": ["val", "val"]}, "validation_names", "a list of different strings"),
        ({"validation_names": ["val/a"]}, "validation_names", "names without a slash"),
        ({"test_names": ["train"]}, "test_names", "other than 'train'"),
        ({"test_names": [""]}, "test_names", "names without a slash"),
        ({"primary_metric": "f1", "num_labels": 2}, "primary_metric", r"'loss' or one of \['accuracy'\], its metrics"),
        ({"primary_mode": "up"}, "primary_mode", "it must be 'min' or 'max'"),
    ],
)
def test_wrong_answers_are_refused(members: dict[str, Any], asked: str, message: str) -> None:
    task = declared(**members)
    with pytest.raises(DataError, match=message):
        label_config(task) if asked == "regression_and_labels" else getattr(task, asked)


@pytest.mark.parametrize("metrics", [{"accuracy": 1}, MetricCollection({}), lambda self: MulticlassAccuracy(2)])
def test_metrics_are_made_anew_by_a_method(metrics: Any) -> None:
    with pytest.raises(DataError, match=r"(?s)metrics is .*a method that returns a new torchmetrics\.MetricCollection"):
        declared(metrics=metrics).metrics()


def test_metrics_of_ones_own() -> None:
    made = declared(metrics=lambda self: MetricCollection({"mse": MeanSquaredError()}), primary_metric="mse")
    assert list(made.metrics() or ()) == ["mse"]
    assert made.metrics() is not made.metrics()
    assert made.primary_mode == "min"  # as the metric states itself: the best is the lowest
    loss = declared(primary_metric="loss", num_labels=2)
    assert (loss.primary_metric, loss.primary_mode) == ("loss", "min")
    assert declared(primary_metric="loss", primary_mode="max").primary_mode == "max"
    assert declared(metrics=lambda self: None).metrics() is None


def test_names_of_sets() -> None:
    assert set_names(["val"], 1) == ["val"]
    assert set_names(["val"], 3) == ["val", "val_1", "val_2"]
    assert set_names(["a", "b"], 2) == ["a", "b"]
    assert set_names([], 0) == set_names(["val"], 0) == []
    for names, count in ((["a", "b"], 3), (["a", "b"], 1), ([], 1)):
        with pytest.raises(DataError, match=rf"names {len(names)} sets .* and has {count} loaders"):
            set_names(names, count)


# Every row ---------------------------------------------------------------------------------------------------------

ROWS = [{"row_id": i, "x": float(i)} for i in range(11)]


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


def ids(batches: Any) -> list[list[int]]:
    return [batch["row_id"].tolist() for batch in batches]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4, "shuffle": True, "drop_last": True},
        {"batch_size": 4, "sampler": WeightedRandomSampler([1.0] * 11, 20)},
        {"batch_sampler": BatchSampler(RandomSampler(ROWS), 4, drop_last=True)},
        {"batch_size": 4, "shuffle": True, "num_workers": 1},
    ],
)
def test_every_row_of_a_loader_comes_once_and_in_order(options: dict[str, Any]) -> None:
    loader = DataLoader(ROWS, **options)  # type: ignore[arg-type]
    state = torch.get_rng_state()
    rows = declared(train_dataloader=lambda self: loader).every_row()
    for _ in range(2):
        assert ids(rows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert torch.equal(torch.get_rng_state(), state)


def test_every_row_of_batches_made_before() -> None:
    batches = [{"row_id": torch.arange(i, i + 3)} for i in range(0, 9, 3)]
    shuffled = DataLoader(batches, batch_size=None, shuffle=True)  # type: ignore[arg-type]
    assert ids(every_row(shuffled)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    stream = DataLoader(Stream(), batch_size=4)
    assert every_row(stream) is stream


def test_every_row_that_a_module_declares() -> None:
    assert ids(declared(every_row=lambda self: DataLoader(ROWS, 6)).every_row()) == [[*range(6)], [*range(6, 11)]]  # type: ignore[arg-type]
    for wrong in (lambda self: iter(ROWS), lambda self: 3, 4):
        with pytest.raises(DataError, match="every_row is .* gone through repeatedly"):
            declared(every_row=wrong).every_row()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([DataLoader(ROWS)], r"several loaders at once \(list\)"),  # type: ignore[arg-type]
        ({"a": DataLoader(ROWS)}, r"several loaders at once \(dict\)"),  # type: ignore[arg-type]
        (iter(ROWS), "can't be gone through repeatedly"),
        (None, "can't be gone through repeatedly"),
        (
            DataLoader(ROWS, batch_size=None, sampler=BatchSampler(RandomSampler(ROWS), 4, False)),  # type: ignore[arg-type]
            r"BatchSampler makes whole batches in an order of its own.*every_row\(\)",
        ),
    ],
)
def test_loaders_whose_rows_are_unknown(loader: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        every_row(loader)
    with pytest.raises(DataError, match="Without a data module"):
        task_of(None).every_row()


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"tokens_per_batch": 40}, {"limit_train": 9},
                                     {"group_by_length": False}])  # fmt: skip
def test_every_row_of_our_modules(tmp_path: Any, options: dict[str, Any]) -> None:
    """On each rank all rows that are trained on, once, whatever share of them the rank trains on."""
    lines = ["text\tlabel", *(f"{'cat ' * (1 + i * 7 % 13)}\t{i % 2}" for i in range(23))]
    (tmp_path / "a.tsv").write_text("\n".join(lines) + "\n")
    found, trained = [], set()
    for rank in range(2):
        data = TextData(str(tmp_path / "a.tsv"), tokenizer=make_tokenizer(), eval_batch_size=5, **options)
        data.prepare_data()
        data.setup("fit")
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs={"num_replicas": 2, "rank": rank},
            accumulate_grad_batches=1,
            overfit_batches=0,
            fit_loop=L.Trainer(logger=False, accelerator="cpu").fit_loop,
        )
        trained |= {i for batch in ids(data.train_dataloader()) for i in batch}
        state = torch.get_rng_state()
        found.append(ids(task_of(data).every_row()))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]
    assert sorted(i for batch in found[0] for i in batch) == sorted(trained)
    assert len(trained) == options.get("limit_train", 23)
    if options.get("group_by_length", True):
        longest = [max(i * 7 % 13 for i in batch) for batch in found[0][:-1]]
        shortest = [min(i * 7 % 13 for i in batch) for batch in found[0][:-1]]
        assert sum(b - a for a, b in zip(shortest, longest, strict=True)) <= 12


def test_the_tables_of_the_docs_list_what_there_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")

    def first_column(header: str) -> list[str]:
        _, table = page.split(f"| {header} |", maxsplit=1)
        rows = table.split("\n\n", maxsplit=1)[0].splitlines()[2:]
        return [name for row in rows for name in re.findall(r"`(\w+)[()]*`", row.split("|")[1])]

    assert first_column("option") == [field.name for field in dataclasses.fields(LoadingOptions)]
    assert sorted(first_column("name")) == sorted(MEMBERS)
