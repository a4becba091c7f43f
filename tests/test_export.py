"""Exports: whole or not there, verified, and never without a tokenizer or with weights that are no numbers."""

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, PreTrainedModel

import tiny
from ildistil import Distiller, storage
from ildistil.errors import CheckpointError, DataError, ModelError, NotFiniteError
from ildistil.students import load
from ildistil.students.tokenizers import load_tokenizer
from ildistil.training import export, save_student
from test_distiller import trainer


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    save_student(tiny.bert(1, labels=2, max_position_embeddings=128), tmp_path / "student", tiny.tokenizer())
    return tmp_path / "student"


def test_every_flip_in_an_export_is_noticed(exported: Path) -> None:
    draw = random.Random(0)
    files = [file for file in exported.iterdir() if file.name != "model.safetensors"] + [
        exported / "model.safetensors"
    ] * 3
    for number in range(100):
        file = files[number % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"(is damaged|is missing).* if it was changed on purpose, delete checks"):
            load(str(exported))
        file.write_bytes(whole)
    load(str(exported))
    (exported / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged.* Export it again"):
        load_tokenizer(str(exported))
    (exported / storage.MANIFEST).unlink()
    load(str(exported))


def test_an_export_loads_in_plain_transformers(exported: Path) -> None:
    assert AutoModelForSequenceClassification.from_pretrained(exported).config.num_labels == 2
    assert AutoTokenizer.from_pretrained(exported)("good film")["input_ids"] == [2, 4, 8, 3]


def test_an_export_that_is_killed_leaves_nothing_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(self: PreTrainedModel, folder: Any, **_: Any) -> None:
        (Path(folder) / "config.json").write_text("{")
        raise KeyboardInterrupt

    checkpoint, folder = checkpointed(tmp_path), tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr(PreTrainedModel, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            export(str(checkpoint), str(folder))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "out"))) == []
    export(str(checkpoint), str(folder))
    with pytest.raises(CheckpointError, match="not empty"):
        export(str(checkpoint), str(folder))
    export(str(checkpoint), str(folder), overwrite=True)
    load(str(folder))


def checkpointed(folder: Path) -> Path:
    tiny.save_teacher(folder / "teacher", layers=1)
    module = Distiller(tiny.bert(1, labels=2), None, tokenizer=str(folder / "teacher"))
    run = trainer(max_epochs=1)
    run.strategy.connect(module)
    run.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_exported(tmp_path: Path, value: float) -> None:
    student = tiny.bert(1)
    student.classifier.bias.data[1] = value
    with pytest.raises(NotFiniteError, match=r"classifier\.bias of the student has values that are NaN or infinite"):
        save_student(student, tmp_path / "student", tiny.tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_no_student_without_words(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="knows no words"):
        load_tokenizer(str(tmp_path / "bare"))
    with pytest.raises(DataError, match="knows no words"):
        save_student(tiny.bert(1), tmp_path / "student", AutoTokenizer.from_pretrained(tmp_path / "bare"))
    assert not (tmp_path / "student").exists()
    with pytest.raises(CheckpointError, match="knows no words.* Name the student's: --tokenizer"):
        export(str(checkpointed(tmp_path)), str(tmp_path / "student"), tokenizer=str(tmp_path / "bare"))
