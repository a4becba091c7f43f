"""Sweep the architectures of the installed transformers: ``python -m sweep --help``."""

import argparse
import json
import logging
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from sweep import build, page
from sweep.architectures import Architecture, architectures
from sweep.cells import _told, cells, predicts

Row = dict[str, Any]


def main() -> None:
    """Sweep, write the results as they come, and print what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m sweep", description="Compare every architecture with runs by hand."
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="model types, or names of classes")
    parser.add_argument("--again", nargs="+", default=[], metavar="RESULT", help="rows of --json with such a cell only")
    parser.add_argument(
        "--json", type=Path, default=Path("sweep.json"), help="file of the results; rows of others stay"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for an architecture")
    parser.add_argument("--page", type=Path, help="a Markdown page to write the tables into")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = {row["name"]: row for row in json.loads(arguments.json.read_text())} if arguments.json.exists() else {}
    chosen = architectures()
    if arguments.only:
        chosen = [a for a in chosen if {a.model_type, a.name} & set(arguments.only)]
    if arguments.again:
        chosen = [a for a in chosen if a.name in rows and page.results(rows[a.name]) & set(arguments.again)]
    if not (arguments.only or arguments.again):
        rows = {}
    for number, row in enumerate(sweep(chosen, arguments.jobs, arguments.timeout), 1):
        rows[row["name"]] = row
        told = ", ".join(f"{cell['term']} {cell['result']}" for cell in row["cells"]) or row["not built"]
        sys.stderr.write(f"{number} of {len(chosen)}: {row['name']}, {row['seconds']} s: {told}\n")
        arguments.json.write_text(json.dumps(sorted(rows.values(), key=lambda row: row["name"]), indent=1) + "\n")
    if arguments.page is not None:
        page.write(arguments.page, list(rows.values()))
    sys.stdout.write(f"{page.counts(list(rows.values()))}\n")


def sweep(chosen: list[Architecture], jobs: int, timeout: int) -> Iterator[Row]:
    """Run each architecture in a process of its own, so that what hangs or crashes is a row, not the end."""
    waiting, running = chosen[::-1], dict[int, tuple[Architecture, int, float, bytearray]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            architecture = waiting.pop()
            pid, pipe = _start(architecture)
            running[pipe] = (architecture, pid, time.monotonic(), bytearray())
        for pipe in select.select(list(running), [], [], 1.0)[0]:
            data = os.read(pipe, 1 << 16)
            running[pipe][3].extend(data)
            if not data:
                yield _finish(pipe, *running.pop(pipe))
        for _, pid, start, _ in running.values():
            if time.monotonic() - start > timeout:
                os.kill(pid, signal.SIGKILL)


def _start(architecture: Architecture) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        with os.fdopen(writer, "wb") as file:
            file.write(json.dumps(_row(architecture)).encode())
        os._exit(0)
    os.close(writer)
    return pid, reader


def _finish(pipe: int, architecture: Architecture, pid: int, start: float, output: bytearray) -> Row:
    os.close(pipe)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    seconds = round(time.monotonic() - start, 1)
    row: Row = {**architecture._asdict(), "seconds": seconds, "cells": []}
    try:
        return row | json.loads(output)
    except ValueError:
        return row | {"not built": f"ended with code {code} after {seconds} s"}


def _row(architecture: Architecture) -> Row:
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    build.widen_softmax()
    try:
        pair = build.pair(architecture)
        return {
            "dtype": str(pair.dtype),
            "predicts": predicts(architecture, pair),
            "cells": [cell._asdict() for cell in cells(architecture, pair)],
        }
    except build.NotBuiltError as error:
        return {"not built": str(error)}
    except BaseException as error:
        return {"not built": f"the sweep itself failed: {_told(error)}"}


if __name__ == "__main__":
    main()
