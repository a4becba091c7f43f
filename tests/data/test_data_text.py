import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from ildistil.data import Glue, TextData, labelled, loading
from ildistil.data.task import task_of
from ildistil.errors import DataError
from tiny_data import GOOD, labels_of, make_tokenizer, prepared


def test_label_names_are_derived_from_the_train_file_before_anything_is_prepared(write: Any) -> None:
    data = TextData(train_file=write("train.csv", GOOD))
    assert (data.label_names, data.num_labels, data.regression) == (["no", "yes"], 2, False)


def test_classes_of_every_split_follow_the_train_file(write: Any) -> None:
    test = {"text": ["fine"], "label": ["yes"]}
    data = prepared(
        train_file=write("a.csv", GOOD), validation_file=write("b.jsonl", GOOD), test_file=write("c.tsv", test)
    )
    assert labels_of(data.train_dataloader()) == labels_of(data.val_dataloader()[0]) == [1, 0, 0, 1]
    assert labels_of(data.test_dataloader()[0]) == [1]
    assert (data.validation_names, data.test_names, data.task_name) == (["val"], ["test"], "text")


@pytest.mark.parametrize(
    ("labels", "names", "codes"),
    [
        ([10, 2, 10], ["2", "10"], [1, 0, 1]),
        (["3", "1", "2"], ["1", "2", "3"], [2, 0, 1]),
        ([True, False, True], ["0", "1"], [1, 0, 1]),
        (["b", "2", "a"], ["2", "a", "b"], [2, 0, 1]),
    ],
)
def test_derived_names_are_sorted(write: Any, labels: list[Any], names: list[str], codes: list[int]) -> None:
    data = prepared(train_file=write("train.json", {"text": ["a"] * 3, "label": labels}))
    assert data.label_names == names
    assert labels_of(data.train_dataloader()) == codes


def test_given_label_names_fix_the_order(write: Any) -> None:
    data = prepared(train_file=write("train.csv", GOOD), label_names=["yes", "maybe", "no"])
    assert data.num_labels == 3
    assert labels_of(data.train_dataloader()) == [0, 2, 2, 0]


def test_numbers_are_not_taken_for_positions_among_names_that_are_numbers(write: Any) -> None:
    with pytest.raises(ValueError, match=r"row 0 .* unknown label 0.*'1', '2'"):
        prepared(train_file=write("train.json", {"text": ["a", "a"], "label": [0, 1]}), label_names=["1", "2"])


def test_pairs_and_regression_with_own_columns(write: Any) -> None:
    file = write("pairs.parquet", {"left": ["a cat", "a"], "right": ["the mat", "cat"], "score": [0.25, 3.0]})
    data = prepared(
        train_file=file, text_column="left", text_pair_column="right", label_column="score", regression=True
    )
    (batch,) = data.train_dataloader()
    row = batch["row_id"].tolist().index(0)
    assert batch["input_ids"][row].tolist() == [2, 5, 10, 3, 9, 13, 3]
    assert batch["labels"].dtype == torch.float32
    assert labels_of(data.train_dataloader()) == [0.25, 3.0]
    assert data.num_labels == 1
    assert data.val_dataloader() == []


def test_a_test_file_needs_no_labels(write: Any) -> None:
    data = prepared(train_file=write("train.csv", GOOD), test_file=write("test.csv", {"text": ["fine", "a cat"]}))
    (loader,) = data.predict_dataloader()
    (batch,) = loader
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "row_id"}
    assert batch["row_id"].tolist() == [0, 1]


def test_quotes_and_odd_line_breaks_in_tsv_are_text(write: Any) -> None:
    file = write("train.tsv", 'text\tlabel\n" a good film\tyes\na "\x85cat\tno\n\tyes\r\n')
    with pytest.warns(
        UserWarning, match=r"train.tsv: 1 of 3 rows have no token but special ones.*: 2 \(rows count from"
    ):
        data = prepared(train_file=file)
    ids = {
        int(b["row_id"]): b["input_ids"][0].tolist() for b in prepared(train_file=file, batch_size=1).train_dataloader()
    }
    assert ids == {0: [2, 4, 5, 6, 8, 3], 1: [2, 5, 4, 10, 3], 2: [2, 3]}  # the last: an empty text is allowed
    assert data.label_names == ["no", "yes"]


