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


def main() -> None:
    """Run experiments and print what came of them."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="experiments of each kind")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    fits.write_data(root / "alone" if False else root)
    (root / "alone").mkdir()
    (root / "killed").mkdir()
    for folder in ("alone", "killed"):
        fits.write_data(root / folder)
    results: Counter[str] = Counter()
    begun = time.monotonic()
    every = list(resume.cases(arguments.start + arguments.count))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        numbers = range(arguments.start, arguments.start + arguments.count)
        for number, found in zip(numbers, pool.map(lambda n: resume.one(root, every[n], n), numbers), strict=True):
            results[found.split(" ")[0]] += 1
            if found != "equal":
                sys.stdout.write(f"{number}: {found}\n  {every[number]}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{dict(results)} in {time.monotonic() - begun:.0f} s; {root}\n")
    if set(results) == {"equal"}:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
