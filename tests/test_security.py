"""What docs/security.md says is never run, isn't: each test plants code that would leave a mark."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig

import tiny
from ildistil import cli, objectives
from ildistil.data import Glue, TextData
from ildistil.errors import CheckpointError, DataError, IldistilError, MissingFileError, ModelError
from ildistil.students import StudentOptions, init_student, load, pretrained
from ildistil.students.tokenizers import load_tokenizer
from ildistil.teachers import StoredTeacher, precompute
from ildistil.training import load_student, save_student

FIT = """
model:
  teacher: {class_path: pretrained, init_args: {path: ./teacher}}
  student: {layers: [1]}
objectives: {task: {class_path: TaskLoss}}
data: {class_path: Glue, init_args: {task: sst2, path: glue, cache_dir: cache}}
trainer: {max_epochs: 1, logger: false, enable_checkpointing: false, accelerator: cpu}
"""
MARK = "import pathlib; pathlib.Path({mark!r}).touch()\n"
KINDS = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForSequenceClassification": "Model"}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where planted code would leave its mark; whoever asks on standard input gets a yes, and fails the test."""
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")
    yield tmp_path / "mark"
    assert not (tmp_path / "mark").exists(), "planted code ran"
    assert asked == []


def with_code(folder: Path, mark: Path, kind: str) -> Path:
    """A model and its tokenizer that bring code of their own."""
    save_student(tiny.bert(1, labels=2), folder, tiny.tokenizer())
    (folder / "checksums.json").unlink()
    maps = {name: f"mine.{of}" for name, of in KINDS.items()} | {"AutoTokenizer": ["mine.Tokens", None]}
    for name in ("config.json", "tokenizer_config.json"):
        said = json.loads((folder / name).read_text())
        said |= {"auto_map": maps, "model_type": kind, "trust_remote_code": True, "tokenizer_class": "Tokens"}
        (folder / name).write_text(json.dumps(said))
    (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "mine.py"}))
    (folder / "mine.py").write_text(MARK.format(mark=str(mark)) + "class Config: pass\nModel = Tokens = Config\n")
    return folder


@pytest.mark.parametrize("kind", ["bert", "unheard-of"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, mark: Path, kind: str) -> None:
    folder, teacher = str(with_code(tmp_path / "model", mark, kind)), tiny.bert(2, labels=2)
    tiny.save_teacher(tmp_path / "teacher")
    trials = [
        lambda: load(folder),
        lambda: load(folder, "none"),
        lambda: pretrained(folder, config={"hidden_dropout_prob": 0.0}).load(),
        lambda: StudentOptions(path=folder).make(teacher, pretrained(str(tmp_path / "teacher"))),
        lambda: StudentOptions(layers=[1], source=folder).make(teacher, pretrained(folder)),
        lambda: load_tokenizer(folder),
    ]
    for trial in trials:
        try:
            trial()
        except IldistilError:
            assert kind == "unheard-of" or trial is trials[-1] or trial in trials[3:5]


@pytest.mark.parametrize("key", ["trust_remote_code", "auto_map", "custom_generate"])
def test_nobody_can_ask_for_code_to_be_run(tmp_path: Path, mark: Path, key: str) -> None:
    folder = str(with_code(tmp_path / "model", mark, "bert"))
    for trial in (
        lambda: load(folder, config={key: True}),
        lambda: pretrained(folder, config={key: True}).load(),
        lambda: init_student(tiny.bert(2), [1], {key: True}),
        lambda: StudentOptions(layers=[1], config={key: True}).make(tiny.bert(2), pretrained(folder)),
    ):
        with pytest.raises(ModelError, match=f"has no '{key}': code that comes with a model is never run"):
            trial()


def test_attention_that_would_be_fetched_from_the_hub_is_refused(tmp_path: Path, mark: Path) -> None:
    folder = with_code(tmp_path / "model", mark, "bert")
    with pytest.raises(ModelError, match="names 'some/kernel' as its attention"):
        load(str(folder), config={"_attn_implementation": "some/kernel"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | {"attn_implementation": "some/kernel"}))
    with pytest.raises(ModelError, match="names 'some/kernel' as its attention"):
        load(str(folder))
    with pytest.raises(ModelError, match="names 'some/kernel' as its attention"):
        init_student(tiny.bert(2), [1], {"_attn_implementation": "some/kernel"})


ASKED = """
import sys
from ildistil.errors import IldistilError
from ildistil.students import load
from ildistil.students.tokenizers import load_tokenizer
for trial in (load, load_tokenizer):
    try:
        trial(sys.argv[1])
    except IldistilError as error:
        print(type(error).__name__)
print(repr(sys.stdin.read()))
"""


def test_standard_input_is_not_read(tmp_path: Path, mark: Path) -> None:
    folder = with_code(tmp_path / "model", mark, "unheard-of")
    ran = subprocess.run(
        [sys.executable, "-c", ASKED, str(folder)], input="y\ny\n", capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert ran.stdout.splitlines() == ["ModelError", "MissingFileError", repr("y\ny\n")], ran.stderr


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.mark),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_are_pickled_code_are_not_run(tmp_path: Path, mark: Path, name: str, zipped: bool) -> None:
    tiny.save_teacher(tmp_path / "model", layers=1)
    (tmp_path / "model" / "model.safetensors").unlink()
    content = {"bert.pooler.dense.bias": torch.zeros(32), "x": Bomb(mark)}
    if zipped:
        torch.save(content, tmp_path / "model" / name)
    else:
        (tmp_path / "model" / name).write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match="can't be loaded"):
        load(str(tmp_path / "model"))


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_that_are_pickled_code_are_not_run(tmp_path: Path, mark: Path, zipped: bool) -> None:
    path = tmp_path / "run.ckpt"
    content = {"state_dict": {}, "x": Bomb(mark)}
    torch.save(content, path) if zipped else path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match="is no checkpoint that can be read"):
        load_student(path)


