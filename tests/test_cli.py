import csv
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import tiny
from ildistil import cli
from ildistil.commands import predict
from ildistil.data.task import task_of
from ildistil.errors import DataError
from ildistil.teachers.making import Maker

FIT = """
model:
  teacher: {class_path: pretrained, init_args: {path: ./teacher}}
  student: {layers: [1, 2]}
  learning_rate: 0.001
objectives:
  attention: {class_path: AttentionKL}
  task: {class_path: TaskLoss, init_args: {weight: 0.5}}
data: {class_path: Glue, init_args: {task: sst2, path: glue, batch_size: 8, cache_dir: cache}}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
"""

OWN_DATA = """
import lightning as L
from test_distiller import loader

class Own(L.LightningDataModule):
    label_names = ["negative", "positive"]
    validation_names = ["dev"]
    primary_metric = "loss"

    def train_dataloader(self):
        return loader(labels=2)

    def val_dataloader(self):
        return loader(rows=8, labels=2)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a teacher, data, and a run's YAML file."""
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(Path("teacher"), layers=4)
    tiny.save_data(Path("glue/sst2"))
    Path("run.yaml").write_text(FIT)
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_from_a_pretrained_model_to_an_exported_student(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """finetune, export the teacher, fit, validate, predict, export the student."""
    data = ("--data.path=glue", "--data.batch_size=8", "--data.cache_dir=cache")
    quick = ("--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
    base = transformers.AutoModel.from_pretrained("teacher")
    base.save_pretrained("base")  # no head, as pretrained encoders come
    tiny.tokenizer().save_pretrained("base")
    cli.main(["finetune", "--model.path=./base", "--data=Glue", "--data.task=sst2", *data, *quick])
    assert "Best student: runs/finetune/version_0/checkpoints/best.ckpt (val/accuracy = " in capsys.readouterr().out
    cli.main(["export", "runs/finetune/version_0/checkpoints/best.ckpt", "tuned"])
    assert transformers.AutoConfig.from_pretrained("tuned").id2label == {0: "negative", 1: "positive"}

    cli.main(["fit", "--config=run.yaml", "--model.teacher.path=./tuned"])
    best = "runs/fit/version_0/checkpoints/best.ckpt"
    cli.main(["validate", "--config=run.yaml", "--ckpt_path", best])
    cli.main(["predict", "--config=run.yaml", "--ckpt_path", best])
    predictions = Path("runs/predict/version_0/predictions.tsv").read_text().splitlines()
    cli.main(["export", best, "student"])

    model, info = transformers.AutoModelForSequenceClassification.from_pretrained("student", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_hidden_layers == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained("student")
    rows = [line.split("\t")[0] for line in Path("glue/sst2/validation.tsv").read_text().splitlines()[1:]]
    assert predictions[0].split("\t") == ["row_id", "prediction", "p_negative", "p_positive"]
    for number, (text, line) in enumerate(zip(rows, predictions[1:], strict=True)):
        with torch.no_grad():
            p = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        row, label, *probabilities = line.split("\t")
        assert int(row) == number
        assert label == model.config.id2label[int(p.argmax())]
        assert [float(x) for x in probabilities] == pytest.approx(p.tolist(), abs=1e-4)
    card = Path("student/README.md").read_text()
    assert "Initialised from the teacher's layers 1, 2" in card
    assert "AttentionKL(mapping=Uniform(), weight=1.0)" in card
    assert "not empty" in fails(capsys, "export", best, "student")


def test_resuming_from_the_last_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--config=run.yaml"])
    last = "runs/fit/version_0/checkpoints/last.ckpt"
    longer = ["fit", "--resume", "--run=runs/fit/version_0", "--trainer.max_epochs=2"]
    assert "steps: 3 in the checkpoint, 6 now" in fails(capsys, *longer)
    assert torch.load(last, weights_only=True)["global_step"] == 3
    with pytest.warns(UserWarning, match="Training goes on in another way"):
        cli.main([*longer, "--model.accept_changes=true"])
    assert torch.load(last, weights_only=True)["global_step"] == 6


def test_a_checkpoint_of_another_student_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--config=run.yaml"])
    best = "--ckpt_path=runs/fit/version_0/checkpoints/best.ckpt"
    error = fails(capsys, "validate", "--config=run.yaml", "--model.student.layers=[1,2,3]", best)
    assert "The checkpoint is of another student than this run's." in error
    assert 'Missing key(s) in state_dict: "distillation.student.bert.encoder.layer.2.' in error


def test_the_last_checkpoint_is_of_the_last_epoch(folder: Path) -> None:
    """Also where no epoch after the first is better."""
    cli.main(["fit", "--config=run.yaml", "--trainer.max_epochs=3", "--model.learning_rate=1e-9"])
    kept = {name: torch.load(f"runs/fit/version_0/checkpoints/{name}.ckpt") for name in ("best", "last")}
    assert {name: checkpoint["epoch"] for name, checkpoint in kept.items()} == {"best": 0, "last": 2}


def test_the_best_checkpoint_of_a_data_module_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen by the metric, and in the direction, that the module declares."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "own_data", raising=False)
    Path("own_data.py").write_text(OWN_DATA)
    cli.main(["fit", "--config=run.yaml", "--data=own_data.Own", "--trainer.max_epochs=3"])
    states = torch.load("runs/fit/version_0/checkpoints/last.ckpt", weights_only=True)["callbacks"]
    assert any("'monitor': 'dev/loss', 'mode': 'min'" in key for key in states)
    with open("runs/fit/version_0/metrics.csv", newline="") as file:
        measured = [float(row["dev/loss"]) for row in csv.DictReader(file) if row["dev/loss"]]
    best = torch.load("runs/fit/version_0/checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] == min(range(3), key=lambda epoch: measured[epoch])


def test_a_regression_task(folder: Path) -> None:
    tiny.save_teacher(Path("scorer"), layers=4, labels=1)
    lines = ["a\tb\tscore", *(f"good film\tfilm is {w}\t{i / 4}" for i, w in enumerate(tiny.WORDS))]
    for split in ("train", "validation"):
        Path(f"{split}.tsv").write_text("\n".join(lines) + "\n")
    Path("score.yaml").write_text(
        """
model: {teacher: {class_path: pretrained, init_args: {path: ./scorer}}, student: {config: {num_hidden_layers: 2}}}
objectives: {logits: {class_path: LogitsMSE}, hidden: {class_path: HiddenMSE}}
data:
  class_path: TextData
  init_args:
    {train_file: train.tsv, validation_file: validation.tsv, text_column: a, text_pair_column: b, label_column: score,
     regression: true, batch_size: 4, cache_dir: cache}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}
"""
    )
    cli.main(["fit", "--config=score.yaml"])
    metrics = Path("runs/fit/version_0/metrics.csv").read_text()
    assert "val/pearson" in metrics
    assert "val/spearman" in metrics


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--objectives.attention.wieght=1", "Did you mean 'weight' instead of 'wieght'?"),
        ("--objectives.attention=AtentionKL", "Did you mean 'AttentionKL'"),
        ("--objectives.attention.mapping=Unifrom", "Did you mean 'Uniform'"),
        ("--model.learnign_rate=1", "Did you mean 'learning_rate' instead of 'learnign_rate'?"),
        ("--data.bacth_size=1", "Did you mean 'batch_size'"),
        ("--model.teacher.path=./taecher", "There is no folder './taecher'. Folders beside it: cache, glue, teacher"),
        ("--model.student.layers=[1,9]", "layers must be teacher layers 1..4"),
        ("--objectives.attention.mapping={class_path: Explicit, init_args: {layers: [[1, 9]]}}", "out of range"),
        ("--data.task=sst", "sst2"),
        ("--objectives=null", "There is no objective"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    Path("cache").mkdir()
    assert message in fails(capsys, "fit", "--config=run.yaml", override)
    assert not Path("runs").exists()


def test_a_typo_in_the_yaml_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(FIT.replace("objectives:", "objctives:"))
    assert "Did you mean 'objectives'" in fails(capsys, "fit", "--config=run.yaml")


def test_a_teacher_without_a_trained_head_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.AutoModel.from_pretrained("teacher").save_pretrained("base")
    error = fails(capsys, "fit", "--config=run.yaml", "--model.teacher.path=./base")
    assert "has no weights for classifier.bias, classifier.weight: its head would be random. Fine-tune it" in error


def test_a_teacher_of_another_task_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_teacher(Path("three"), layers=4, labels=3)
    error = fails(capsys, "fit", "--config=run.yaml", "--model.teacher.path=./three")
    assert "The data has 2 labels, the models have 3" in error


def test_a_student_with_another_tokenizer_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_teacher(Path("other"), layers=2)
    other = tiny.tokenizer().backend_tokenizer.to_str().replace('"good"', '"goood"')
    Path("other/tokenizer.json").write_text(other)
    student = "--model.student={layers: null, path: ./other}"
    assert "The tokenizers of student (./other) and teacher" in fails(capsys, "fit", "--config=run.yaml", student)


def test_the_installed_command_knows_all_short_names(folder: Path) -> None:
    """In a process of its own, where nothing else has imported the classes."""
    command = [sys.executable, "-m", "ildistil.cli", "fit", "--config=run.yaml", "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert printed.returncode == 0, printed.stderr
    assert "class_path: ildistil.data.Glue" in printed.stdout


def test_commands_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    assert "quickstart   the whole story" in capsys.readouterr().out
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("ildistil 0.1.0, torch ")
    assert "There is no command 'fitt'. Did you mean 'fit'?" in fails(capsys, "fitt")


def test_the_help_needs_no_torch() -> None:
    asked = "import sys, ildistil.cli as cli; cli.main([{!r}]); print('torch' in sys.modules)"
    for word in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", asked.format(word)], capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_a_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: ildistil {command}")
    without = ("compare", "export", "presets", "quickstart", "study")
    assert ("Lightning's Trainer:" in shown) == (command not in without)
    assert ("--objectives" in shown) == (command in ("fit", "validate", "test", "predict", "precompute"))


def test_export_of_what_is_no_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no file 'x.ckpt'" in fails(capsys, "export", "x.ckpt", "out")
    torch.save({"state_dict": {}}, "other.ckpt")
    assert "holds no transformers student" in fails(capsys, "export", "other.ckpt", "out")


def test_printing_the_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", "--config=run.yaml", "--print_config"])
    assert stop.value.code == 0
    assert "class_path: ildistil.objectives.AttentionKL" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "finetune"])
def test_the_precision_of_matrix_products_is_an_option(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    options = {"fit": ["--config=run.yaml"], "finetune": ["--model.path=./teacher", "--data=Glue", "--data.task=sst2",
               "--data.path=glue", "--data.cache_dir=cache", "--trainer.accelerator=cpu"]}  # fmt: skip
    for precision in ([], ["--matmul_precision=high"]):
        cli.main([command, *options[command], *precision, "--trainer.fast_dev_run=true"])
    assert seen == ["highest", "high"]
    assert "matmul_precision" in fails(capsys, command, *options[command], "--matmul_precision=low")


def test_a_token_budget_is_set_in_place_of_a_batch_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = "--data.tokens_per_batch=64"
    message = fails(capsys, "fit", "--config=run.yaml", budget)
    assert "batch_size=8 and tokens_per_batch=64 both say how large a batch is" in message
    cli.main(["fit", "--config=run.yaml", budget, "--data.batch_size=null"])
    assert Path("runs/fit/version_0/checkpoints/best.ckpt").is_file()


def test_stored_targets(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Estimate, precompute, and train without the teacher as with it; then on more rows and with other teachers."""
    steps = ("--trainer.log_every_n_steps=1", "--model.student={layers: null, config: {num_hidden_layers: 2}}")
    cli.main(["precompute", "--config=run.yaml", "--estimate", "--data.limit_train=8", *steps])
    said = capsys.readouterr().out
    assert "rows    6 different ones, of which 0 are stored" in said  # of the 8 that are drawn, 2 are copies
    assert "attention[2].q: 4 x 8 for each token" in said
    assert not Path("targets").exists()
    cli.main(["precompute", "--config=run.yaml", "--data.limit_train=8", "--model.targets_dtype=float32", *steps])
    assert "6 rows are stored. Add --model.targets targets to your ildistil fit command." in capsys.readouterr().out

    cli.main(["fit", "--config=run.yaml", "--data.limit_train=8", *steps])
    with monkeypatch.context() as context:
        context.setattr("ildistil.students.sources.load", lambda *_, **__: pytest.fail("the teacher is loaded"))
        cli.main(["fit", "--config=run.yaml", "--data.limit_train=8", "--model.targets=targets", *steps])
    live, stored = (losses(f"runs/fit/version_{number}/metrics.csv") for number in (0, 1))
    assert stored == pytest.approx(live, rel=1e-4)
    last, accept = "--ckpt_path=runs/fit/version_1/checkpoints/last.ckpt", "--model.accept_changes=true"
    with pytest.warns(UserWarning, match=r"data: .*limit_train=8.* in the checkpoint"):
        cli.main(
            ["fit", "--config=run.yaml", "--trainer.max_epochs=2", "--model.targets=targets", last, accept, *steps]
        )
    assert "Rows are missing in targets: the teacher is loaded" in caplog.text
    capsys.readouterr()
    cli.main(["precompute", "--config=run.yaml", *steps])  # the run has made them all
    assert "12 different ones, of which 12 are stored" in capsys.readouterr().out

    error = fails(
        capsys,
        "fit",
        "--config=run.yaml",
        "--model.targets=targets",
        "--model.teacher.config={hidden_act: relu}",
        *steps,
    )
    assert "the same weights and another config: hidden_act is 'relu' and was 'gelu'" in error
    tiny.save_teacher(Path("teacher"), layers=4, initializer_range=0.2)
    error = fails(capsys, "fit", "--config=run.yaml", "--model.targets=targets", *steps)
    assert "The targets are of another teacher: its weights (BertForSequenceClassification, from ./teacher)" in error
    tiny.save_teacher(Path("teacher"), layers=4)
    tiny.save_teacher(Path("three"), layers=4, labels=3)
    precompute = ("precompute", "--config=run.yaml")
    assert "The data has 2 labels, the models have 3" in fails(
        capsys, *precompute, "--model.teacher.path=./three", "--model.targets=others"
    )
    with monkeypatch.context() as context:
        context.setattr("ildistil.commands.precompute.precompute", interrupted)
        with pytest.raises(SystemExit):
            cli.main([*precompute, *steps])
    assert "Interrupted: 12 rows are stored. The same command goes on" in capsys.readouterr().out
    assert "no hidden[2], hidden[4]" in fails(
        capsys, "fit", "--config=run.yaml", "--model.targets=targets", "--objectives.hidden=HiddenMSE"
    )
    assert "--model.targets FOLDER" in fails(capsys, "precompute", "--config=run.yaml", "--model.targets=null")
    assert "there are no targets. Name their folder" in fails(
        capsys, "fit", "--config=run.yaml", "--model.targets_dtype=float32"
    )


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_precompute_that_is_interrupted_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute, fill = ["precompute", "--config=run.yaml", "--data.batch_size=4"], Maker.fill
    with monkeypatch.context() as context:
        context.setattr(Maker, "fill", lambda self, batch: interrupted() if self.store._open else fill(self, batch))
        with pytest.raises(SystemExit) as stop:
            cli.main(precompute)
    assert stop.value.code == 130
    told = re.search(r"Interrupted: (\d+) rows are stored. The same command goes on from", capsys.readouterr().out)
    assert told is not None
    assert 0 < int(told[1]) < 12
    cli.main(precompute)
    said = capsys.readouterr().out
    assert f"12 different ones, of which {told[1]} are stored" in said
    assert "12 rows are stored. Add --model.targets targets" in said


def test_fit_stores_targets_where_there_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config=run.yaml", "--trainer.log_every_n_steps=1"]
    cli.main([*fit, "--model.targets=fresh", "--model.targets_dtype=float32"])
    cli.main(fit)
    stored, live = (losses(f"runs/fit/version_{number}/metrics.csv") for number in (0, 1))
    assert stored == pytest.approx(live, rel=1e-4)
    cli.main(["precompute", "--config=run.yaml", "--model.targets=fresh"])
    assert "12 different ones, of which 12 are stored" in capsys.readouterr().out


def test_predictions_of_several_processes_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    mine: list[predict.Row] = [(2, 1, [0.4, 0.6]), (0, 0, [0.9, 0.1])]
    other: list[predict.Row] = [(1, 1, [0.2, 0.8]), (2, 1, [0.4, 0.6])]  # a row that two processes saw

    def gather(parts: list[Any], own: list[predict.Row]) -> None:
        parts[:] = [own, other]

    monkeypatch.setattr(predict.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(predict.dist, "all_gather_object", gather)
    assert predict._over_processes(mine) == [mine[1], *other]
    unnumbered = [{"logits": torch.zeros(1, 2), "prediction": torch.zeros(1)}]
    with pytest.raises(DataError, match="no 'row_id'"):
        list(predict._rows(unnumbered, multi_label=False))


def test_predictions_of_rows_with_several_labels(tmp_path: Path) -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0], [-1.0, -1.0, -1.0]])
    batch = {"logits": logits, "prediction": logits.argmax(-1)}
    task = task_of(SimpleNamespace(label_names=["art", "law", "war"], multi_label=True))
    predict._write(list(predict._rows([batch], multi_label=True)), task, tmp_path / "written.tsv")
    with (tmp_path / "written.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["row_id", "prediction", "p_art", "p_law", "p_war"]
    assert [row[:2] for row in rows[1:]] == [["0", "art, war"], ["1", ""]]
    assert float(rows[1][2]) == pytest.approx(1 / (1 + math.exp(-2.0)), abs=1e-6)


def losses(metrics: str) -> list[float]:
    with open(metrics, newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
