from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch

from ildistil.data import Glue
from ildistil.data.glue import TASKS
from tiny_data import FORMATS, make_tokenizer

SENTENCES = {"sentence": ["a good film", "a bad film", "dull", "fine"], "label": [1, 0, 0, 1]}


def rows_of(loader: Any) -> dict[int, dict[str, Any]]:
    """Return every row of a loader by its id, without padding."""
    found = {}
    for batch in loader:
        for i, row_id in enumerate(batch["row_id"].tolist()):
            keep = batch["attention_mask"][i].bool()
            found[row_id] = {k: v[i][keep].tolist() if v.ndim == 2 else v[i].item() for k, v in batch.items()}
    return found


def prepared(*args: Any, stage: str | None = None, **kwargs: Any) -> Glue:
    data = Glue(*args, tokenizer=kwargs.pop("tokenizer", None) or make_tokenizer(), **kwargs)
    data.prepare_data()
    data.setup(stage)
    return data


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("inside", ["sst2", "SST-2", "."])
def test_local_files_of_every_format_give_the_same_rows(tmp_path: Any, write: Any, ending: str, inside: str) -> None:
    for split in ("train", "validation"):
        write(f"{inside}/{split}{ending}", SENTENCES)
    data = prepared("sst2", path=str(tmp_path), stage="fit")
    rows = rows_of(data.train_dataloader())
    assert [rows[i]["input_ids"] for i in range(4)] == [[2, 5, 6, 8, 3], [2, 5, 7, 8, 3], [2, 14, 3], [2, 15, 3]]
    assert [rows[i]["labels"] for i in range(4)] == [1, 0, 0, 1]
    assert rows_of(data.val_dataloader()[0]) == rows


@pytest.mark.parametrize("labels", [["positive", "negative"], [1, 0], ["1", "0"], [1.0, 0.0]])
def test_labels_are_words_or_numbers(tmp_path: Any, write: Any, labels: list[Any]) -> None:
    write("train.json", {"sentence": ["good", "bad"], "label": labels})
    write("validation.json", {"sentence": ["good", "bad"], "label": labels})
    rows = rows_of(prepared("sst2", path=str(tmp_path)).train_dataloader())
    assert [rows[0]["labels"], rows[1]["labels"]] == [1, 0]


