"""Experiments that try to lose a run's work: ``python -m faults --help``."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from faults import fits, resume

KINDS = {"resume": resume.one, "signals": resume.one_signal}


def main() -> None:
    """Run experiments and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="default: all")
    parser.add_argument("--count", type=int, default=200, help="experiments of each kind")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    for folder in ("alone", "killed", "stopped"):
        (root / folder).mkdir()
        fits.write_data(root / folder)
    numbers = range(arguments.start, arguments.start + arguments.count)
    cases = list(resume.cases(numbers.stop))
    bad = 0
    for kind in arguments.kinds:
        results: Counter[str] = Counter()
        begun = time.monotonic()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            every = pool.map(lambda number, kind=kind: KINDS[kind](root, cases[number], number), numbers)
            for number, found in zip(numbers, every, strict=True):
                results[found.split(" ")[0]] += 1
                if found != "equal":
                    sys.stdout.write(f"{kind} {number}: {found}\n  {cases[number]}\n")
                    sys.stdout.flush()
        bad += sum(results.values()) - results["equal"]
        sys.stdout.write(f"{kind}: {dict(results)} in {time.monotonic() - begun:.0f} s\n")
    if bad:
        sys.exit(f"{bad} experiments lost something; see {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