def test_quotes_in_csv_are_quotes(write: Any) -> None:
    file = write("train.csv", 'text,label\n"a good,\nfilm",yes\n"a ""cat""",no\n')
    ids = {
        int(b["row_id"]): b["input_ids"][0].tolist() for b in prepared(train_file=file, batch_size=1).train_dataloader()
    }
    assert ids == {0: [2, 5, 6, 1, 8, 3], 1: [2, 5, 4, 10, 4, 3]}


def test_padding_is_on_the_tokenizers_side(write: Any) -> None:
    data = prepared(train_file=write("train.csv", GOOD), tokenizer=make_tokenizer(padding_side="left"))
    (batch,) = data.train_dataloader()
    row = batch["row_id"].tolist().index(2)
    assert batch["input_ids"][row].tolist() == [0, 0, 2, 14, 3]
    assert batch["attention_mask"][row].tolist() == [0, 0, 1, 1, 1]


def test_token_types_come_only_from_tokenizers_that_have_them(write: Any) -> None:
    tokenizer = make_tokenizer(model_input_names=["input_ids"])
    (batch,) = prepared(train_file=write("train.csv", GOOD), tokenizer=tokenizer).train_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "labels", "row_id"}


def test_rows_are_cut_at_max_length(write: Any) -> None:
    (batch,) = prepared(train_file=write("train.csv", GOOD), max_length=4).train_dataloader()
    assert batch["input_ids"].shape == (4, 4)


# The cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record what is tokenised."""
    calls: list[str] = []
    real = labelled.tokenize

    def tokenize(*args: Any) -> Any:
        calls.append(Path(args[-1]).name)
        return real(*args)

    monkeypatch.setattr(labelled, "tokenize", tokenize)
    return calls


def test_the_same_content_is_tokenised_once(write: Any, tokenized: list[str], own_cache: Path) -> None:
    file = write("train.csv", GOOD)
    first = prepared(train_file=file)
    make_tokenizer()("a", truncation=True, max_length=3)  # leaves its mark in a tokenizer, and must not matter
    used = make_tokenizer()
    used("a good film", truncation=True, max_length=3, padding="max_length")
    second = prepared(train_file=write("copy.csv", GOOD), tokenizer=used)
    assert tokenized == ["train.csv"]
    assert labels_of(first.train_dataloader()) == labels_of(second.train_dataloader())
    assert [p.name for p in own_cache.rglob(".*")] == []


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 8},
        {"label_names": ["yes", "no"]},
        {"tokenizer": make_tokenizer(special=False)},
        {"text_column": "other"},
    ],
)
def test_other_settings_are_other_entries(write: Any, tokenized: list[str], change: dict[str, Any]) -> None:
    file = write("train.csv", GOOD | {"other": ["a"] * 4})
    prepared(train_file=file)
    prepared(train_file=file, **change)
    prepared(train_file=file, batch_size=2, seed=5)
    assert tokenized == ["train.csv"] * 2


def test_changed_content_is_tokenised_again(write: Any, tokenized: list[str]) -> None:
    prepared(train_file=write("train.csv", GOOD))
    data = prepared(train_file=write("train.csv", GOOD | {"label": ["no", "no", "no", "yes"]}))
    assert tokenized == ["train.csv"] * 2
    assert labels_of(data.train_dataloader()) == [0, 0, 0, 1]


