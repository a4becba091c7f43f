"""Sweep the architectures of the installed transformers: ``python -m sweep [model types or classes]``."""

import argparse
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

RESULTS = Path("sweep.json")


def main() -> None:
    """Sweep, write the results, and say what came of it."""
    parser = argparse.ArgumentParser(prog="sweep", description=__doc__)
    parser.add_argument("only", nargs="*", help="model types, or names of classes; all by default")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for an architecture")
    parser.add_argument("--page", action="store_true", help="write the tables of docs/models.md")
    arguments = parser.parse_args()
    import torch
    import transformers

    from sweep import cells  # noqa: F401  before the forks, which share what is imported
    from sweep.architectures import architectures

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    chosen = [a for a in architectures() if not arguments.only or {a.model_type, a.name} & set(arguments.only)]
    rows = sorted(sweep(chosen, arguments.jobs, arguments.timeout), key=lambda row: (row["model_type"], row["name"]))
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(counts(rows)) + "\n")


def sweep(chosen: Iterable[Any], jobs: int, timeout: int) -> list[dict[str, Any]]:
    """Run each architecture in a process of its own, so that what hangs or crashes is a row, not the end."""
    waiting, running, rows = list(chosen)[::-1], dict[int, tuple[Any, int, float]](), list[dict[str, Any]]()
    outputs, total = dict[int, bytes](), len(waiting)
    while waiting or running:
        while waiting and len(running) < jobs:
            architecture = waiting.pop()
            pid, pipe = _start(architecture)
            running[pipe], outputs[pipe] = (architecture, pid, time.monotonic()), b""
        for pipe in select.select(list(running), [], [], 1.0)[0]:
            data = os.read(pipe, 1 << 16)
            outputs[pipe] += data
            if not data:
                rows.append(_finish(pipe, *running.pop(pipe), outputs.pop(pipe)))
                sys.stderr.write(f"{len(rows)} of {total}: {rows[-1]['name']}, {rows[-1]['seconds']} s\n")
        for _, pid, start in running.values():
            if time.monotonic() - start > timeout:
                os.kill(pid, signal.SIGKILL)
    return rows


def _start(architecture: Any) -> tuple[int, int]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        data = json.dumps(_row(architecture)).encode()
        while data:
            data = data[os.write(writer, data) :]
        os._exit(0)
    os.close(writer)
    return pid, reader


def _finish(pipe: int, architecture: Any, pid: int, start: float, output: bytes) -> dict[str, Any]:
    os.close(pipe)
    status = os.waitpid(pid, 0)[1]
    row = {"model_type": architecture.model_type, "head": architecture.head, "name": architecture.name}
    row["seconds"] = round(time.monotonic() - start, 1)
    try:
        row |= json.loads(output)
    except ValueError:
        row |= {"not built": f"ended by signal {os.waitstatus_to_exitcode(status)} after {row['seconds']} s"}
    return row


def _row(architecture: Any) -> dict[str, Any]:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from sweep import build, cells

    build.widen_softmax()
    try:
        pair = build.pair(architecture)
        found = cells.Row(architecture, pair).cells()
        return {"dtype": str(pair.dtype), "cells": [cell._asdict() for cell in found]}
    except build.NotBuiltError as error:
        return {"not built": str(error)}
    except BaseException as error:
        return {"not built": f"the sweep itself failed: {type(error).__name__}: {error}" + cells._last_line(error)}


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How often each result occurs."""
    found: dict[str, int] = {}
    for row in rows:
        for result in ["not built"] if "not built" in row else [cell["result"] for cell in row["cells"]]:
            found[result] = found.get(result, 0) + 1
    return found


if __name__ == "__main__":
    main()
