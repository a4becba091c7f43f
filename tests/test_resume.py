"""A run owns a folder, goes on exactly, and nothing good in it is lost."""

import csv
import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import tiny
from ildistil import Distiller, ResumeCheckpoint, cli, objectives, storage
from ildistil.errors import CheckpointError, ConfigError, Stopped, WriteError
from ildistil.training.checkpoint_files import newest
from test_cli import FIT, fails
from test_distiller import loader, pair, trainer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a teacher, data and a configuration."""
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(Path("teacher"), layers=4)
    tiny.save_data(Path("glue/sst2"))
    Path("run.yaml").write_text(FIT)
    return tmp_path


@pytest.mark.parametrize("kind", ["resume", "signals", "writes", "predict", "ranks"])
def test_faults_lose_nothing(kind: str, tmp_path: Path) -> None:
    """A few experiments of each kind; ``nox -s faults`` does them all."""
    count = {"resume": 3, "signals": 3, "writes": 5, "predict": 1, "ranks": 1}[kind]
    command = [sys.executable, "-m", "faults", kind, f"--count={count}", "--jobs=1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# The folder


def test_a_run_goes_on_in_its_folder_with_its_configuration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--objectives.attention.weight=0.5"]
    cli.main(["fit", "--config=run.yaml", *options, "--run=whole"])
    monkeypatch.setenv("TEST_STOPS", "1")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config=run.yaml", *options, "--run=halved", "--trainer.callbacks+=test_resume.StopAfter"])
    Path("run.yaml").unlink()
    assert torch.load("halved/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    cli.main(["fit", "--resume", "--run=halved"])
    whole, halved = (torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "halved"))
    assert halved["global_step"] == whole["global_step"] == 6
    assert all(torch.equal(value, halved["state_dict"][name]) for name, value in whole["state_dict"].items())
    rows = [list(csv.DictReader(Path(name, "metrics.csv").read_text().splitlines())) for name in ("whole", "halved")]
    losses = [{r["step"]: r["train/loss"] for r in each if r["train/loss"]} for each in rows]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    assert sorted(os.listdir("halved")) == [".lock", "checkpoints", "config.yaml", "metrics.csv"]


class StopAfter(L.Callback):
    """Sends SIGTERM after the second step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and os.environ.pop("TEST_STOPS", None):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_folder_that_holds_a_run_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--config=run.yaml", "--run=mine", "--trainer.max_steps=1"])
    assert "'mine' holds a run. Go on with it (ildistil fit --resume --run mine)" in fails(
        capsys, "fit", "--config=run.yaml", "--run=mine"
    )
    assert "--resume finds the run's newest checkpoint by itself" in fails(
        capsys, "fit", "--resume", "--run=mine", "--ckpt_path=mine/checkpoints/last.ckpt"
    )
    assert "There is no run in 'other' to go on with" in fails(capsys, "fit", "--resume", "--run=other")
    assert "--run needs the name of a folder" in fails(capsys, "fit", "--run", "--resume")
    cli.main(["fit", "--resume", "--run=mine"])  # it is complete
    assert "There was nothing left to train: mine/checkpoints/last.ckpt is at step 1" in capsys.readouterr().out


def test_a_run_with_a_logger_of_its_own_has_a_folder_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: logs, name: others}}"
    cli.main(["fit", "--config=run.yaml", "--run=mine", logger, "--trainer.max_steps=2"])
    Path("run.yaml").unlink()
    assert Path("logs/others/version_0/metrics.csv").is_file()
    cli.main(["fit", "--resume", "--run=mine"])
    assert "There was nothing left to train: mine/checkpoints/last.ckpt is at step 2" in capsys.readouterr().out
    cli.main(["validate", "--run=mine"])


def test_the_same_words_start_and_go_on(folder: Path) -> None:
    words = ["fit", "--config=run.yaml", "--resume", "--run=mine", "--trainer.max_steps=2"]
    cli.main(words)
    step = torch.load("mine/checkpoints/last.ckpt", weights_only=True)["global_step"]
    cli.main(words)
    assert step == torch.load("mine/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_run_is_measured_in_its_own_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--config=run.yaml", "--model.student.layers=[2,4]", "--run=mine"])
    Path("run.yaml").unlink()
    cli.main(["validate", "--run=mine"])
    cli.main(["predict", "--run", "mine"])
    assert Path("runs/predict/version_0/predictions.tsv").is_file()
    capsys.readouterr()
    assert "There is no run in 'yours'" in fails(capsys, "validate", "--run=yours")