def test_of_two_processes_that_store_the_same_the_first_wins(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = write("train.csv", GOOD), loading.store

    def store_twice(rows: Any, entry: Path) -> None:
        real(rows, entry)
        kept = entry.stat().st_ino
        real(rows, entry)
        assert entry.stat().st_ino == kept
        assert [p for p in entry.parent.iterdir() if p != entry] == []

    monkeypatch.setattr(loading, "store", store_twice)
    assert labels_of(prepared(train_file=file).train_dataloader()) == [1, 0, 0, 1]


def test_setup_only_loads(write: Any, own_cache: Path) -> None:
    data = TextData(train_file=write("train.csv", GOOD), tokenizer=make_tokenizer())
    with pytest.raises(RuntimeError, match=r"prepare_data\(\)"):
        _ = data.tokenizer
    with pytest.raises(FileNotFoundError, match=r"Call prepare_data\(\)"):
        data.setup("fit")
    data.prepare_data()
    for file in own_cache.rglob("*.arrow"):
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"damaged.*Delete this folder"):
        data.setup("fit")


def test_every_flip_in_the_cache_is_noticed_and_mended(write: Any, tokenized: list[str], own_cache: Path) -> None:
    data, draw = prepared(train_file=write("train.csv", GOOD)), random.Random(0)
    files = [file for file in own_cache.rglob("*") if file.is_file()]
    places = [(file, place) for file in files for place in range(file.stat().st_size)]
    for file, place in draw.sample(places, 100):
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged|is missing"):
            data.setup("fit")
        file.write_bytes(whole)
    data.setup("fit")
    files[0].write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"is damaged.* Delete this folder.* \(It is made anew\.\)"):
        data.prepare_data()
    assert tokenized == ["train.csv"] * 2
    data.setup("fit")
    assert labels_of(data.train_dataloader()) == [1, 0, 0, 1]


