"""Processes that pack parts side by side.

They are started as programs of their own, not by `multiprocessing`, which would run the user's script once more in
each, or at least import what that imports.
"""

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import chain, islice
from pathlib import Path
from threading import Lock

from ildistil.errors import ProcessError
from ildistil.shards.documents import Part, Texts
from ildistil.shards.packer import Encoder, Recipe, pack_part

# One thread each: the processes share the processors already.
_ONE_THREAD = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_Numbered = tuple[int, Part | Texts]


def run(
    recipe: Recipe, folder: Path, parts: Iterator[_Numbered], processes: int, done: Callable[[Part | Texts], None]
) -> None:
    """Pack parts, in this process if one is enough.

    Args:
        recipe: How they become rows.
        folder: Where their shards go.
        parts: The parts with their numbers; read as they are needed.
        processes: How many processes may be started.
        done: Called with each part that is finished.

    Raises:
        IldistilError: What a part is refused for.
        ProcessError: A process was killed.
    """
    first = list(islice(parts, min(2, processes)))
    parts = chain(first, parts)
    if len(first) < 2:
        encoder = Encoder(recipe)
        for number, part in parts:
            pack_part(recipe, encoder, folder, number, part)
            done(part)
        return
    lock = Lock()

    def work(worker: _Worker) -> None:
        worker.send((recipe, folder))
        while True:
            with lock:
                task = next(parts, None)
            if task is None:
                return
            worker.send(task)
            if (error := worker.receive()) is not None:
                raise error
            with lock:
                done(task[1])

    workers = [_Worker(processes) for _ in range(processes)]
    try:
        with ThreadPoolExecutor(processes) as pool:
            try:
                for future in as_completed([pool.submit(work, worker) for worker in workers]):
                    future.result()
            except BaseException:
                for worker in workers:
                    worker.process.kill()
                raise
    finally:
        for worker in workers:
            worker.close()


def usable_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Worker:
    """A process that packs one part after the other."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from ildistil.shards.packer import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | _ONE_THREAD | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._tasks, self._answers = self.process.stdin, self.process.stdout

    def send(self, task: object) -> None:
        try:
            pickle.dump(task, self._tasks)
            self._tasks.flush()
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Exception | None:
        try:
            answer: Exception | None = pickle.load(self._answers)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._death() from error
        return answer

    def close(self) -> None:
        """Close the pipes, at which the process ends, and wait for it."""
        for pipe in (self._tasks, self._answers):
            with contextlib.suppress(OSError):  # what it didn't read
                pipe.close()
        self.process.wait()

    def _death(self) -> ProcessError:
        code = self.process.wait()
        why = f"ended with exit code {code}; its last words are above" if code >= 0 else f"was killed by signal {-code}"
        memory = ", most likely because memory ran out" if code == -9 else ""
        return ProcessError(
            f"One of the {self._processes} processes that pack the corpus {why}{memory}. The finished shards stay: run "
            "again, with fewer processes if memory is short."
        )
