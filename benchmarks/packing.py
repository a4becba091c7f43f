"""What packing a corpus costs beside its tokenizer, and how much memory: the same lines, on as many processes.

The bare tokenizer encodes the lines of the corpus in batches, in processes that are started, and have read their lines,
before the clock runs. Packing runs from the files to the shards, the start of its processes included. They take turns;
figures are medians. Memory is the peak of the resident sizes of all processes that pack, also for the first
``--small`` megabytes of the corpus. ``--tokenizer`` is a folder or a name on the hub.

``python benchmarks/packing.py --corpus wiki.txt --tokenizer teacher``
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from measure import finish, options

_BATCH = 1000


def encode(corpus: str, tokenizer: str, share: tuple[int, int], pipe: Connection) -> None:
    """Encode every ``share[1]``-th line from ``share[0]`` on, each time that the pipe asks; answer with seconds."""
    from transformers import AutoTokenizer

    encoder = AutoTokenizer.from_pretrained(tokenizer)
    with open(corpus, encoding="utf-8") as file:
        lines = [line for line in file.read().split("\n") if line][share[0] :: share[1]]
    encoder(lines[:_BATCH], verbose=False)
    pipe.send(0.0)
    while pipe.recv():
        start = time.perf_counter()
        for at in range(0, len(lines), _BATCH):
            encoder(lines[at : at + _BATCH], verbose=False)["input_ids"]
        pipe.send(time.perf_counter() - start)


def pack_once(corpus: str, tokenizer: str, length: int, processes: int, pipe: Connection) -> None:
    """Pack into a fresh folder; answer with seconds and tokens."""
    from transformers import AutoTokenizer

    from ildistil.data.packing import Packing, TextFiles, pack

    packing = Packing(AutoTokenizer.from_pretrained(tokenizer), length)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        packed = pack(TextFiles(corpus), packing, folder, processes)
        pipe.send((time.perf_counter() - start, packed.train.tokens))


def packing(corpus: str, arguments: argparse.Namespace) -> tuple[float, int, float]:
    """Pack in a process of its own; return seconds, tokens, and the peak of the memory of all processes in MB."""
    here, there = _context().Pipe()
    child = _context().Process(
        target=pack_once, args=(corpus, arguments.tokenizer, arguments.length, arguments.processes, there)
    )
    child.start()
    peak = 0
    while child.is_alive():
        peak = max(peak, _resident(child.pid or 0))
        time.sleep(0.02)
    seconds, tokens = here.recv()
    return seconds, tokens, peak / 1e6


def measure(arguments: argparse.Namespace) -> list[list[object]]:
    pipes = []
    for i in range(arguments.processes):
        here, there = _context().Pipe()
        given = (arguments.corpus, arguments.tokenizer, (i, arguments.processes), there)
        _context().Process(target=encode, args=given, daemon=True).start()
        pipes.append(here)

    def answers() -> list[float]:
        return [pipe.recv() for pipe in pipes]

    def bare() -> float:
        for pipe in pipes:
            pipe.send(True)
        return max(answers())

    answers()
    kinds: dict[str, Callable[[], tuple[float, int, float]]] = {
        "bare tokenizer": lambda: (bare(), 0, 0.0),
        "packing": lambda: packing(arguments.corpus, arguments),
    }
    found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in kinds}
    for repeat in range(arguments.repeats):
        # Alternate who goes first: what warms the caches must not favour one side.
        for name in list(kinds)[:: 1 if repeat % 2 else -1]:
            found[name].append(kinds[name]())
    for pipe in pipes:
        pipe.send(False)
    medians = {name: statistics.median(seconds for seconds, _, _ in runs) for name, runs in found.items()}
    size = os.path.getsize(arguments.corpus) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small.txt")
        small.write_bytes(_head(Path(arguments.corpus), arguments.small * 10**6))
        small_run = packing(str(small), arguments)
        small_size = small.stat().st_size / 1e6
    rows: list[list[object]] = []
    for name, runs in found.items():
        peak = max(memory for _, _, memory in runs)
        rows.append([name, size, medians[name], size / medians[name], medians["bare tokenizer"] / medians[name], peak])
    return [*rows, ["packing", small_size, small_run[0], small_size / small_run[0], float("nan"), small_run[2]]]


def _head(corpus: Path, size: int) -> bytes:
    """Return the first lines of a corpus, blank ones included."""
    with corpus.open("rb") as file:
        return file.read(size) + file.readline()


def _resident(pid: int) -> int:
    """Return the bytes that a process and all it started have in memory, shared pages counted in each."""
    process = Path(f"/proc/{pid}")
    try:
        pages = int((process / "statm").read_text().split()[1])
        command = (process / "cmdline").read_bytes()
        children = [c for task in (process / "task").iterdir() for c in (task / "children").read_text().split()]
        # A process that still has its parent's command is about to become another, and shares all memory until then.
        started = [int(child) for child in children if Path(f"/proc/{child}/cmdline").read_bytes() != command]
    except (OSError, IndexError):  # it has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(map(_resident, started))


def _context() -> multiprocessing.context.SpawnContext:
    return multiprocessing.get_context("spawn")


if __name__ == "__main__":
    parser = options(__doc__, corpus="wiki.txt", tokenizer="teacher", length=128, processes=2, repeats=3, small=5)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process
    load = os.getloadavg()[0]
    header = ["what", "MB", "s", "MB/s", "of the tokenizer's speed", "peak memory MB"]
    finish("packing", header, measure(arguments), arguments.json, load=load, processes=arguments.processes)
