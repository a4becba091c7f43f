"""What a process of its own does for one job: claim it, run its commands, and say what came of it."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ildistil import storage
from ildistil.study import runs
from ildistil.study.jobs import Job

__all__ = ["TAKEN", "claim", "work"]

#: Exit code of a process whose job another one works on, or has finished.
TAKEN = 75
_CLAIM, _BEAT, _SIGNALS = ".claim", 10.0, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def claim(folder: Path) -> int | None:
    """Lock a job's folder until this process ends, or closes the handle; ``None`` where another process works there.

    The lock holds over all machines of one file system, and ends with the process that has it.
    """
    return storage.hold(folder / _CLAIM)


def work(study: Path, job: Job, threads: int, gpus: Sequence[str], parent: int) -> int:
    """Do a job, unless another process does or did; return this process's exit code.

    Args:
        study: the folder of the study.
        job: what is to be done.
        threads: for its computations, unless it began with another number: sums depend on it.
        gpus: those that it may use; none of them changes nothing.
        parent: the process that waits for this one, which saves and ends if that one is gone.
    """
    folder = study / job.name
    handle = claim(folder)
    status = runs.read_status(folder)
    if handle is None or status.get("state") == "finished":
        return TAKEN
    kept = _Status(folder, parent, threads=status.get("threads", threads), cost=status.get("cost", {}))

    def everything() -> None:
        _commands(study, job)
        kept.said |= _outcome(folder, job)

    _share(kept.said["threads"], gpus)
    with _logged(folder / runs.LOG), kept:
        code = _ended(everything)
    stopped = code - 128 in _SIGNALS
    kept.write("finished" if code == 0 else "waiting" if stopped else "failed",
               reason=None if code == 0 or stopped else last_lines(folder / runs.LOG))  # fmt: skip
    return code


def last_lines(log: Path, count: int = 12) -> str:
    """Return the end of a log."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "It left no log."
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.splitlines()]
    return "\n".join([line for line in lines if line.strip()][-count:])


def _commands(study: Path, job: Job) -> None:
    """Run what a job consists of; each part goes on from where it was, or is done already."""
    folder, config = study / job.name, f"--config={study / 'configs' / job.name}.yaml"
    if job.command == "precompute":
        _command("precompute", config)
        return
    _command(job.command, f"--run={folder}", "--resume", config)
    if job.name.startswith("runs/"):
        quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
        _command("predict", f"--run={folder}", "--validation=true", f"--trainer.default_root_dir={folder}", *quiet)
    if job.export:
        _command("export", str(best_checkpoint(folder)), str(folder / "student"), "--overwrite=true")


def _command(*words: str) -> None:
    sys.argv[1:] = words  # what Lightning starts further processes by
    import_module("ildistil.cli").main(words)  # the command line itself, which this room stands below


def best_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the best student of a run, or else of the last."""
    found = [folder / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    return next((file for file in found if file.is_file()), found[-1])


def _outcome(folder: Path, job: Job) -> dict[str, Any]:
    """Write what the validations of a run measured, and return what its best student reached and what it cost."""
    if job.command == "precompute":
        return {}
    from ildistil.training import checkpoint_files

    last, best = (checkpoint_files.load(path) for path in (folder / "checkpoints/last.ckpt", best_checkpoint(folder)))
    measured = last["callbacks"]["Validations"]["measured"]
    prefix = f"{job.set}/"
    curve = [{name.removeprefix(prefix): value for name, value in each.items()} for each in measured]
    storage.write_text(folder / runs.METRICS, "".join(json.dumps(each) + "\n" for each in curve))
    at = [each for each in curve if each["step"] <= best["global_step"]]
    metrics = {name: value for name, value in (at[-1] if at else {}).items() if name != "step"}
    return {"metrics": metrics, "steps": last["global_step"], "measured": {"cost": _cost(folder, last["global_step"])}}


def _cost(folder: Path, steps: int) -> dict[str, float]:
    """Return what a run logged of its speed and memory, and how often the teacher ran or was read instead."""
    import yaml

    rows = runs.logged(folder)
    speeds = [row["train/tokens_per_second"] for row in rows if "train/tokens_per_second" in row]
    memory = [row["train/peak_memory_gib"] for row in rows if "train/peak_memory_gib" in row]
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    batches = steps * int(config["trainer"].get("accumulate_grad_batches") or 1)
    found: dict[str, float] = {}
    if speeds:
        found["tokens_per_second"] = sum(speeds) / len(speeds)
    if memory:
        found["peak_memory_bytes"] = max(memory) * 2**30
    if "teacher" in config["model"]:
        stored = config["model"].get("targets") is not None
        found |= {"teacher_runs": 0 if stored else batches, "teacher_runs_saved": batches if stored else 0}
    return found


def _ended(function: Callable[[], int | None]) -> int:
    """Call a function; return the exit code that a process with it would have."""
    try:
        return function() or 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _share(threads: int, gpus: Sequence[str]) -> None:
    """Set what this process may use."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if torch := sys.modules.get("torch"):  # it read the variable before this process was forked
        torch.set_num_threads(threads)


class _Status:
    """Writes what a process does, now and then, as long as it does."""

    def __init__(self, folder: Path, parent: int, *, threads: int, cost: Mapping[str, float]) -> None:
        self.path = folder / runs.STATUS
        self.before = dict(cost)
        self.began = time.time()
        self.said: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "threads": threads}
        self._parent, self._over = parent, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self.write("running")
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def write(self, state: runs.State, reason: str | None = None) -> None:
        """Write the state."""
        now = time.time()
        seconds = self.before.get("seconds", 0.0) + now - self.began
        measured = self.said.get("measured", {}).get("cost", {})
        said = {key: value for key, value in self.said.items() if key != "measured"} | {"state": state}
        said |= {"heartbeat": now, "cost": {**self.before, **measured, "seconds": seconds}, "reason": reason}
        storage.write_text(self.path, json.dumps(said))

    def _beat(self) -> None:
        last = time.time()
        while not self._over.wait(0.5):
            if os.getppid() != self._parent:  # the study is gone: save, and end
                self._parent = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)
            if time.time() - last > _BEAT:
                last = time.time()
                with contextlib.suppress(OSError):
                    self.write("running")


@contextlib.contextmanager
def _logged(path: Path) -> Any:
    """Send all that this process prints to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for each in (1, 2):
        os.dup2(handle, each)
    os.close(handle)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def fork(function: Callable[[], int]) -> int:
    """Call a function in a process of its own, which has all that this one imported; return that process.

    Its exit code is what the function returns.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork")  # its threads are at rest
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # Ctrl-C is for the study, which tells its runs
        for each in _SIGNALS:
            signal.signal(each, signal.default_int_handler if each == signal.SIGINT else signal.SIG_DFL)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        code = _ended(function)
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
