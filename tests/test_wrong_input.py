"""Every mistake on the command line or in a file ends with a sentence and exit code 2; a bug with its traceback."""

import os
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from ildistil import cli
from test_cli import FIT, fails

MINE = """
from ildistil.objectives import Objective

class KeyBug(Objective):
    taps = ("logits",)
    def loss(self, student, teacher, batch):
        return student.logits.mean() * {}["nothing"]

class ShapeBug(Objective):
    taps = ("hidden[-1]",)

    def loss(self, student, teacher, batch):
        return (student.hidden[-1][..., :5] - teacher.hidden[-1]).square().mean()


class ValueBug(KeyBug):
    def loss(self, student, teacher, batch):
        raise ValueError("a bug of mine")

class ConstructorBug(KeyBug):
    def __init__(self, weight: float = 1.0):
        raise RuntimeError("another bug of mine")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and with files that aren't what they should be."""
    folder = tmp_path_factory.mktemp("wrong")
    tiny.save_teacher(folder / "teacher", layers=4)
    tiny.save_data(folder / "glue/sst2")
    quiet = FIT.replace("trainer: {", "trainer: {logger: false, enable_checkpointing: false, ")
    written = {"run.yaml": quiet, "mine.py": MINE, "tab.yaml": "model:\n\tteacher: x\n", "list.yaml": "- 1\n"}
    written |= {"empty.yaml": "", "notes.txt": "Some words.", "bad.ckpt": "no checkpoint", "afile": "x"}
    for name, text in written.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(bytes(range(128, 256)))
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    return folder


