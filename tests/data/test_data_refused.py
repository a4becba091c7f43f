"""Files, labels, tokenizers and options that once were misread, or ended in another library's traceback."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import jsonargparse
import lightning as L
import pyarrow
import pyarrow.parquet
import pytest
from transformers import BertConfig

from ildistil.data import Glue, LoadingOptions, TextData, TokenBudgetSampler
from ildistil.data.files import read_table
from ildistil.data.sampler import EpochSampler, LengthGroupedSampler
from ildistil.errors import DataError, MissingFileError
from tiny_data import GOOD, labels_of, make_tokenizer, prepared


def train(write: Any, labels: list[Any], name: str = "train.json", **settings: Any) -> list[Any]:
    """The labels that a model is trained on, of rows with these."""
    texts = ["a good film"] * len(labels)
    return labels_of(prepared(train_file=write(name, {"text": texts, "label": labels}), **settings).train_dataloader())


# Labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "codes"),
    [(["true", "false"], [0, 1]), (["False", "True"], [1, 0]), (["no", "yes"], [1, 0]), (["0", "1"], [1, 0])],
)
def test_truth_values_are_the_names_that_spell_them(write: Any, names: list[str], codes: list[int]) -> None:
    assert train(write, [True, False], label_names=names) == codes


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
@pytest.mark.parametrize("names", [["None", "nan"], ["a", "b"]])
def test_a_missing_label_is_no_name(write: Any, missing: Any, names: list[str]) -> None:
    with pytest.raises(DataError, match="row 1 .*has no label"):
        train(write, [names[0], missing], label_names=names)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["yes", "no", "Yes"], "the label 'yes' is 'Yes' but for case or blanks.*set label_names"),
        (["yes", "no", "no "], "the label 'no ' is 'no' but for case or blanks"),
        (["yes", "no", "NaN"], "the label 'NaN' marks a missing value in many files.*set label_names"),
        (["0", "1", "null"], "the label 'null' marks a missing value"),
        ([[1], [2]], r"row 0 .*has the label \[1\], not one word or number.*data module of your own"),
        (["a", {"b": 1}], r"row 1 .*has the label \{'b': 1\}, not one word"),
        (["9" * 5000, "1"], "For a regression set regression: true"),
    ],
)
def test_labels_that_make_no_classes(write: Any, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        train(write, labels)


def test_names_that_are_given_may_differ_in_case_or_be_nan(write: Any) -> None:
    assert train(write, ["a", "A", "nan"], label_names=["nan", "a", "A"]) == [1, 2, 0]


@pytest.mark.parametrize("number", [10**400, 1e39, "1e39", "-inf", "1_000", [1.0]])
def test_numbers_that_float32_does_not_hold(write: Any, number: Any) -> None:
    with pytest.raises(DataError, match="row 1 .*has the label .*needs a finite number"):
        train(write, [1.0, number], regression=True)


def unlabelled(write: Any, labels: list[Any], **settings: Any) -> bool:
    file = write("test.json", {"text": ["a"] * len(labels), "label": labels})
    (loader,) = prepared(test_file=file, **settings).test_dataloader()
    return "labels" not in next(iter(loader))


@pytest.mark.parametrize("labels", [[-1, -1], ["-1", "-1"], [-1.0, -1], [None, None], ["", ""], [None, -1]])
def test_labels_hidden_in_every_row_of_a_test_set(write: Any, labels: list[Any]) -> None:
    assert unlabelled(write, labels, label_names=["no", "yes"])
    assert not unlabelled(write, ["no", "yes"], label_names=["no", "yes"])


@pytest.mark.parametrize(("labels", "message"), [([1, -1], "row 1 .*unknown label -1. -1 marks a hidden label"),
                                                 ([1, None], "row 1 .*has no label")])  # fmt: skip
def test_labels_hidden_in_some_rows(write: Any, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        unlabelled(write, labels, label_names=["no", "yes"])
    with pytest.raises(DataError, match=message):
        train(write, labels, label_names=["no", "yes"])


def test_minus_one_that_is_a_class_is_not_hidden(write: Any) -> None:
    assert not unlabelled(write, [-1, -1], label_names=["-1", "1"])


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.json", "a.jsonl"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path: Path, write: Any, name: str) -> None:
    path = Path(write(name, GOOD))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    data = prepared(train_file=str(path))
    assert data.label_names == ["no", "yes"]
    assert labels_of(data.train_dataloader()) == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "text": "b", "label": 0}', "line 1: not valid JSON: an object has a key twice"),
        ("a.json", "[" * 100_000, "not valid JSON: maximum recursion depth"),
        ("a.json", '[{"text": "a", "label": %s}]' % ("9" * 5000), "not valid JSON: Exceeds the limit"),
        ("a.json", '[{"text": "\\ud800", "label": 0}]', "row 0 .*in the column 'text', not a text"),
        ("a.json", '[{"text": ["a", "b"], "label": 0}]', r"row 0 .*has \['a', 'b'\] in the column 'text'"),
        ("a.json", '[{"text": "a", "label": 0}, 3]', "row 1 is '3', not an object"),
        ("a.csv", "text,label\na,1\n\nb,0\n", "row 1 .*has 0 fields"),
    ],
)
def test_files_that_are_no_tables(write: Any, name: str, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(train_file=write(name, content), label_names=["no", "yes"])


def test_messages_do_not_repeat_whole_files(write: Any) -> None:
    for rows in ({"text": [["a"] * 10_000], "label": [0]}, {"text": ["a"], "label": [[1] * 10_000]}):
        with pytest.raises(DataError) as error:
            prepared(train_file=write("a.json", rows), label_names=["a", "b"])
        assert len(str(error.value)) < 1000


def parquet(path: Path, names: list[str], columns: list[Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(c) for c in columns], names), path)
    return str(path)


def test_parquet_files_that_cannot_be_read(tmp_path: Path) -> None:
    twice = parquet(tmp_path / "twice.parquet", ["text", "label", "label"], [["a"], [0], [1]])
    with pytest.raises(DataError, match="names a column twice"):
        prepared(train_file=twice)
    late = pyarrow.array([2**62, 2**62 + 1], type=pyarrow.timestamp("us"))
    with pytest.raises(DataError, match="not a Parquet file that can be read here"):
        prepared(train_file=parquet(tmp_path / "late.parquet", ["text", "label"], [["a", "b"], late]))
    good = Path(parquet(tmp_path / "good.parquet", ["text", "label"], [["a", "b"], [0, 1]]))
    content = good.read_bytes()
    refused = 0
    for cut in range(4, len(content) - 8, 7):  # pyarrow raises OSError and other kinds, according to where
        good.write_bytes(content[:cut] + b"\x00" * (len(content) - cut - 8) + content[-8:])
        try:
            read_table(good)
        except DataError:
            refused += 1
    assert refused > 50


def test_the_name_of_a_folder_is_no_column(tmp_path: Path) -> None:
    file = parquet(tmp_path / "label=1" / "a.parquet", ["text"], [["a", "b"]])
    with pytest.raises(DataError, match="no column 'label'"):
        prepared(train_file=file)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").mkdir()
    (tmp_path / "train.tsv" / "part-0.tsv").touch()
    with pytest.raises(DataError, match=r"train\.tsv is a folder, not a file.*part-0\.tsv\. Name one of them"):
        prepared(train_file=str(tmp_path / "train.tsv"))


@pytest.mark.parametrize("refused", ["read_bytes", "open", "is_file"])
def test_a_file_without_permission(write: Any, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """The tests may run as root, who may read all."""
    file = write("train.tsv", GOOD)

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, refused, deny)
    with pytest.raises(DataError, match=r"train\.tsv can't be read: Permission denied"):
        prepared(train_file=file)


def test_a_home_that_does_not_exist() -> None:
    with pytest.raises(MissingFileError, match="~nobody-here/train.tsv does not exist"):
        prepared(train_file="~nobody-here/train.tsv")
    with pytest.raises(MissingFileError, match="tokenizer folder ~nobody-here/tokenizer does not exist"):
        prepared(train_file="train.tsv", label_names=["a", "b"], tokenizer="~nobody-here/tokenizer")


def test_two_folders_of_one_task(tmp_path: Path) -> None:
    for name in ("sst2", "SST-2"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"several folders of sst2: \['SST-2', 'sst2'\]"):
        Glue("sst2", path=str(tmp_path), tokenizer=make_tokenizer()).prepare_data()


def test_a_column_without_a_name(write: Any) -> None:
    with pytest.raises(DataError, match="has no column None"):
        prepared(train_file=write("train.csv", GOOD), text_column=None)


def test_a_file_without_the_column_of_labels_names_the_way_without(write: Any) -> None:
    with pytest.raises(DataError, match=r"has no column 'lable'.* set label_column to None \(null in YAML\)"):
        prepared(train_file=write("train.csv", GOOD), label_column="lable")


@pytest.mark.parametrize("told", [{"label_names": ["a", "b"]}, {"regression": True}, {"metric_names": ["accuracy"]}])
def test_labels_are_described_and_there_are_none(told: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"there are no labels: leave out {next(iter(told))}"):
        TextData("train.csv", label_column=None, **told)


def test_one_column_in_two_places() -> None:
    for columns in ({"text_column": "a", "text_pair_column": "a"}, {"text_column": "a", "label_column": "a"}):
        with pytest.raises(DataError, match="need a column each"):
            TextData("train.csv", **columns)  # type: ignore[arg-type]


# The cache --------------------------------------------------------------------------------------------------------


def test_a_cache_that_cannot_be_written(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_cache: Path
) -> None:
    file = write("train.csv", GOOD)
    (tmp_path / "taken").touch()
    with pytest.raises(DataError, match="can't be written to .*set cache_dir"):
        prepared(train_file=file, cache_dir=str(tmp_path / "taken"))

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", full)
    with pytest.raises(DataError, match="can't be written to .*No space left on device. Free space"):
        prepared(train_file=file)
    assert list(own_cache.rglob("*.arrow")) == []


# Tokenizers -------------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_files(write: Any, tmp_path: Path) -> None:
    """transformers makes a tokenizer of five special tokens of it, for which every word is unknown."""
    BertConfig().save_pretrained(tmp_path / "model")
    with pytest.raises(DataError, match=r"model' knows no words, only special tokens.*save_pretrained\(folder\)"):
        prepared(train_file=write("train.csv", GOOD), tokenizer=str(tmp_path / "model"))


def test_tokenizer_files_that_are_damaged_or_of_ones_own_code(write: Any, tmp_path: Path) -> None:
    file, folder = write("train.csv", GOOD), tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(MissingFileError, match="No tokenizer could be loaded"):
        prepared(train_file=file, tokenizer=str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    (folder / "mine.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(MissingFileError, match="No tokenizer could be loaded"):
        prepared(train_file=file, tokenizer=str(folder))


@pytest.mark.parametrize("tokenizer", [3, Path("tokenizer"), make_tokenizer().backend_tokenizer])
def test_a_tokenizer_of_another_type(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="tokenizer is .*name a folder or model, or pass a loaded tokenizer"):
        TextData("train.csv", tokenizer=tokenizer)


def test_the_tokenizer_of_another_model_is_taken_when_that_one_runs(write: Any, tmp_path: Path) -> None:
    """Else the second model would be trained on the token ids of the first one."""
    folders = [str(tmp_path / name) for name in "ab"]
    make_tokenizer().save_pretrained(folders[0])
    make_tokenizer(special=False).save_pretrained(folders[1])
    data, found = TextData(write("train.csv", GOOD)), []
    for folder in folders:
        module = SimpleNamespace(tokenizer_source=folder)
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            state=SimpleNamespace(fn="fit"),
            lightning_module=module,
            distributed_sampler_kwargs=None,
            accumulate_grad_batches=1,
            fit_loop=L.Trainer(logger=False, accelerator="cpu").fit_loop,
        )
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        found.append(batch["input_ids"][batch["row_id"] == 2].tolist())
    assert [row[0][: row[0].index(14) + 1] for row in found] == [[2, 14], [14]]


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [lambda **options: Glue("sst2", **options), lambda **options: TextData("a", **options)]
)
@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 2.5), ("batch_size", True), ("eval_batch_size", "8"), ("max_length", None), ("max_length", 0),
     ("num_workers", -1), ("num_workers", None), ("seed", -1), ("seed", 0.5), ("limit_train", 1.0)],
)  # fmt: skip
def test_options_out_of_range_are_refused_at_once(data: Any, name: str, value: Any) -> None:
    with pytest.raises(DataError, match=f"{name} is {value!r}; it must be a whole number, at least "):
        data(**{name: value})


@pytest.mark.parametrize("names", ["ab", [0, 1], ["a", None]])
def test_label_names_of_another_type(names: Any) -> None:
    with pytest.raises(DataError, match="label_names is .*; it must be a list of strings"):
        TextData("train.csv", label_names=names)


def test_more_rows_than_there_are_is_all_of_them(write: Any) -> None:
    assert len(prepared(train_file=write("a.csv", GOOD), limit_train=1000).train_dataloader().dataset) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [Glue, TextData])
def test_all_options_with_types_and_help_are_those_of_a_data_module(make: type) -> None:
    """As ``ildistil fit --data.help Glue`` prints them, though each is written once."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(make, "data")
    actions = {action.dest: action for action in parser._actions}
    described = LoadingOptions.__doc__ or ""
    for field in dataclasses.fields(LoadingOptions):
        action = actions[f"data.{field.name}"]
        first_words = " ".join((action.help or "").split()[:4])
        assert f"{field.name}: {first_words}" in described
        assert action.default == field.default
    parsed = parser.parse_args(["--data.batch_size=3", "--data.group_by_length=false"], _skip_validation=True)
    assert (parsed.data.batch_size, parsed.data.group_by_length) == (3, False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EpochSampler(3, num_replicas=2, rank=2),
        lambda: EpochSampler(3, rank=-1),
        lambda: EpochSampler(0),
        lambda: LengthGroupedSampler([], 2),
        lambda: LengthGroupedSampler([1, 2], 0),
        lambda: TokenBudgetSampler([], 2),
        lambda: TokenBudgetSampler([1, 2], 0),
    ],
)
def test_orders_of_nothing(make: Any) -> None:
    with pytest.raises(DataError):
        make()