def test_a_checkpoint_names_models_of_transformers_only(tmp_path: Path, mark: Path) -> None:
    tiny.save_teacher(tmp_path / "teacher")
    for architecture, config in (("pipeline", {}), ("AutoModel", {}), ("os", {}), ("BertModel", {"kernel": 1})):
        attention = {"attn_implementation": "some/kernel"} if config else {}
        said = {
            "format": 1, "student": {"architecture": architecture, "config": BertConfig().to_dict() | attention},
            "teacher": None, "tokenizer": None, "objectives": {}, "stages": {}, "projections": {}, "metrics": {},
        }  # fmt: skip
        torch.save({"ildistil": said, "state_dict": {}}, tmp_path / "run.ckpt")
        with pytest.raises(IldistilError):
            load_student(tmp_path / "run.ckpt")


def test_scripts_of_data_sets_are_not_run(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for place in ("nyu-mll/glue", "glue", "glue/sst2"):
        Path(place).mkdir(parents=True, exist_ok=True)
        (Path(place) / f"{Path(place).name}.py").write_text(MARK.format(mark=str(mark)))
    tiny.tokenizer().save_pretrained("tokens")
    for path in (None, "glue", "nyu-mll"):
        with pytest.raises((DataError, MissingFileError)):
            Glue("sst2", path=path, tokenizer="tokens").prepare_data()


# Classes ----------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *words])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; what is put on Python's path here doesn't stay."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("run.yaml").write_text(FIT)
    return folder


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "this.Zen", "builtins.eval", "torch.os.system"])
def test_classes_of_python_itself_are_not_named(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    said = run(capsys, "--config=run.yaml", f"--data={name}")
    assert f"{name.removeprefix('torch.')} is not imported" in said.replace("posix", "os")
    Path("other.yaml").write_text(FIT.replace("class_path: Glue", f"class_path: {name}"))
    assert "is not imported: classes come from installed packages" in run(capsys, "--config=other.yaml")
    assert "this" not in sys.modules


def test_modules_from_elsewhere_are_not_imported(
    here: Path, tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "planted_space").mkdir(parents=True)
    for place in ("planted_a.py", "planted_space/inner.py"):
        (elsewhere / place).write_text(MARK.format(mark=str(mark)) + "class Own: pass\n")
    monkeypatch.syspath_prepend(str(elsewhere))
    for name in ("planted_a.Own", "planted_space.inner.Own"):
        assert f"{name} is not imported" in run(capsys, "--config=run.yaml", f"--data={name}")
    # Nor is it where a file of this name is beside, since another would be found first.
    Path("planted_a.py").write_text("class Own: pass\n")
    assert "planted_a.Own is not imported" in run(capsys, "--config=run.yaml", "--data=planted_a.Own")


def test_modules_beside_are_imported_only_if_named(
    here: Path, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lazy imports of libraries would else find files that have the names of packages that aren't installed."""
    for name in ("flash_attn", "deepspeed", "planted_b"):
        Path(f"{name}.py").write_text(MARK.format(mark=str(mark)))
    run(capsys, "--config=run.yaml", "--data.batch_size=0")
    assert str(here) not in sys.path


OWN = """
from {helper} import Helped
from ildistil.objectives import Objective

class Own(Helped): pass
"""
HELPER = """
from ildistil.objectives import Objective

class Helped(Objective):
    taps = ()
    def loss(self, student, teacher, batch):
        raise NotImplementedError
"""


def test_modules_beside_the_file_and_in_the_working_folder_are_imported(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, folder in enumerate((here, tmp_path / "configs")):
        folder.mkdir(exist_ok=True)
        own, helper = f"own_module_{number}", f"own_helper_{number}"
        (folder / f"{own}.py").write_text(OWN.format(helper=helper))
        (folder / f"{helper}.py").write_text(HELPER)
        for name in (f"{own}.Own", f"{own}.Helped"):
            (folder / "own.yaml").write_text(FIT.replace("class_path: TaskLoss", f"class_path: {name}"))
            said = run(capsys, f"--config={folder / 'own.yaml'}", "--data.batch_size=0")
            assert "batch_size is 0" in said


def test_files_have_the_umask_of_their_user(tmp_path: Path) -> None:
    data = tmp_path / "train.csv"
    data.write_text("text,label\ngood film,yes\nbad film,no\n")
    before = os.umask(0o027)
    try:
        save_student(tiny.bert(1), tmp_path / "student", tiny.tokenizer())
        stored = StoredTeacher(tmp_path / "targets", tiny.bert(2))
        precompute(stored, [objectives.LogitsKL()], tiny.bert(1), [tiny.batch()], report=str)
        TextData(data, tokenizer=tiny.tokenizer(), cache_dir=str(tmp_path / "cache")).prepare_data()
    finally:
        os.umask(before)
    files = [file for name in ("student", "targets", "cache") for file in (tmp_path / name).rglob("*")]
    assert len(files) > 8
    for file in files:
        assert file.stat().st_mode & 0o777 == (0o750 if file.is_dir() else 0o640), file