def test_a_batch_is_tensors_of_the_right_types(tmp_path: Any, write: Any) -> None:
    for split in ("train", "validation"):
        write(f"{split}.tsv", {"sentence1": ["a good film", "a"], "sentence2": ["dull", "the cat"], "label": [1, 0]})
    (batch,) = prepared("mrpc", path=str(tmp_path)).train_dataloader()
    assert {k: v.dtype for k, v in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels", "row_id"}
    first = batch["row_id"].tolist().index(0)
    assert batch["input_ids"][first].tolist() == [2, 5, 6, 8, 3, 14, 3]
    assert batch["token_type_ids"][first].tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert batch["input_ids"][1 - first].tolist() == [2, 5, 3, 9, 10, 3, 0]
    assert batch["attention_mask"][1 - first].tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_stsb_is_a_regression(tmp_path: Any, write: Any) -> None:
    for split in ("train", "validation"):
        write(f"{split}.tsv", {"sentence1": ["a", "a"], "sentence2": ["cat", "mat"], "label": ["5.000", "3.8"]})
    data = prepared("stsb", path=str(tmp_path))
    (batch,) = data.val_dataloader()[0]
    assert batch["labels"].dtype == torch.float32
    assert sorted(batch["labels"].tolist()) == [pytest.approx(3.8), 5.0]
    assert (data.num_labels, data.label_names, data.regression) == (1, None, True)
    assert list(data.metrics()) == ["pearson", "spearman"]
    assert data.primary_metric == "pearson"


def test_mnli_has_both_validation_and_both_test_sets(tmp_path: Any, write: Any) -> None:
    pair = {"premise": ["a cat"], "hypothesis": ["a"]}
    for split in ("train", "validation_matched"):
        write(f"mnli/{split}.tsv", pair | {"label": ["contradiction"]})
    write("mnli/validation_mismatched.tsv", pair | {"label": ["neutral"]})
    for split in ("test_matched", "test_mismatched"):
        write(f"mnli/{split}.tsv", pair | {"label": [-1]})
    data = prepared("mnli", path=str(tmp_path))
    assert data.validation_names == ["val", "val_mismatched"]
    assert data.test_names == ["test", "test_mismatched"]
    assert [next(iter(loader))["labels"].item() for loader in data.val_dataloader()] == [2, 1]
    assert all("labels" not in next(iter(loader)) for loader in data.test_dataloader())
    assert len(data.predict_dataloader()) == 2


def hub(monkeypatch: pytest.MonkeyPatch, **splits: Any) -> list[Any]:
    calls = []

    def load_dataset(*args: Any) -> datasets.DatasetDict:
        calls.append(args)
        return datasets.DatasetDict({name: datasets.Dataset.from_dict(rows) for name, rows in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize("task", TASKS)
def test_every_task_loads_from_the_hub(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    texts = {name: ["a good film", "a cat"] for name in TASKS[task].text_columns}
    labelled = texts | {"label": [1.5, 0.5] if task == "stsb" else [1, 0], "idx": [7, 8]}
    secret = texts | {"label": [-1.0, -1.0] if task == "stsb" else [-1, -1], "idx": [0, 1]}
    splits = {"train": labelled, "validation": labelled, "test": secret}
    if task == "mnli":
        both = {"validation_matched": labelled, "validation_mismatched": labelled}
        splits = {"train": labelled, **both, "test_matched": secret, "test_mismatched": secret}
    calls = hub(monkeypatch, **({"test": secret} if task == "ax" else splits))
    data = prepared(task)
    assert calls == [("nyu-mll/glue", task)]
    if task != "ax":
        assert sorted(rows_of(data.train_dataloader())) == [0, 1]  # positions, not the hub's idx
        assert len(data.val_dataloader()) == len(data.validation_names)
    for loader in data.test_dataloader():
        assert "labels" not in next(iter(loader))


def test_what_a_task_is_needs_no_data() -> None:
    names = {task: Glue(task).label_names for task in TASKS}
    assert names["qnli"] == names["rte"] == ["entailment", "not_entailment"]
    assert names["wnli"] == ["not_entailment", "entailment"]
    assert names["mnli"] == names["ax"] == ["entailment", "neutral", "contradiction"]
    assert [Glue(t).primary_metric for t in ("cola", "mrpc", "qqp", "stsb", "sst2")] == [
        "matthews",
        "f1",
        "f1",
        "pearson",
        "accuracy",
    ]
    assert Glue("ax").validation_names == []


def test_ax_cannot_be_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, test={"premise": ["a"], "hypothesis": ["a"], "label": [-1]})
    with pytest.raises(FileNotFoundError, match="train on mnli"):
        prepared("ax").setup("fit")


def test_another_train_file(tmp_path: Any, write: Any) -> None:
    pairs = {"question": ["a", "the"], "sentence": ["cat", "mat"], "label": ["entailment", "not_entailment"]}
    write("qnli/train_derived.tsv", pairs)
    write("qnli/validation.tsv", pairs)
    data = prepared("qnli", path=str(tmp_path), train_file="train_derived.tsv")
    assert sorted(rows_of(data.train_dataloader())) == [0, 1]


def test_without_a_test_file_prediction_takes_the_validation_set_in_order(tmp_path: Any, write: Any) -> None:
    for split in ("train", "validation"):
        write(f"{split}.tsv", SENTENCES)
    data = prepared("sst2", path=str(tmp_path), batch_size=3)
    (loader,) = data.predict_dataloader()
    assert torch.cat([batch["row_id"] for batch in loader]).tolist() == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match=r"no file test\.tsv.*holds: .*train\.tsv, validation\.tsv"):
        data.setup("test")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Glue("sst"), ValueError, "Unknown GLUE task 'sst'. Did you mean 'sst2'"),
        (lambda: Glue("sst2", train_file="x.tsv"), ValueError, "needs path"),
        (lambda: Glue("sst2", batch_size=0), ValueError, "batch_size is 0"),
        (lambda: prepared("sst2", path="/no/such/folder"), FileNotFoundError, "is not a folder. / holds"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_missing_split_lists_the_files_found(tmp_path: Any, write: Any) -> None:
    write("sst2/training.tsv", SENTENCES)
    with pytest.raises(FileNotFoundError, match=r"no file train\.tsv.*holds: training\.tsv\..*train_file"):
        prepared("sst2", path=str(tmp_path), stage="fit")
    write("sst2/train.tsv", SENTENCES)
    with pytest.raises(FileNotFoundError, match=r"no file validation\.tsv"):
        prepared("sst2", path=str(tmp_path), stage="fit")


def test_an_unknown_ending_and_two_files_for_a_split_are_refused(tmp_path: Any, write: Any) -> None:
    write("rte/train.txt", "x")
    with pytest.raises(ValueError, match=r"train\.txt: unknown file ending. Use one of \.tsv, \.csv"):
        prepared("rte", path=str(tmp_path))
    write("sst2/train.tsv", SENTENCES)
    write("sst2/train.csv", SENTENCES)
    with pytest.raises(ValueError, match=r"several files for 'train': train\.csv, train\.tsv"):
        prepared("sst2", path=str(tmp_path))


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"(?s)no route to host.*path=<folder>"):
        prepared("sst2")
