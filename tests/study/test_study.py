"""Studies of real trainings of small models, and what is left of them after kills."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

import tiny
from ildistil import cli
from ildistil.study.runs import Run, read_runs
from ildistil.study.worker import fork

BASE = """
model:
  teacher: {class_path: pretrained, init_args: {path: ./teacher}}
  student: {layers: [1, 2]}
  learning_rate: 0.001
data: {class_path: Glue, init_args: {task: sst2, path: glue, batch_size: 8, cache_dir: cache}}
trainer: {max_epochs: 3, accelerator: cpu}
"""
STUDY = """
study: FOLDER
base: base.yaml
axes:
  objective:
    attention: {objectives: {attention: AttentionKL, task: {class_path: TaskLoss, init_args: {weight: 0.5}}}}
    soft: {preset: paper-vanilla}
  seed: [0, 1]
exclude: [{objective: attention, seed: 1}, {objective: soft, seed: 0}]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a teacher whose dropout is on, data, and a base configuration."""
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(Path("teacher"), layers=4, hidden_dropout_prob=0.1)
    tiny.save_data(Path("glue/sst2"))
    Path("base.yaml").write_text(BASE)
    return tmp_path


def study(name: str, text: str = STUDY) -> str:
    Path(f"{name}.yaml").write_text(text.replace("FOLDER", name))
    return f"{name}.yaml"


def start(*words: str) -> int:
    """Start a command in a process of its own, which has what this one imported."""

    def run() -> int:
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
        cli.main(["study", "run", *words])
        return 0

    return fork(run)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(name: str) -> list[tuple[Run, str]]:
    """What a study found, without its costs: bits of time."""
    found = read_runs(Path(name))
    for run in found:
        assert run.predictions is not None, run
    texts = [run.predictions.read_text() for run in found if run.predictions is not None]
    return [(Run(r.name, r.factors, r.state, r.metrics, r.curve), text) for r, text in zip(found, texts, strict=True)]


def test_kills_change_nothing_of_what_a_study_finds(capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL of the study, of its runs, and of both, again and again, while two invocations share the work."""
    cli.main(["study", "run", study("left"), "--jobs=2"])
    assert "2 of 2 done; best so far: accuracy" in capsys.readouterr().out
    for number in range(2):
        child = start(study("killed"), "--jobs=2")
        began = time.monotonic()
        while time.monotonic() - began < 20 and len(list(Path("killed").glob("runs/*/checkpoints/last.ckpt"))) < number:
            time.sleep(0.05)
        time.sleep(0.3 * number)
        for file in Path("killed").glob("runs/*/status.json"):
            status = json.loads(file.read_text())
            if status["state"] == "running" and number == 1:
                try:
                    os.kill(status["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    continue
        os.kill(child, signal.SIGKILL)
        assert end(child) == -signal.SIGKILL
    children = [start("killed.yaml"), start("killed.yaml")]
    assert [end(child) for child in children] == [0, 0], Path("log").read_text()
    (first, *_) = Path("killed").glob("runs/*")
    (first / "status.json").write_text('{"state": "running"}')  # killed after its training
    for name in ("metrics.jsonl", "predictions.tsv"):
        (first / name).unlink()
    assert end(start("killed.yaml")) == 0
    assert [run.state for run, _ in outcome("left")] == ["finished"] * 2
    assert [len(run.curve) for run, _ in outcome("left")] == [3] * 2
    assert outcome("killed") == outcome("left")
    header, first = outcome("left")[0][1].splitlines()[:2]
    assert header.split("\t") == ["row_id", "prediction", "label", "p_negative", "p_positive"]
    assert first.split("\t")[::2][:2] == ["0", "negative"]


def test_teachers_targets_and_fine_tunings(capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher that the study makes, its stored targets, a student, and its fine-tunings."""
    text = """
study: FOLDER
base: base.yaml
axes: {objective: {hidden: {objectives: {hidden: HiddenMSE, logits: LogitsKL}}}}
teacher: {finetune: {model: {path: teacher}, trainer: {max_epochs: 1, accelerator: cpu}}}
targets: {dtype: float32}
finetune:
  base: {model: {path: ""}, data: {class_path: Glue, init_args: {path: glue, batch_size: 8, cache_dir: cache}},
         trainer: {max_epochs: 1, accelerator: cpu}}
  axes: {task: [sst2], learning_rate: [1.0e-3, 1.0e-2]}
  best_over: [learning_rate]
""".replace("base.yaml", "{model: {student: {layers: [1, 2]}}, data: {class_path: Glue, init_args: {task: sst2, "
            "path: glue, batch_size: 8, cache_dir: cache}}, trainer: {max_epochs: 1, accelerator: cpu}}")  # fmt: skip
    cli.main(["study", "run", study("whole", text), "--jobs=2"])
    (best,), every = read_runs(Path("whole")), read_runs(Path("whole"), every=True)
    assert [run.factors["learning_rate"] for run in every] == ["0.001", "0.01"]
    assert best.metrics["accuracy"] == max(run.metrics["accuracy"] for run in every)
    assert best.cost["distillation_teacher_runs"] == 0
    assert best.cost["distillation_teacher_runs_saved"] == 3
    capsys.readouterr()
    cli.main(["study", "status", "whole"])
    shown = capsys.readouterr().out
    assert "5 in all, 5 finished" in shown
    for kind in ("teachers/", "targets/", "students/", "runs/"):
        assert f"\n{kind}" in shown


def test_what_is_wrong_is_said_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = """
study: FOLDER
base: base.yaml
metric: f1
axes:
  objective: {soft: {preset: paper-vanila}, task: {objectives: {t: TaskLoss}}, other: {objectives: {o: Nothing}}}
  initialisation: {out: {model: {student: {layers: [1, 9]}}}, in: {}}
  task: [sst2, rte]
"""
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", "run", study("wrong", text)])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    for problem in (
        "objective=soft: There is no preset 'paper-vanila'. Did you mean 'paper-vanilla'?",
        "objective=other: objectives.o: there is no class 'Nothing'",
        "layers must be teacher layers 1..4 (or -1..-4 from the end), got 9.",
        "task=rte: There is no file train.tsv",
        "no run logs the metric 'f1'. These do: loss, accuracy.",
    ):
        assert problem in said, problem
    assert not Path("wrong/runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "The following arguments are required: file."),
        (["run", "none.yaml"], "There is no file 'none.yaml'"),
        (["run", "base.yaml", "--jobs=0"], "it must be at least 1"),
        (["status", "none"], "There is no study in 'none'"),
        (["walk"], "invalid choice: 'walk'"),
    ],
)
def test_wrong_words_are_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["study", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
