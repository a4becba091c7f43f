"""The folder that a run owns: its configuration, checkpoints and metrics; claimed by one process, and gone on in."""

import csv
import itertools
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from ildistil import storage
from ildistil.commands._parser import with_flags
from ildistil.errors import ConfigError, writing
from ildistil.training import checkpoint_files

__all__ = ["KeepConfig", "RunFolder", "keep_metrics", "saved_config", "whole_config"]

# How processes that Lightning starts learn the folder that the first of them claimed.
_VARIABLE = "ILDISTIL_RUN_FOLDER"
_CONFIG, _METRICS, _LOCK = "config.yaml", "metrics.csv", ".lock"


@dataclass(frozen=True)
class RunFolder:
    """What ``--run FOLDER`` and ``--resume`` ask for.

    Args:
        path: the folder; ``None`` for a new one.
        resume: whether a training goes on in it.
        arguments: the other words of the command line, with those that follow from the folder.
    """

    path: Path | None
    resume: bool = False
    arguments: list[str] = field(default_factory=list)

    @classmethod
    def training(cls, command: str, words: Sequence[str]) -> "RunFolder":
        """Read the words of a command that trains.

        Raises:
            ConfigError: the folder holds a run, and it isn't to go on; or there is none to go on.
            CheckpointError: all of its checkpoints are damaged.
        """
        named, resume, rest = _taken(words)
        if not resume:
            if named is not None and (named / "checkpoints").exists():
                raise ConfigError(
                    f"{str(named)!r} holds a run. Go on with it (ildistil {command} --resume --run {named}), or name "
                    "another folder."
                )
            return cls(named, arguments=rest)
        if _names(rest, "--ckpt_path"):
            raise ConfigError("--resume finds the run's newest checkpoint by itself: leave out --ckpt_path.")
        path = named or _newest(Path("runs") / command)
        if path is None:
            return cls(None, arguments=rest)  # the first start of a run that is always started by the same words
        if named is not None and not (named / _CONFIG).is_file() and not _names(rest, "--config", "-c", "--preset"):
            raise ConfigError(f"There is no run in {str(named)!r} to go on with. Name its folder, or a configuration.")
        config = [f"--config={path / _CONFIG}"] if (path / _CONFIG).is_file() else []
        found = checkpoint_files.newest(path / "checkpoints")
        return cls(path, True, [*config, *rest, *([f"--ckpt_path={found}"] if found else [])])

    @classmethod
    def measuring(cls, words: Sequence[str]) -> "RunFolder":
        """Read the words of a command that measures the best student of a run, in the run's own configuration.

        Raises:
            ConfigError: there is no such run.
        """
        named, resume, rest = _taken(words)
        if resume:
            raise ConfigError("--resume goes on with a training: use it with 'fit' or 'finetune'.")
        if named is None:
            return cls(None, arguments=rest)
        files = [named / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
        kept = [file for file in files if file.is_file()]
        if not kept or not (named / _CONFIG).is_file():
            raise ConfigError(f"There is no run in {str(named)!r}: a run has a {_CONFIG} and checkpoints.")
        path = [] if _names(rest, "--ckpt_path") else [f"--ckpt_path={kept[0]}"]
        return cls(None, arguments=[f"--config={named / _CONFIG}", *rest, *path])

    @contextmanager
    def owned(self, command: str, *, lock: bool) -> Iterator[Path]:
        """Yield the folder, or a new one, as long as this process works in it.

        Args:
            command: the name of the command, above new folders.
            lock: whether to keep others out.

        Raises:
            ConfigError: another process trains there.
        """
        given = os.environ.get(_VARIABLE)
        folder = self.path or (Path(given) if given else _claimed(Path("runs") / command))
        if not _is_first():
            if given is not None:
                threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
            yield folder
            return
        handle = storage.hold(folder / _LOCK) if lock else None
        if lock and handle is None:
            raise ConfigError(f"Another process trains in {str(folder)!r}. Wait for it, or name another folder.")
        os.environ[_VARIABLE] = str(folder)
        try:
            yield folder
        finally:
            del os.environ[_VARIABLE]
            if handle is not None:
                os.close(handle)


def _claimed(parent: Path) -> Path:
    """Make the next folder ``version_N``, which no other process gets."""
    numbers = [int(p.name[8:]) for p in parent.glob("version_*") if p.name[8:].isdigit()]
    for number in itertools.count(max(numbers, default=-1) + 1):
        folder = parent / f"version_{number}"
        if not _is_first():
            break  # only a name: the first process writes
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                continue
        break
    return folder


def keep_metrics(trainer: L.Trainer, step: int) -> None:
    """Keep what a run that goes on has logged before a step: Lightning's loggers begin with an empty file."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            _keep_rows(logger, step)


def _keep_rows(logger: CSVLogger, step: int) -> None:
    path = Path(logger.log_dir) / _METRICS
    earlier = path.with_name(f".{_METRICS}.earlier")  # what it holds is nowhere else until it is written anew
    if path.is_file() and not earlier.is_file():
        os.replace(path, earlier)
    if not earlier.is_file():
        return
    lines = earlier.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
    rows = [row for row in csv.DictReader(whole) if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    writer: Any = logger.experiment
    writer.metrics = [{key: value for key, value in row.items() if value} for row in rows] + writer.metrics
    if writer.metrics:
        writer.save()
    earlier.unlink()


class KeepConfig(SaveConfigCallback):
    """Writes the whole configuration into the run's folder; what an earlier start wrote stays beside it.

    Args:
        parser: what dumps it.
        config: all of it.
        folder: of the run; by default the logger's.
    """

    def __init__(self, parser: Any, config: Any, folder: Path | None = None) -> None:
        super().__init__(parser, config)
        self.folder = folder

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Write it, in one process."""
        logs = trainer.log_dir  # asked in all processes: the first tells it the others
        folder = self.folder or logs
        if self.already_saved or not trainer.is_global_zero or folder is None:
            return
        self.already_saved = True
        text = whole_config(self.parser, self.config)
        path = Path(folder) / _CONFIG
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            earlier = (Path(folder) / f"config-{number}.yaml" for number in itertools.count(1))
            os.replace(path, next(name for name in earlier if not name.exists()))
        storage.write_text(path, text)


def saved_config(words: Sequence[str]) -> dict[str, Any]:
    """Return the configuration in the folder that ``--run`` names; empty where there is none."""
    named, _, _ = _taken(words)
    if named is None or not (named / _CONFIG).is_file():
        return {}
    found = yaml.safe_load((named / _CONFIG).read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def whole_config(parser: Any, config: Any) -> str:
    """Return all of a configuration as YAML, to be read by any command and for any folder."""
    config = config.clone()
    for name in ("config", "ckpt_path"):
        config.pop(name, None)
    if config.trainer.logger == parser.get_defaults().trainer.logger:
        config.trainer.pop("logger")  # it is another command's, or another run's, when the file is read
    return str(parser.dump(config, skip_none=False, skip_validation=True))


def _taken(words: Sequence[str]) -> tuple[Path | None, bool, list[str]]:
    """Return the folder, whether to resume, and the other words."""
    named, resume, rest, left = None, False, [], list(with_flags(words, "resume"))
    while left:
        word = left.pop(0)
        option, equals, value = word.partition("=")
        if option not in ("--run", "--resume"):
            rest.append(word)
            continue
        value = value if equals else left.pop(0) if left else ""
        if option == "--run":
            if not value or value.startswith("--"):
                raise ConfigError("--run needs the name of a folder.")
            named = Path(value)
        elif value not in ("true", "false"):
            raise ConfigError(f"--resume is true or false, got {value!r}. The run's folder goes behind --run.")
        else:
            resume = value == "true"
    return named, resume, rest


def _end_with(parent: int) -> None:
    """End this process some seconds after the one that started it: it may wait for that one forever."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(10)  # it may come to its end in words
    os._exit(1)


def _is_first() -> bool:
    """Return whether this is the process that writes; known before there is a Trainer."""
    return _get_rank() in (None, 0)


def _newest(parent: Path) -> Path | None:
    """Return the run that was saved last."""
    found = {path: path.stat().st_mtime_ns for path in parent.glob("*/checkpoints/*.ckpt")}
    return max(found, key=lambda path: found[path]).parent.parent if found else None


def _names(words: Sequence[str], *options: str) -> bool:
    return any(word.split("=")[0] in options for word in words)