def test_an_untrained_student_is_measured_on_demand_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'validate' runs a trained student: name its run" in fails(capsys, "validate", "--config=run.yaml")
    cli.main(["validate", "--config=run.yaml", "--untrained=true"])
    assert "max_steps is 0" in fails(capsys, "fit", "--config=run.yaml", "--trainer.max_steps=0")


def test_processes_that_would_train_alone_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes were started (by torchrun" in fails(capsys, "fit", "--config=run.yaml", "--trainer.devices=1")
    assert not Path("runs").exists()


def test_a_branch_leaves_the_run_it_comes_from_alone(folder: Path) -> None:
    cli.main(["fit", "--config=run.yaml", "--run=mine", "--trainer.max_epochs=2"])
    before = {path: path.read_bytes() for path in Path("mine/checkpoints").iterdir()}
    cli.main(["fit", "--config=run.yaml", "--run=branch", "--trainer.max_epochs=2",
              "--ckpt_path=mine/checkpoints/previous.ckpt"])  # fmt: skip
    assert {path: path.read_bytes() for path in Path("mine/checkpoints").iterdir()} == before
    assert Path("branch/checkpoints/last.ckpt").is_file()


def test_what_was_best_stays_best_in_a_folder_that_moved(folder: Path) -> None:
    cli.main(["fit", "--config=run.yaml", "--run=mine", "--trainer.max_epochs=2", "--model.learning_rate=1e-9"])
    best = Path("mine/checkpoints/best.ckpt").read_bytes()
    Path("mine").rename("moved")
    with pytest.warns(UserWarning, match="steps: 6 in the checkpoint, 9 now"):
        cli.main(["fit", "--resume", "--run=moved", "--trainer.max_epochs=3", "--model.accept_changes=true"])
    assert Path("moved/checkpoints/best.ckpt").read_bytes() == best


HOLD = """
import sys, time
from pathlib import Path
from ildistil import storage
storage.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_train_in_one_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fit", "--config=run.yaml", "--run=mine", "--trainer.max_steps=1"])
    other = subprocess.Popen([sys.executable, "-c", HOLD, "mine/.lock"], stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    try:
        assert "Another process trains in 'mine'" in fails(capsys, "fit", "--resume", "--run=mine")
    finally:
        other.kill()
        other.communicate()


def test_the_configuration_of_the_last_start_counts(folder: Path) -> None:
    """A start that saved nothing leaves one behind, and so does a start that changes something."""
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text("model: {student: {layers: [4, 3]}}")
    cli.main(["fit", "--config=run.yaml", "--run=mine", "--trainer.max_steps=1"])
    assert yaml.safe_load(Path("mine/config.yaml").read_text())["model"]["student"]["layers"] == [1, 2]
    assert yaml.safe_load(Path("mine/config-1.yaml").read_text()) == {"model": {"student": {"layers": [4, 3]}}}


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--model.balance={class_path: Balance}", "balance: None in the checkpoint, by magnitude"),
        ("--trainer.gradient_clip_algorithm=value", "gradient_clip_algorithm: "),
        ("--matmul_precision=medium", "float32 products: highest in the checkpoint, medium now"),
        ("--trainer.limit_train_batches=2", "steps of an epoch: 3 in the checkpoint, 2 now"),
        ("--data.batch_size=4", "a step: 8 rows in the checkpoint, 4 rows now"),
        ("--seed_everything=1", "seed: 0 in the checkpoint, 1 now"),
        ("--model.teacher.path=./other", "teacher: "),
        ("--model.non_finite=skip", ""),
    ],
)
def test_what_decides_a_training_is_compared(
    option: str, named: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.main(["fit", "--config=run.yaml", "--run=mine", "--trainer.max_epochs=2"])
    os.replace("mine/checkpoints/previous.ckpt", "mine/checkpoints/last.ckpt")
    tiny.save_teacher(Path("other"), layers=4, initializer_range=0.2)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", torch.set_float32_matmul_precision)
    words = ["fit", "--resume", "--run=mine", option]
    try:
        if named:
            assert named in fails(capsys, *words)
        else:
            cli.main(words)  # changes no step that went well
    finally:
        torch.set_float32_matmul_precision("highest")


class Stops(L.Callback):
    """Sends SIGTERM, or kills by an exception, at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class Scored(Distiller):
    """A student whose score is best early, so that early stopping depends on every validation."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", float(self.global_step))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.filterwarnings("ignore:You're resuming", "ignore:Checkpoint directory", "ignore:The dirpath has changed")
def test_a_validation_that_is_owed_comes_after_all(step: int, tmp_path: Path) -> None:
    """Early stopping then stops where it would have stopped, and the best is the best."""

    def fit(folder: Path, *others: L.Callback, path: Path | None = None) -> tuple[int, Any]:
        best = ModelCheckpoint(folder, "best", monitor="score", mode="min", enable_version_counter=False)
        stop = EarlyStopping("score", mode="min", patience=2)
        keep = ResumeCheckpoint(str(folder), every_steps=1)  # before the others: the order doesn't matter
        run = trainer(keep, best, stop, *others, objectives.LogitsKL(), enable_checkpointing=True, max_epochs=3,
                      val_check_interval=2)  # fmt: skip
        module = Scored(*pair(), schedule="constant", warmup=0.0, accept_changes=True)
        run.fit(module, loader(), loader(rows=4), ckpt_path=path)
        return run.global_step, best.best_model_score

    whole = fit(tmp_path / "whole")
    assert whole[0] == 6  # the third validation, of steps 2, 4, 6
    with pytest.raises(Stopped):
        fit(tmp_path / "halved", Stops(step))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fit(tmp_path / "halved", path=tmp_path / "halved" / "last.ckpt") == whole


def test_data_that_begin_an_epoch_anew_are_refused_within_it(tmp_path: Path) -> None:
    run = trainer(ResumeCheckpoint(str(tmp_path)), Stops(2), objectives.LogitsKL(), enable_checkpointing=True)
    with pytest.raises(Stopped):
        run.fit(Distiller(*pair()), loader())
    with pytest.raises(
        CheckpointError, match="is of batch 2 of an epoch, and the data begin it anew: write state_dict"
    ):
        trainer(objectives.LogitsKL()).fit(Distiller(*pair()), loader(), ckpt_path=tmp_path / "last.ckpt")


def test_lines_of_metrics_that_a_kill_has_cut_are_left_out(folder: Path) -> None:
    cli.main(["fit", "--config=run.yaml", "--run=mine", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"])
    os.replace("mine/checkpoints/previous.ckpt", "mine/checkpoints/last.ckpt")
    with Path("mine/metrics.csv").open("ab") as file:
        file.write(b"\x00\xff,1\n7")
    cli.main(["fit", "--resume", "--run=mine"])
    rows = list(csv.DictReader(Path("mine/metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2", "3", "4", "5"]


def test_weights_alone_are_no_place_to_go_on_from(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    fitted(tmp_path, keep)
    assert newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds weights alone"):
        fit_from(tmp_path / "weights.ckpt")


FULL = """
import resource, sys
from ildistil import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
cli.main(["fit", "--config=run.yaml", "--run=mine", *sys.argv[1:]])
"""


def test_a_disk_that_is_full_in_the_midst_of_a_file_is_told_in_words(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "error: " in done.stderr
    assert "can't be written to" in done.stderr
    assert "Traceback" not in done.stderr


FORKS = """
import os, sys, time
from pathlib import Path
from ildistil import storage
storage.hold(Path(sys.argv[1]))
if os.fork():
    print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_killed_process_ends_with_it_and_not_with_its_workers(folder: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", FORKS, "lock"], stdout=subprocess.PIPE, start_new_session=True)
    assert other.stdout is not None
    other.stdout.readline()
    other.kill()
    other.wait()
    try:
        assert storage.hold(Path("lock")) is not None
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.stdout.close()


# Files


def fitted(folder: Path, *callbacks: L.Callback, **options: Any) -> tuple[Distiller, L.Trainer]:
    module = Distiller(*pair())
    run = trainer(objectives.LogitsKL(), *callbacks, enable_checkpointing=bool(callbacks), **options)
    run.fit(module, loader())
    return module, run


def test_a_damaged_file_is_passed_over(tmp_path: Path) -> None:
    fitted(tmp_path, ResumeCheckpoint(str(tmp_path), every_steps=1))
    last = tmp_path / "last.ckpt"
    assert newest(tmp_path) == last
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 4
    last.write_bytes(content)
    with pytest.warns(UserWarning, match=r"last.ckpt' is .*damaged.* Going on from an earlier one"):
        assert newest(tmp_path) == tmp_path / "previous.ckpt"
    (tmp_path / "previous.ckpt").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="Going on from an earlier one"),
        pytest.raises(CheckpointError, match="All checkpoints in .* are damaged"),
    ):
        newest(tmp_path)
    assert newest(tmp_path / "none") is None


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    module, run = fitted(tmp_path)
    with torch.no_grad():
        module.student.classifier.weight[0, 0] = float("nan")
    run.save_checkpoint(tmp_path / "bad.ckpt")
    for use in (lambda: fit_from(tmp_path / "bad.ckpt"), lambda: load_from(tmp_path / "bad.ckpt")):
        with pytest.raises(CheckpointError, match=r"student.classifier.weight in .*bad.ckpt' holds NaN"):
            use()


