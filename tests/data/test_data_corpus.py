"""A corpus as a data module: its rows, labels and batches, on any number of processes and workers."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from corpora import tokenizer, write_corpus
from ildistil.data import Corpus, task_of
from ildistil.data.masking import Masking
from ildistil.errors import DataError, MissingFileError

FIT_LOOP = L.Trainer(logger=False, accelerator="cpu", barebones=True).fit_loop
Make = Callable[..., Corpus]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of text, and the cache that all tests here share."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "train.txt", 120)
    write_corpus(folder / "val.txt", 20, first=500)
    return folder


@pytest.fixture
def make(folder: Path) -> Make:
    def make(ranks: int = 1, rank: int = 0, accumulate: int = 1, **options: Any) -> Corpus:
        defaults = {"tokenizer": tokenizer(), "max_length": 16, "batch_size": 8, "processes": 1, "seed": 3}
        if "tokens_per_batch" in options:
            del defaults["batch_size"]
        data = Corpus(**{"files": str(folder / "train.txt"), "cache_dir": str(folder / "cache"), **defaults, **options})
        data.prepare_data()
        data.setup("fit")
        data.trainer = SimpleNamespace(  # type: ignore[assignment]
            distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank},
            accumulate_grad_batches=accumulate,
            overfit_batches=0,
            fit_loop=FIT_LOOP,
        )
        return data

    return make


def epoch(data: Corpus, number: int = 0, first: int = 0) -> list[dict[str, Tensor]]:
    """The batches of an epoch, from one on."""
    loader: Any = data.train_dataloader()
    loader.sampler.go_on(number, first * (loader.batch_size or 1))
    return list(loader)


def content(batches: list[dict[str, Tensor]]) -> list[tuple[Any, ...]]:
    """Rows in their order, without their padding."""
    return [
        (int(row), *(batch[name][i][mask.bool()].tolist() for name in ("input_ids", "labels") if name in batch))
        for batch in batches
        for i, (row, mask) in enumerate(zip(batch["row_id"], batch["attention_mask"], strict=True))
    ]


def same(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


def test_the_labels_of_each_kind(make: Make) -> None:
    plain, following, masked = (epoch(make(labels=labels)) for labels in ("none", "next", "masked"))
    assert [set(batches[0]) for batches in (plain, following, masked)] == [
        {"input_ids", "attention_mask", "row_id"}, *[{"input_ids", "attention_mask", "row_id", "labels"}] * 2
    ]  # fmt: skip
    rows = make(labels="none")._splits["train"]
    for batch, shifted, hidden in zip(plain, following, masked, strict=True):
        real = batch["attention_mask"].bool()
        for i, row in enumerate(batch["row_id"].tolist()):
            assert batch["input_ids"][i][real[i]].tolist() == rows[row]["input_ids"].tolist()
        assert torch.equal(shifted["labels"], torch.where(real, batch["input_ids"], -100))
        targets = hidden["labels"] != -100
        assert torch.equal(hidden["labels"][targets], batch["input_ids"][targets])
        assert torch.equal(hidden["input_ids"][~targets], batch["input_ids"][~targets])
        assert (targets.sum(1) > 0).all()
        assert not (targets & ~real).any()
        assert {value.dtype for value in hidden.values()} == {torch.int64}
    assert sorted(row for row, *_ in content(plain)) == list(range(len(rows)))


def test_padding_is_on_the_tokenizers_side(make: Make) -> None:
    for side in ("left", "right"):
        batch = epoch(make(labels="next", packed=False, tokenizer=tokenizer(padding_side=side)))[1]
        mask = batch["attention_mask"]
        ends = mask[:, -1] if side == "left" else mask[:, 0]
        assert ends.all()
        after_padding = (mask[:, 1:] == 1) & (mask[:, :-1] == 0)  # what would be predicted from padding
        assert (after_padding.sum(1) == (mask == 0).any(1) * (side == "left")).all()
        unpredicted = torch.cat([mask[:, :1] == 0, (mask[:, 1:] == 0) | after_padding], dim=1)
        assert (unpredicted == (batch["labels"] == -100)).all()
        assert (batch["input_ids"][mask == 0] == 0).all()


def test_next_tokens_do_not_depend_on_the_side_of_padding(make: Make) -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=len(tokenizer()), n_positions=64)
    ).eval()
    sums: dict[str, float] = {}
    for side in ("left", "right"):
        found = 0.0
        for batch in epoch(make(labels="next", packed=False, tokenizer=tokenizer(padding_side=side))):
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
            inputs = {key: value for key, value in batch.items() if key != "row_id"}
            with torch.no_grad():
                loss = model(**inputs, position_ids=positions).loss
            found += float(loss * (batch["labels"][:, 1:] != -100).sum())
        sums[side] = found
    assert sums["left"] == pytest.approx(sums["right"], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"whole_words": True}, {"packed": False}, {"limit_train": 50},
                                     {"packed": False, "tokens_per_batch": 100}])  # fmt: skip
def test_masks_do_not_depend_on_workers_ranks_and_batches(make: Make, options: dict[str, Any]) -> None:
    alone = [content(epoch(make(labels="masked", **options), number)) for number in range(3)]
    assert len({str(sorted(each)) for each in alone}) == 3
    by_row = [{row[0]: row for row in each} for each in alone]
    data = make(labels="masked", num_workers=2, **options)
    loader: Any = data.train_dataloader()  # the same workers for all epochs
    for number in range(3):
        loader.sampler.set_epoch(number)
        assert content(list(loader)) == alone[number]
    other_size = {"tokens_per_batch": 60} if "tokens_per_batch" in options else {"batch_size": 5}
    ranks = [content(epoch(make(2, rank, labels="masked", **options | other_size), 1)) for rank in range(2)]
    for row in [row for rank in ranks for row in rank]:
        assert row == by_row[1][row[0]]
    assert {row[0] for rank in ranks for row in rank} == by_row[1].keys()


@pytest.mark.parametrize("options", [{}, {"packed": False}, {"packed": False, "group_by_length": False},
                                     {"packed": False, "tokens_per_batch": 100}])  # fmt: skip
def test_a_step_has_the_same_rows_however_it_is_shared(make: Make, options: dict[str, Any]) -> None:
    """8 rows a step: of one process, of two or four, or accumulated; also from any step on."""

    def steps(ranks: int, accumulate: int, first: int = 0) -> list[list[tuple[Any, ...]]]:
        size = {} if "tokens_per_batch" in options else {"batch_size": 8 // ranks // accumulate}
        shares = [epoch(make(ranks, rank, accumulate, labels="masked", **options | size), 1, first * accumulate)
                  for rank in range(ranks)]  # fmt: skip
        batches = [content(list(each)) for each in zip(*shares, strict=True)]
        windows = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
        return [sorted(row for batch in window for row in batch) for window in windows]

    budget = "tokens_per_batch" in options  # there a step is as many batches
    shapes = [(4, 1), (2, 2), (1, 4)] if budget else [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 8)]
    whole, *others = [steps(*shape) for shape in shapes]
    assert len(whole) >= 5
    for each in others:
        assert each[:-1] == whole[:-1]
        # Of a last step that is not whole, ranks repeat a row or so.
        assert {row[0] for row in each[-1]} >= {row[0] for row in whole[-1]}
    for shape in shapes[1:4]:
        assert steps(*shape, first=3)[:-1] == whole[3:-1]


def test_validation_rows_are_masked_alike_in_every_epoch(make: Make, folder: Path) -> None:
    data = make(labels="masked", validation_files=str(folder / "val.txt"))
    first, again = (list(data.val_dataloader()[0]) for _ in range(2))
    assert same(first, again)
    loader: Any = data.val_dataloader()[0]
    loader.sampler.set_epoch(5)
    assert same(first, list(loader))
    assert {batch["row_id"].max().item() for batch in first} != {0}


def test_held_out_rows(make: Make) -> None:
    data, whole = make(validation_share=0.2), make()
    train, held_out = data._splits["train"], data._splits["validation"]
    assert 0 < len(held_out) < len(train)
    assert abs(train.tokens + held_out.tokens - whole._splits["train"].tokens) < 2 * 16


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_like_files(make: Make, folder: Path, streaming: bool) -> None:
    hub = folder / "hub"
    hub.mkdir(exist_ok=True)
    lines = (folder / "train.txt").read_text().splitlines()
    (hub / "train.jsonl").write_text("\n".join(json.dumps({"body": line}) for line in lines))
    data = make(files=None, dataset=str(hub), text_column="body", streaming=streaming, labels="next")
    assert content(epoch(data)) == content(epoch(make(labels="next")))


def test_what_it_tells_of_its_task(make: Make, folder: Path) -> None:
    data = make(labels="masked", validation_share=0.2)
    task = task_of(data)
    assert (task.task_name, task.label_names, task.num_labels, task.regression) == ("corpus", None, None, False)
    assert (task.primary_metric, task.primary_mode, task.metrics()) == ("loss", "min", None)
    assert (task.validation_names, task.max_length, data.validation_required) == (["val"], 16, False)
    assert task.tokenizer is data.tokenizer
    assert make().validation_names == []
    assert make().val_dataloader() == []


def test_the_fingerprint_is_of_all_that_decides_the_batches(make: Make, folder: Path) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"seed": 4}, {"labels": "next"}, {"labels": "masked"}, {"labels": "masked", "mask_probability": 0.2},
        {"labels": "masked", "whole_words": True}, {"packed": False}, {"packed": False, "group_by_length": False},
        {"packed": False, "tokens_per_batch": 90}, {"limit_train": 9}, {"max_length": 12},
        {"files": str(folder / "val.txt")}, {"validation_share": 0.2},
    ]  # fmt: skip
    told = [make(**change).fingerprint for change in changes]
    assert len(set(told)) == len(told)
    assert make(num_workers=2, batch_size=4, eval_batch_size=2).fingerprint == told[0]  # a step's size is told apart


def test_every_row_is_there_once_and_masked_ones_are_refused(make: Make) -> None:
    for labels in ("none", "next"):
        data = make(2, 1, labels=labels)
        seen = content(list(task_of(data).every_row()))
        assert sorted(row for row, *_ in seen) == list(range(len(data._splits["train"])))
    with pytest.raises(DataError, match="masked anew in each epoch.*labels='none' or 'next'"):
        make(labels="masked").every_row()


def test_a_plan_of_what_is_read(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data = make(labels="masked", validation_share=0.2)
    rows = data._splits["train"]
    assert f"Corpus: {len(rows):,} rows, {rows.tokens:,} tokens, labels: masked" in caplog.text
    assert f"an epoch: {-(-len(rows) // 8):,} steps of 8 rows" in caplog.text
    assert "validation: " in caplog.text


def test_padded_rows_are_masked_as_they_stand_alone(make: Make) -> None:
    data = make(labels="masked", packed=False, whole_words=True)
    masking = Masking.of(data.tokenizer, whole_words=True, seed=3)
    for row, seen, labels in content(epoch(data, 2))[:30]:
        stored = data._splits["train"][row]
        ids = stored["input_ids"][None]
        expected = masking(ids, ids > 0, np.array([row]), np.array([2]), stored["word_starts"][None])
        assert (seen, labels) == tuple(each[0].tolist() for each in expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": None}, "made of files or of a dataset, got neither"),
        ({"dataset": "wiki"}, "made of files or of a dataset, got both"),
        ({"streaming": True}, "streaming belong to a dataset"),
        ({"group_by_length": True}, "Packed rows are all of max_length tokens"),
        ({"tokens_per_batch": 64}, "Packed rows are all of max_length tokens"),
        ({"validation_share": 1.0}, r"validation_share is 1\.0; it must be at least 0 and below 1"),
        ({"validation_share": 0.1, "validation_files": "val.txt"}, "both say what to validate on"),
        ({"labels": "mlm"}, "labels is 'mlm'; it must be 'masked', 'next' or 'none'"),
        ({"mask_probability": 0}, "mask_probability is 0; it must be above 0"),
        ({"mask_probability": True}, "mask_probability is True"),
        ({"whole_words": True}, "whole_words masks whole words, and labels is 'none'"),
        ({"processes": 0}, "processes is 0"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Corpus(**{"files": "train.txt", **options})


def test_what_cannot_be_served(make: Make, folder: Path) -> None:
    with pytest.raises(DataError, match="no mask token, which labels='masked' needs. Use labels='next'"):
        make(labels="masked", tokenizer=tokenizer(mask_token=None))
    for stage in ("test", "predict"):
        with pytest.raises(DataError, match=f"A Corpus has no rows to {stage} with"):
            make().setup(stage)
    with pytest.raises(DataError, match="nothing to validate on. Set validation_files or validation_share"):
        make().setup("validate")
    with pytest.raises(DataError, match="for validation keeps 0 of 120 documents: too few"):
        make(validation_share=1e-9)
    with pytest.raises(MissingFileError, match="nothing.txt"):
        make(files=str(folder / "nothing.txt"))
    (folder / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="is empty: it holds no text"):
        make(files=str(folder / "empty.txt"))
    with pytest.raises(DataError, match="max_length is 129, but the tokenizer's model takes 128"):
        make(max_length=129)
