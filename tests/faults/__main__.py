"""Experiments that try to lose a run's work: ``python -m faults --help``."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults import resume, soak, stored

# Each takes a folder and the number of an experiment, and returns "equal" or what was lost.
KINDS: dict[str, Callable[[Path, int], str]] = {
    "resume": resume.one,
    "signals": resume.one_signal,
    "writes": stored.one_write,
    "flips": stored.one_flip,
    "starts": stored.one_start,
    "predict": stored.one_predict,
    "ranks": stored.one_rank,
}


def main() -> None:
    """Run experiments and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--count", type=int, default=200, help="experiments of each kind")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="mixed experiments for some minutes instead")
    arguments = parser.parse_args()
    top = Path(tempfile.mkdtemp(prefix="faults-"))
    numbers = range(arguments.start, arguments.start + arguments.count)
    bad = 0
    if arguments.soak:
        bad = soak.soak(top, arguments.soak, KINDS, arguments.start)
    for kind in [] if arguments.soak else arguments.kinds or KINDS:
        root = top / kind
        root.mkdir()
        results: Counter[str] = Counter()
        begun = time.monotonic()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            every = pool.map(lambda number, kind=kind, root=root: KINDS[kind](root, number), numbers)
            for number, found in zip(numbers, every, strict=True):
                results["right" if found == "equal" else "lost"] += 1
                if found != "equal":
                    sys.stdout.write(f"{kind} {number}: {found}\n")
                    sys.stdout.flush()
        bad += results["lost"]
        sys.stdout.write(f"{kind}: {dict(results)} in {time.monotonic() - begun:.0f} s\n")
        sys.stdout.flush()
    if bad:
        sys.exit(f"{bad} experiments lost something; see {top}")
    shutil.rmtree(top)


if __name__ == "__main__":
    main()
