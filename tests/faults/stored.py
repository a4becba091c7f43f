"""Kill what writes, damage what is stored, start many at once: what is read then is right, or refused."""

import csv
import os
import random
import shutil
import signal
import threading
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

import tiny
from faults import fits, processes
from ildistil import cli
from ildistil.training.checkpoint import FORMAT
from ildistil.training.checkpoint_files import CheckpointFiles, newest
from ildistil.training.checkpoint_files import load as load_checkpoint
from ildistil.training.progress import ResumeCheckpoint

_LOCK = threading.Lock()  # what is stored is made once

# Killed while it writes


def _write_on(folder: Path) -> None:
    """Save the state of step after step, as `ResumeCheckpoint` does, and note each that is saved."""
    files, keeper = CheckpointFiles(), ResumeCheckpoint(str(folder))
    keeper._folder = folder
    weights = torch.randn(300_000)
    for step in range(10_000):
        said = {"format": FORMAT, "objectives": {}, "stages": {}, "projections": {}}
        content = {"ildistil": said, "state_dict": {"w": weights + step}, "global_step": step, "optimizer_states": []}
        strategy = SimpleNamespace(checkpoint_io=files, root_device=torch.device("cpu"))
        trainer: Any = SimpleNamespace(fast_dev_run=False, is_global_zero=True, strategy=strategy, global_step=step)
        trainer.save_checkpoint = lambda path, content=content: files.save_checkpoint(content, path)
        keeper._save(trainer)
        (folder / "acknowledged").write_text(str(step))


def one_write(root: Path, number: int) -> str:
    """Kill a process that writes checkpoints, at any moment; the newest must be whole and as new as it said."""
    folder = root / f"write-{number}"
    folder.mkdir()
    child = processes.start(lambda: _write_on(folder), folder / "log")
    time.sleep(random.Random(number).uniform(0.1, 0.5))
    os.killpg(child, signal.SIGKILL)
    processes.wait([child])
    noted = (folder / "acknowledged").read_text() if (folder / "acknowledged").exists() else ""
    found = newest(folder)
    if found is None:
        return "equal" if not noted else f"nothing is left of step {noted}"
    step = load_checkpoint(found)["global_step"]
    wrong = noted and step < int(noted)
    shutil.rmtree(folder)
    return f"step {noted} is lost, {step} is left" if wrong else "equal"


# Damaged where it lies


@cache
def make_stored(root: Path) -> None:
    """Store one of everything: a checkpoint, targets, a token cache, an exported student."""
    fits.write_data(root)
    tiny.save_teacher(root / "teacher", layers=4, labels=2)
    _train(root, "fit", "--trainer.max_epochs=1", "--model.targets=targets", "--run=run")
    _train(root, "export", "run/checkpoints/last.ckpt", "student", config=False)


def _train(root: Path, command: str, *words: str, config: bool = True) -> None:
    configuration = {
        "model": {
            "teacher": {"class_path": "pretrained", "init_args": {"path": "./teacher"}},
            "student": {"layers": [1, 2]},
        },
        "objectives": {"hidden": "HiddenMSE", "task": "TaskLoss"},
        "data": {
            "class_path": "TextData",
            "init_args": {
                "train_file": "train.csv", "validation_file": "val.csv", "batch_size": 4, "cache_dir": "cache",
            },
        },
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(configuration))

    def run() -> None:
        torch.set_num_threads(1)
        os.chdir(root)
        cli.main([command, *(["--config=run.yaml"] if config else []), *words])

    (code,) = processes.together([run], root / "log")
    if code:
        raise RuntimeError(f"{command} ended with {code}: {(root / 'log').read_text()[-2000:]}")


