"""Mixed experiments for some minutes beside one training that nobody disturbs: nothing is lost, nothing grows."""

import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from faults import processes
from faults.fits import Case, fit, write_data

Experiment = Callable[[Path, int], str]
# Of one kind of experiment to another; a start is of eight trainings.
SHARES = {"resume": 5, "signals": 4, "writes": 3, "flips": 4, "predict": 1, "ranks": 1, "starts": 1}


def soak(root: Path, minutes: float, kinds: Mapping[str, Experiment], seed: int) -> int:
    """Run experiments until the time is over; return how many lost something, or grew."""
    long = root / "long" / "run"
    long.mkdir(parents=True)
    write_data(root / "long")
    child = processes.start(lambda: fit(long, Case(epochs=1_000_000)), long / "log")
    draw, results, end = random.Random(seed), Counter[str](), time.monotonic() + 60 * minutes
    samples: list[tuple[float, int]] = []
    begun, bad, number = time.monotonic(), 0, seed
    while time.monotonic() < end:
        number += 1
        kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
        folder = root / kind
        folder.mkdir(exist_ok=True)
        found = kinds[kind](folder, number)
        results[kind] += 1
        if found != "equal":
            bad += 1
            sys.stdout.write(f"{kind} {number}: {found}\n")
            sys.stdout.flush()
        for path in folder.glob(f"*-{number}"):
            shutil.rmtree(path, ignore_errors=True)
        if time.monotonic() - begun > 60:  # by then it has all that it will hold
            samples.append(_size(child))
    os.killpg(child, signal.SIGTERM)
    (code,) = processes.wait([child], 60)
    steps = (long / "checkpoints" / "last.ckpt").exists()
    half = len(samples) // 2
    memory = [statistics.median(m for m, _ in part) for part in (samples[:half], samples[half:])]
    handles = [max(n for _, n in part) for part in (samples[:half], samples[half:])]
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(results.items()))
    sys.stdout.write(
        f"soak: {told}: {bad} lost something. The undisturbed training had {memory[0]:.0f}, then {memory[1]:.0f} MiB "
        f"(medians of the halves of {len(samples)} looks), and {handles[0]} and then {handles[1]} open files; SIGTERM "
        f"ended it with {code}.\n"
    )
    grew = memory[1] > 1.05 * memory[0] or handles[1] > handles[0] + 2
    return bad + grew + (code != 128 + signal.SIGTERM) + (not steps)


def _size(child: int) -> tuple[float, int]:
    """Return the resident memory in MiB, and the number of open files of a process."""
    lines = Path(f"/proc/{child}/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return resident / 1024, len(os.listdir(f"/proc/{child}/fd"))