@pytest.fixture(autouse=True)
def _here(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.syspath_prepend(str(files))


def words(*options: str) -> tuple[str, ...]:
    return ("fit", "--config=run.yaml", *options)


WRONG_WORDS = [
    (("fit", "--config=rum.yaml"), "There is no file 'rum.yaml'. Did you mean 'run.yaml'?"),
    (("fit", "--config=glue"), "There is no file 'glue'. YAML files beside it: binary.yaml, empty.yaml"),
    (("fit", "--config="), "There is no file ''."),
    (("fit", "--config=binary.yaml"), "binary.yaml can't be read as YAML"),
    (("fit", "--config=tab.yaml"), "tab.yaml can't be read as YAML: while scanning for the next token"),
    (("fit", "--config=list.yaml"), "list.yaml holds a list. A configuration names its parts"),
    (("fit", "--config=empty.yaml"), "empty.yaml holds nothing."),
    (("fit", "--config=notes.txt"), "notes.txt holds a str."),
    (("fit",), "the following arguments are required: model.teacher, data"),
    (words("--preset=pkd", "--preset", "minilm"), "There can be one preset, got pkd and minilm."),
    (words("--model.stages=null"), "model.stages: Expected a Sequence. Got value: None"),
    (words("--model.schedule=linaer"), "Did you mean 'linear' instead of 'linaer'?"),
    (words("--model.balance={by: size}"), "Balance: by: Expected one of 'magnitude', 'gradient'. Got value: size"),
    (words("--model.stages=[{objectives: [attention, tsk], epochs: 1}]"), "A stage names 'tsk'"),
    (words("--objectives=AttentionKL"), "objectives: Expected a dict"),
    (words("--objectives.attention.weight=-1"), "AttentionKL: weight must be a finite number >= 0 or a schedule"),
    (words("--objectives.attention.weight=much"), "AttentionKL: weight: Expected a float"),
    (
        words("--objectives.attention.weight={class_path: Linear, init_args: {start: 1, end: -1}}"),
        "error: Linear",
    ),
    (words("--objectives.hidden.weight=1"), "objectives: Name one of the subclasses of ildistil.objectives.Objective"),
    (words("--objectives.attention.name=kl"), "The objective 'attention' has a name already: leave 'kl' out."),
    (words("--data.batch_size=0"), "error: batch_size is 0; it must be a whole number, at least 1."),
    (words("--data.task=sst"), "error: Unknown GLUE task 'sst'. Did you mean 'sst2'?"),
    (words("--data=LightningDataModule"), "`train_dataloader` must be implemented"),
    (words("--seed_everything=-1"), "seed_everything: Not of type NonNegativeInt"),
    (words("--trainer.accelerator=cpuu"), "You selected an invalid accelerator name"),
    (words("--trainer.max_epoch=2"), "Did you mean 'max_epochs'"),
    (words("--trainer.devices=two"), "`devices` selected with `CPUAccelerator` should be an int > 0."),
    (words("--trainer.max_epochs=-2"), "`max_epochs` must be a non-negative integer or -1."),
    (words("--trainer.max_epochs=many"), "trainer.max_epochs: Expected a int\nGiven value: many"),
    (words("--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/accuracy, mode: up}}"), "`mode`"),
    (words("--trainer.callbacks={class_path: EarlyStopping, init_args: {monitor: val/f2}}"), "metric `val/f2` which"),
    (words("--trainer.callbacks={class_path: ModelCheckpoint, init_args: {monitor: val/f2}}",
           "--trainer.enable_checkpointing=true"), "`ModelCheckpoint(monitor='val/f2')` could not find"),
    (words("--trainer.logger=WandbLogger"), "Requirement 'wandb"),
    (words("--ckpt_path=rum.ckpt"), "There is no file 'rum.ckpt'. Checkpoints beside it: bad.ckpt, other.ckpt."),
    (words("--ckpt_path=https://somewhere/best.ckpt"), "There is no file 'https:"),
    (("validate", "--config=run.yaml", "--ckpt_path=bad.ckpt"), "'bad.ckpt' is no checkpoint that can be read"),
    (("test", "--config=run.yaml", "--ckpt_path=other.ckpt"), "'other.ckpt' holds no transformers student"),
    (words("--model.targets=afile"), "afile is a file. Targets need a folder of their own."),
    (("precompute", "--config=run.yaml", "--estimate=maybe"), "estimate: Expected a bool. Got value: maybe"),
    (("precompute", "--config=run.yaml", "--objectives=null"), "There is no objective."),
    (("finetune", "--preset=pkd"), "unrecognized arguments: --preset=pkd"),
    (("export", "other.ckpt"), "the following arguments are required: output"),
    (("export", "other.ckpt", "afile"), "'afile' is a file. Name a folder."),
    (("export", "other.ckpt", "out", "--tokeniser=x"), "Did you mean 'tokenizer' instead of 'tokeniser'?"),
    (("quickstart", "--seeds=two"), "seeds: Expected a int. Got value: two"),
    (("quickstart", "--output=afile"), "'afile' is a file. Name a folder."),
    (("presets", "tinybert"), "unrecognized arguments: tinybert"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG_WORDS, ids=[" ".join(w)[:60] for w, _ in WRONG_WORDS])
def test_wrong_words(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = fails(capsys, *arguments)
    assert message in said
    assert f"ildistil {arguments[0]}: error: " in said
    assert "Traceback" not in said
    assert "Union" not in said
    assert not Path("config.yaml").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "learning_rate: 0.001",
            "learning_rate: 0.001\n  learning_rate: 1",
            "'learning_rate' twice, in lines 5 and 6.",
        ),
        ("attention: {class_path: AttentionKL}", "task: {class_path: TaskLoss}", "has 'task' twice, in lines 7 and 8."),
        ("learning_rate: 0.001", "stages: null", "model.stages: Expected a Sequence. Got value: None"),
        ("learning_rate: 0.001", "learning_rate:", "model.learning_rate: Expected a float. Got value: None"),
        ("{max_epochs: 1, accelerator: cpu, enable_progress_bar: false}", "[0]", "'trainer' is [0]. It holds values"),
        ("{max_epochs: 1, accelerator: cpu, enable_progress_bar: false}", "", "'trainer' is None. It holds values"),
        ("{class_path: AttentionKL}", "null", "Not a valid subclass of Objective. Got value: None. Name one by class"),
        ("{class_path: AttentionKL}", "{class_path: nowhere.KL}", "No module named 'nowhere'"),
        ("{class_path: AttentionKL}", "{class_path: pathlib.Path}", "pathlib.Path is not imported: classes come from"),
        ("{class_path: AttentionKL}", "{class_path: AttentionKL, weight: 2}", "line 7: write 'weight' under init_args"),
        (
            "{class_path: AttentionKL}",
            "{class_path: null}",
            "line 7: class_path is 'null'. Name a class, such as Atten",
        ),
        ("{class_path: AttentionKL}", "{class_path: [AttentionKL]}", "line 7: class_path is a sequence. Name a class"),
        ("{class_path: AttentionKL}", "{class_path: 1:2}", "line 7: class_path is '1:2'. Name a class"),
        (
            "{class_path: AttentionKL}",
            "{class_path: AttentionKL, init_args: {weight: much}}",
            "wrong.yaml: objectives.attention: AttentionKL: weight: Expected a float",
        ),
        (
            "{class_path: AttentionKL}",
            "{class_path: AttentionKL, init_args: {mapping: Unifrom}}",
            "wrong.yaml: objectives.attention: AttentionKL: mapping: there is no class 'Unifrom' for this",
        ),
        (
            "{class_path: AttentionKL}",
            "AttentoinKL",
            "wrong.yaml: objectives.attention: there is no class 'AttentoinKL'",
        ),
        (
            "{class_path: AttentionKL}",
            "{class_path: AttentionKL, init_args: }",
            "line 7: init_args holds no options by",
        ),
        ("{class_path: Glue", "{class_path: AttentionKL", "wrong.yaml: data: "),
        ("path: ./teacher", "path: ./teacher/config.json", "'./teacher/config.json' is a file. Name the folder of a"),
        ("path: ./teacher", "path: ./taecher", "There is no folder './taecher'. Folders beside it: "),
        ("path: ./teacher", "path: ./taecher", "Did you mean './teacher'?"),
        ("  attention: {class", "  - {class", "can't be read as YAML"),
        ("trainer:", "trianer:", "Did you mean 'trainer' instead of 'trianer'?"),
    ],
)
def test_wrong_files(old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert old in FIT
    Path("wrong.yaml").write_text(FIT.replace(old, new))
    said = fails(capsys, "fit", "--config=wrong.yaml")
    assert message in said
    assert "ildistil fit: error: " in said


def test_objectives_as_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(FIT)
    config["objectives"] = [{"class_path": "AttentionKL"}]
    Path("wrong.yaml").write_text(yaml.safe_dump(config))
    assert "objectives: Expected a dict" in fails(capsys, "fit", "--config=wrong.yaml")


def test_a_backend_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ILDISTIL_KERNELS", "fast")
    assert "ILDISTIL_KERNELS" in fails(capsys, *words())
    monkeypatch.setenv("ILDISTIL_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "error: " in fails(capsys, *words())


@pytest.mark.parametrize(
    ("name", "error"), [("KeyBug", KeyError), ("ValueBug", ValueError), ("ConstructorBug", RuntimeError)]
)
def test_a_bug_of_ones_own_keeps_its_traceback(name: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        cli.main(words(f"--objectives.bug=mine.{name}"))
    assert caught.traceback[-1].path.name == "mine.py"


def test_a_bug_that_torch_finds_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="size of tensor a") as caught:
        cli.main(words("--objectives.bug=mine.ShapeBug"))
    assert "mine.py" in [entry.path.name for entry in caught.traceback]


def test_the_traceback_of_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ILDISTIL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="batch_size is 0"):
        cli.main(words("--data.batch_size=0"))


def test_a_run_without_a_logger_leaves_nothing_in_the_working_folder() -> None:
    before = set(os.listdir())
    cli.main(words("--trainer.fast_dev_run=true"))
    cli.main(words())
    cli.main(words())
    assert set(os.listdir()) - before <= {"cache", "__pycache__"}