def fit_from(path: Path | str) -> None:
    trainer(objectives.LogitsKL()).fit(Distiller(*pair()), loader(), ckpt_path=path)


def load_from(path: Path | str) -> Distiller:
    student, teacher = pair()
    return Distiller.load_from_checkpoint(path, student=student, teacher=teacher)


def test_checkpoints_come_from_local_files_alone_and_run_no_code(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {tmp_path / 'exploded'}",))

    torch.save({"state_dict": {}, "bomb": Bomb()}, tmp_path / "bomb.ckpt")
    for path in (tmp_path / "bomb.ckpt", f"file://{tmp_path}/bomb.ckpt", "https://somewhere/bomb.ckpt"):
        for use in (fit_from, load_from):
            with pytest.raises(CheckpointError, match="is no checkpoint that can be read|There is no file"):
                use(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_leaves_the_old_file(policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = ResumeCheckpoint(str(tmp_path), every_steps=1, on_write_error=policy)
    real, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 2:  # the first file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    if policy == "stop":
        with pytest.raises(WriteError, match=r"last.ckpt can't be written .*No space left"):
            fitted(tmp_path, keeper)
    else:
        with pytest.warns(UserWarning, match=r"The training goes on, and can't be resumed from step \d"):
            fitted(tmp_path, keeper)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"last.ckpt", "previous.ckpt"}


def test_the_final_weights_are_in_the_last_checkpoint(tmp_path: Path) -> None:
    for options in ({"max_steps": 3, "max_epochs": 9}, {"max_epochs": 1}, {"max_steps": 6, "max_epochs": 9}):
        module, run = fitted(tmp_path, ResumeCheckpoint(str(tmp_path / str(options))), **options)
        saved = torch.load(tmp_path / str(options) / "last.ckpt", weights_only=True)
        assert saved["global_step"] == run.global_step
        weights = {f"distillation.student.{name}": value for name, value in module.student.state_dict().items()}
        assert all(torch.equal(saved["state_dict"][name], value) for name, value in weights.items())


def test_saving_by_time_and_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []

    class Note(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
            saved.append(trainer.global_step)

    now = [0.0]
    monkeypatch.setattr("ildistil.training.progress.time.monotonic", lambda: now.__setitem__(0, now[0] + 10) or now[0])
    for options, expected in (({"every_minutes": 1.0}, [4]), ({"every_minutes": None, "every_steps": 2}, [2, 4])):
        saved.clear()
        keeper = ResumeCheckpoint(str(tmp_path), **options)  # type: ignore[arg-type]
        run = trainer(Note(), keeper, objectives.LogitsKL(), enable_checkpointing=True, max_epochs=1)
        run.fit(Distiller(*pair()), loader())
        assert saved == expected, options


@pytest.mark.parametrize("options", [{"every_minutes": 0}, {"every_steps": -1}, {"on_write_error": "ignore"}])
def test_wrong_options(options: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ResumeCheckpoint(**options)


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    class HangUp(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGHUP)

    try:
        fitted(tmp_path, HangUp(), ResumeCheckpoint(str(tmp_path)))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_a_script_with_its_code_and_handlers_come_back(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(Stopped, match="SIGUSR1: the training is saved at step 1") as stopped:
        fitted(tmp_path, Stop(), ResumeCheckpoint(str(tmp_path)))
    assert stopped.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_checkpoint_within_a_step_is_refused(tmp_path: Path) -> None:
    """What its batches gave is in no file; among others it isn't what a run goes on from."""

    def fit(path: Path | None = None) -> None:
        keep = ModelCheckpoint(tmp_path, filename="within", monitor="val/loss", save_top_k=-1, every_n_epochs=1)
        run = trainer(objectives.LogitsKL(), keep, enable_checkpointing=True, max_epochs=1, val_check_interval=3,
                      accumulate_grad_batches=2)  # fmt: skip
        run.fit(Distiller(*pair()), loader(), loader(), ckpt_path=path)

    fit()
    with pytest.raises(CheckpointError, match="1 batches had waited for the end of their step, and would be lost"):
        fit(tmp_path / "within.ckpt")
    assert newest(tmp_path) is None