# Tokenizers -------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_a_folder_an_object_or_the_models(write: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "tokenizer")
    make_tokenizer().save_pretrained(folder)
    file = write("train.csv", GOOD)
    assert len(prepared(train_file=file, tokenizer=folder).tokenizer) == 16

    data = TextData(train_file=file)
    with pytest.raises(ValueError, match=r"TextData has no tokenizer.*Name it"):
        data.prepare_data()
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn="fit"),
        lightning_module=SimpleNamespace(tokenizer_source=folder),
        distributed_sampler_kwargs=None,
        accumulate_grad_batches=1,
        fit_loop=L.Trainer(logger=False, accelerator="cpu").fit_loop,
    )
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    assert len(data.tokenizer) == 16
    assert labels_of(data.train_dataloader()) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tokenizer": "./no/such"}, FileNotFoundError, r"tokenizer folder \./no/such does not exist"),
        ({"tokenizer": make_tokenizer(pad_token=None)}, ValueError, r"no padding token.*tokenizer\.pad_token ="),
        ({"max_length": 257}, ValueError, "max_length is 257, but the tokenizer's model takes 256"),
        ({"max_length": 2}, ValueError, "every row has 2 special tokens"),
    ],
)
def test_tokenizers_that_will_not_do(write: Any, settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepared(train_file=write("train.csv", GOOD), **settings)


def test_a_tokenizer_without_a_limit(write: Any) -> None:
    tokenizer = make_tokenizer(model_max_length=int(1e30))
    assert prepared(train_file=write("train.csv", GOOD), tokenizer=tokenizer, max_length=4096).max_length == 4096


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("a.csv", "", {}, "is empty"),
        ("a.tsv", "text\tlabel\n", {}, "is empty"),
        ("a.jsonl", "", {}, "is empty"),
        ("a.json", "[]", {}, "is empty"),
        ("a.txt", "x", {}, r"unknown file ending '\.txt'. Use one of"),
        (
            "a.csv",
            GOOD,
            {"text_column": "test"},
            "no column 'test'. Did you mean 'text'\\? Its columns: 'text', 'label'",
        ),
        ("a.csv", GOOD, {"label_column": "class"}, "no column 'class'"),
        ("a.csv", GOOD, {"label_names": ["yess", "noo"]}, r"row 0 .*unknown label 'yes'. Did you mean 'yess'\?"),
        ("a.csv", GOOD, {"regression": True}, "row 0 .*label 'yes'; a regression needs a finite number"),
        ("a.csv", {"text": ["a", "a"], "label": ["1.0", "nan"]}, {"regression": True}, "row 1 .*label 'nan'"),
        ("a.json", {"text": ["a", "a"], "label": [1.0, None]}, {"regression": True}, "row 1 .*label None"),
        ("a.json", {"text": ["a", None], "label": [0, 1]}, {}, "row 1 .*has None in the column 'text'"),
        ("a.parquet", {"text": [1.0, float("nan")], "label": [0, 1]}, {}, "row 0 .*has 1.0 in the column 'text'"),
        ("a.json", {"text": ["a", "a"], "label": ["yes", None]}, {}, "row 1 .*has no label"),
        ("a.csv", {"text": ["a", "a"], "label": ["yes", ""]}, {}, "row 1 .*has no label"),
        ("a.csv", {"text": ["a", "a"], "label": ["yes", "yes"]}, {}, "all rows have the label 'yes'"),
        ("a.csv", {"text": ["a", "a"], "label": [0.5, 1.25]}, {}, "set regression: true"),
        ("a.tsv", "text\tlabel\na\tyes\na\tb\tno\n", {}, r"row 1 .*has 3 fields, the header has 2 \(text, label\)"),
        ("a.csv", "text,label\na,yes\na\n", {}, "row 1 .*has 1 fields"),
        ("a.csv", 'text,label\n"a"b,yes\n', {}, "not well-formed CSV"),
        ("a.tsv", "text\ttext\na\tb\n", {}, "names a column twice"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"', {}, "line 2: not valid JSON"),
        ("a.json", "[1]", {}, "row 0 is '1', not an object"),
        ("a.json", "[1", {}, "not valid JSON"),
        ("a.parquet", "no", {}, "not a Parquet file"),
        (
            "a.csv",
            GOOD | {"text": ["a", "", "a", "a"]},
            {"tokenizer": make_tokenizer(special=False)},
            "row 1 .*no token",
        ),
    ],
)
def test_bad_input_is_named_before_training(write: Any, name: str, content: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        prepared(train_file=write(name, content), **settings)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"text\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match="is not UTF-8"):
        prepared(train_file=str(tmp_path / "a.tsv"))


def test_a_missing_file_lists_what_there_is(write: Any, tmp_path: Path) -> None:
    write("train.csv", GOOD)
    with pytest.raises(FileNotFoundError, match=r"trian\.csv does not exist.*holds: .*train\.csv"):
        prepared(train_file=str(tmp_path / "trian.csv"))


def test_an_unknown_label_in_the_validation_file(write: Any) -> None:
    other = write("val.csv", {"text": ["a"], "label": ["Yes"]})
    with pytest.raises(ValueError, match=r"val\.csv, column 'label': row 0 .*'Yes'. Did you mean 'yes'"):
        prepared(train_file=write("train.csv", GOOD), validation_file=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs a file"),
        ({"train_file": "a.csv", "label_names": ["a"]}, "at least two classes"),
        ({"train_file": "a.csv", "label_names": ["a", "b"], "regression": True}, "A regression has no classes"),
        ({"train_file": "a.csv", "limit_train": 0}, "limit_train is 0"),
        ({"train_file": "a.csv", "eval_batch_size": 0}, "eval_batch_size is 0"),
    ],
)
def test_bad_arguments(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextData(**settings)


def test_a_split_that_was_not_given(write: Any) -> None:
    data = prepared(train_file=write("train.csv", GOOD))
    with pytest.raises(FileNotFoundError, match=r"no test file.*Set test_file; given: train_file="):
        data.setup("test")
    alone = TextData(test_file="x.csv", tokenizer=make_tokenizer())
    with pytest.raises(ValueError, match="set label_names"):
        _ = alone.label_names


def test_rows_without_words_are_counted_once(write: Any) -> None:
    texts = ["", "good", "[SEP]", "unheard", " ", "a film"] + [""] * 12
    file = write("train.csv", {"text": texts, "label": ["yes", "no"] * 9})
    expected = r"16 of 18 rows .*: 0, 2, 3, 4, 6, 7, 8, 9, 10, 11 \.\.\. .* They are used like any other"
    with pytest.warns(UserWarning, match=expected):
        prepared(train_file=file)
    prepared(train_file=file)  # from the cache, without a word


def test_an_empty_text_beside_another_says_something(write: Any) -> None:
    columns = {"text": ["", "a cat"], "more": ["good film", ""], "label": ["yes", "no"]}
    prepared(train_file=write("train.jsonl", columns), text_pair_column="more")


def test_the_positive_label_and_the_deciding_metric() -> None:
    spam = TextData("a.csv", label_names=["ham", "spam"], positive_label="ham", primary_metric="average_precision")
    assert spam.metric_names == ("accuracy", "f1", "average_precision")
    assert (spam.primary_metric, spam.positive) == ("average_precision", 0)
    assert (task_of(spam).primary_metric, task_of(spam).primary_mode) == ("average_precision", "max")
    preds, target = torch.tensor([1, 1, 1, 0]), torch.tensor([1, 1, 0, 0])
    metrics = spam.metrics()
    metrics.update(preds, target, logits=torch.tensor([[0.0, 3.0], [0.0, 2.0], [0.0, 1.0], [1.0, 0.0]]))
    assert float(metrics.compute()["f1"]) == pytest.approx(2 / 3)  # of ham: one of two found, none wrong
    assert float(metrics.compute()["average_precision"]) == pytest.approx(1.0)
    plain = TextData("a.csv", label_names=["ham", "spam"])
    assert float(plain.metrics()["f1"](preds, target)) == pytest.approx((2 / 3 + 4 / 5) / 2)  # of neither, the mean
    loss = TextData("a.csv", label_names=["ham", "spam"], primary_metric="loss", metric_names=["macro_f1"])
    assert (task_of(loss).primary_metric, task_of(loss).primary_mode, list(loss.metrics())) == (
        "loss",
        "min",
        ["macro_f1"],
    )
    glue = Glue("sst2", primary_metric="matthews")
    assert (list(glue.metrics()), task_of(glue).primary_metric) == (["accuracy", "matthews"], "matthews")


def test_a_constant_prediction_scores_little_without_a_positive_label() -> None:
    target = torch.tensor([1] * 87 + [0] * 13)
    preds = torch.ones_like(target)
    data = TextData("a.csv", label_names=["rare", "usual"])
    assert float(data.metrics()["f1"](preds, target)) == pytest.approx(0.93 / 2, abs=1e-2)
    rare = TextData("a.csv", label_names=["rare", "usual"], positive_label="rare")
    assert float(rare.metrics()["f1"](preds, target)) == 0.0


def test_the_positive_label_is_found_in_the_file(write: Any) -> None:
    file = write("train.csv", {"text": ["a", "b", "c"], "label": ["yes", "no", "no"]})
    assert TextData(file, positive_label="yes").positive == 1
    with pytest.raises(DataError, match=r"positive_label is 'yess'\. Did you mean 'yes'\? The classes: 'no', 'yes'\."):
        TextData(file, positive_label="yess").metrics()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_label": 1}, r"positive_label is 1; it must be the name of a class, in quotes"),
        ({"positive_label": "x", "regression": True}, "positive_label is 'x'"),
        ({"positive_label": "c", "label_names": ["a", "b"]}, r"positive_label is 'c'.*The classes: 'a', 'b'"),
        (
            {"primary_metric": "macrof1"},
            r"no metric 'macrof1' of classes\. Did you mean 'macro_f1'\?.*also be 'loss'",
        ),
        ({"primary_metric": "pearson"}, "no metric 'pearson' of classes"),
        ({"primary_metric": "f1", "regression": True}, r"no metric 'f1' of a regression"),
        ({"metric_names": []}, r"metric_names is \[\]"),
        ({"metric_names": "f1"}, "metric_names is 'f1'; it must be a list"),
        ({"metric_names": ["f1", "loss"]}, "no metric 'loss' of classes"),
        ({"metric_names": [["f1"]]}, r"no metric \['f1'\] of classes"),
        ({"metric_names": ["micro_f1"]}, "no metric 'micro_f1' of classes"),
    ],
)
def test_metrics_that_do_not_suit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TextData("a.csv", **options)