def _damage(path: Path, draw: random.Random) -> str:
    """Change a file in some way that a disk or a person might."""
    content = bytearray(path.read_bytes())
    how = draw.choice(["flip", "flip", "flip", "zero", "cut", "swap"])
    at = draw.randrange(len(content))
    if how == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del content[at:]
    else:
        size = min(draw.choice([16, 64, 512]), len(content) // 3)
        first, second = draw.randrange(len(content) - size), draw.randrange(len(content) - size)
        before = bytes(content)
        if how == "zero":
            content[first : first + size] = bytes(size)
        else:
            part = content[first : first + size]
            content[first : first + size] = content[second : second + size]
            content[second : second + size] = part
        if content == before:
            content[at] ^= 1
    path.write_bytes(content)
    return f"{how} in {path.name}"


def one_flip(root: Path, number: int) -> str:
    """Damage one stored file, and read it."""
    draw = random.Random(f"flip {number}")
    with _LOCK:
        make_stored(root)
    folder = root / f"flip-{number}"
    shutil.copytree(root, folder, ignore=shutil.ignore_patterns("flip-*", "log"))
    kind = ("checkpoint", "cache", "export", "targets")[number % 4]
    places = {
        "checkpoint": "run/checkpoints/last.ckpt",
        "cache": "cache/**/*",
        "export": "student/*",
        "targets": "targets/*",
    }
    files = sorted(p for p in folder.glob(places[kind]) if p.is_file() and p.stat().st_size > 0)
    path = draw.choice(files)
    told = _damage(path, draw)
    train = ["fit", "--config=run.yaml", "--trainer.max_epochs=1", "--run=again"]
    commands = {
        "checkpoint": ["validate", "--config=run.yaml", "--ckpt_path=run/checkpoints/last.ckpt"],
        "cache": train,
        "export": [*train, "--model.student={path: student}"],
        "targets": [*train, "--model.targets=targets"],
    }

    def run() -> None:
        torch.set_num_threads(1)
        os.chdir(folder)
        cli.main(commands[kind])

    (code,) = processes.together([run], folder / "log")
    said = (folder / "log").read_text()
    refused = code == 2 and "error:" in said and "Traceback" not in said
    mended = code == 0 and kind == "cache" and "(It is made anew.)" in said
    mended |= code == 0 and "missing" in said and kind == "targets"
    if refused or mended:
        shutil.rmtree(folder)
        return "equal"
    return f"{told} of the {kind} is not noticed: code {code}, see {folder / 'log'}"


# Many at once


def one_start(root: Path, number: int) -> str:
    """Start eight trainings at once in one folder; each must end well, in a folder of its own."""
    with _LOCK:
        make_stored(root)
    folder = root / f"start-{number}"
    folder.mkdir()
    shutil.copytree(root / "teacher", folder / "teacher")
    for name in ("train.csv", "val.csv", "run.yaml"):
        shutil.copy(root / name, folder / name)

    def run() -> None:
        torch.set_num_threads(1)
        os.chdir(folder)
        cli.main(["fit", "--config=run.yaml", "--trainer.max_steps=2"])

    children = [processes.start(run, folder / f"log{i}") for i in range(8)]
    codes = processes.wait(children, 240)
    runs = list(folder.glob("runs/fit/version_*/checkpoints/last.ckpt"))
    if any(codes) or len(runs) != 8:
        return f"ended with {codes} and {len(runs)} runs, see {folder}"
    shutil.rmtree(folder)
    return "equal"


def one_predict(root: Path, number: int) -> str:
    """Predict on one, two and three processes: the same file."""
    with _LOCK:
        make_stored(root)
    folder = root / f"predict-{number}"
    shutil.copytree(
        root, folder, ignore=shutil.ignore_patterns("flip-*", "write-*", "start-*", "predict-*", "log", "targets")
    )
    rows = random.Random(number).choice([3, 4, 5, 7, 11, 16])
    fits.write_data(folder, rows=37)
    lines = (folder / "train.csv").read_text().splitlines()[: rows + 1]
    (folder / "val.csv").write_text("\n".join(lines) + "\n")
    found = []
    for ranks in (1, 2, 3):

        def run(ranks: int = ranks) -> None:
            torch.set_num_threads(1)
            os.chdir(folder)
            words = [f"--trainer.devices={ranks}", *(["--trainer.strategy=ddp"] if ranks > 1 else [])]
            cli.main(["predict", "--config=run.yaml", "--ckpt_path=run/checkpoints/last.ckpt", *words])

        codes = processes.together([run] * ranks, folder / "log")
        if any(codes):
            return f"{ranks} processes ended with {codes}, see {folder / 'log'}"
        (path,) = folder.glob("runs/predict/version_*/predictions.tsv")
        with path.open() as file:
            found.append([(row["row_id"], row["prediction"]) for row in csv.DictReader(file, delimiter="\t")])
        shutil.rmtree(folder / "runs")
    shutil.rmtree(folder)
    return (
        "equal" if found[0] == found[1] == found[2] and len(found[0]) == rows else f"the files differ for {rows} rows"
    )


def one_rank(root: Path, number: int) -> str:
    """Kill one of two processes of a training; the other must end within half a minute, in words."""
    with _LOCK:
        make_stored(root)
    folder, draw = root / f"rank-{number}", random.Random(f"rank {number}")
    folder.mkdir()
    shutil.copytree(root / "teacher", folder / "teacher")
    for name in ("train.csv", "val.csv", "run.yaml"):
        shutil.copy(root / name, folder / name)
    whose, port = draw.randrange(2), processes.free_port()

    def run() -> None:
        torch.set_num_threads(1)
        os.chdir(folder)
        cli.main(
            ["fit", "--config=run.yaml", "--trainer.max_epochs=500", "--trainer.devices=2", "--trainer.strategy=ddp"]
        )

    children = [processes.start(run, folder / f"log{rank}", rank, 2, port) for rank in range(2)]
    end = time.monotonic() + 60
    while not list(folder.glob("runs/fit/*/checkpoints/last.ckpt")) and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(draw.uniform(0, 1))
    os.killpg(children[whose], signal.SIGKILL)
    begun = time.monotonic()
    codes = processes.wait(children, 60)
    seconds, said = time.monotonic() - begun, (folder / f"log{1 - whose}").read_text()
    if seconds > 30 or codes[1 - whose] != 2 or "Another process of this run is gone" not in said:
        return f"the other process ended with {codes[1 - whose]} after {seconds:.0f} s, see {folder}"
    newest(next(folder.glob("runs/fit/*/checkpoints")))
    shutil.rmtree(folder)
    return "equal"
