"""What the runs of a study gave, as it is on disk; read without torch, so that a thousand runs take no time.

A study's folder::

    study.json              its plan: the runs, each with its factors
    configs/NAME.yaml       the whole configuration of a run
    runs/NAME/              the folder of a run: what `ildistil fit --run` writes, and
        status.json         its state, written by the process that works on it
        metrics.jsonl       a line a validation, once it is finished
        predictions.tsv     rows of the validation set, predicted by the best student
        run.log             what it printed
"""

import csv
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

from ildistil import storage
from ildistil.errors import DataError, MissingFileError, writing

__all__ = ["Run", "State", "read_csv", "read_runs", "write_csv"]

State = Literal["finished", "running", "failed", "waiting"]
PLAN, STATUS, METRICS, LOGGED = "study.json", "status.json", "metrics.jsonl", "metrics.csv"
PREDICTIONS, LOG = "predictions.tsv", "run.log"
#: Seconds without a sign of life after which a run doesn't count as running.
SILENCE = 120.0
_PLAIN = ("name", "state", "predictions", "reason", "curve")


@dataclass(frozen=True)
class Run:
    """One run of a study, as far as it is.

    Args:
        name: that of its folder.
        factors: what differs between the runs, such as objective, initialisation, task, learning_rate, seed.
        state: waiting if it never started, or was stopped and can go on.
        metrics: of the best student on the validation set, without its prefix: accuracy, f1, loss ...
        curve: one entry a validation: its step, and what was measured.
        cost: seconds, tokens_per_second, peak_memory_bytes, teacher_runs, teacher_runs_saved; what is known of them.
        predictions: tab-separated rows of the validation set: row_id, prediction, label, and probabilities.
        reason: of a failure: its last lines.
    """

    name: str
    factors: Mapping[str, str]
    state: State = "waiting"
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[Mapping[str, float]] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    predictions: Path | None = None
    reason: str | None = None


def read_runs(study: Path) -> list[Run]:
    """Read all runs of a study's plan, in its order.

    Args:
        study: the folder of the study.

    Raises:
        MissingFileError: there is no study.
        DataError: its plan is damaged.
    """
    return [_read_run(study / "runs" / each["name"], each["factors"]) for each in read_plan(study)["runs"]]


def read_plan(study: Path) -> dict[str, Any]:
    """Read the plan of a study.

    Raises:
        MissingFileError: there is none.
        DataError: it is damaged.
    """
    path = study / PLAN
    if not path.is_file():
        raise MissingFileError(f"There is no study in {str(study)!r}: 'ildistil study run FILE' makes one.")
    try:
        return cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Delete it; 'ildistil study run FILE' writes it anew.") from error


def read_status(folder: Path) -> dict[str, Any]:
    """Read what the process that worked on a run said last; empty where none did."""
    try:
        found = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Read the validations of a run: as they were kept when it was finished, else as they were logged so far."""
    kept = folder / METRICS
    if kept.is_file():
        return [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return logged_curve(folder)


def logged_curve(folder: Path, prefix: str = "val") -> list[dict[str, float]]:
    """Return the validations among what a run has logged, without the prefix of their names."""
    found = []
    for row in logged(folder):
        measured = {name.removeprefix(f"{prefix}/"): value for name, value in row.items() if name.startswith(prefix)}
        if measured:
            found.append({"step": row.get("step", math.nan)} | measured)
    return found


def logged(folder: Path) -> list[dict[str, float]]:
    """Return what a run has logged: a row a time, with the numbers that it has."""
    try:
        text = (folder / LOGGED).read_text(encoding="utf-8", errors="replace").replace("\0", "")
    except OSError:
        return []
    rows = csv.DictReader([line for line in text.splitlines(keepends=True) if line.endswith("\n")])
    return [{name: float(value) for name, value in row.items() if name and _is_number(value)} for row in rows]


def write_csv(runs: Iterable[Run], path: Path) -> None:
    """Write every run as a line; `read_csv` reads the same runs again.

    Args:
        runs: of one study.
        path: the file; predictions are named as seen from its folder.

    Raises:
        WriteError: it can't be written.
    """
    runs = list(runs)
    groups = ("factors", "metrics", "cost")
    named = [(group, name) for group in groups for name in dict.fromkeys(n for r in runs for n in getattr(r, group))]
    with writing(path), storage.replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_PLAIN[:2], *(f"{group}.{name}" for group, name in named), *_PLAIN[2:]])
        for run in runs:
            predictions = run.predictions and Path(os.path.relpath(run.predictions, path.parent)).as_posix()
            curve = json.dumps([dict(point) for point in run.curve]) if run.curve else ""
            cells = [getattr(run, group).get(name, "") for group, name in named]
            writer.writerow([run.name, run.state, *cells, predictions or "", run.reason or "", curve])


def read_csv(path: Path) -> list[Run]:
    """Read what `write_csv` wrote.

    Raises:
        MissingFileError: there is no such file.
        DataError: it is no table of runs.
    """
    if not path.is_file():
        raise MissingFileError(f"There is no file {str(path)!r}.")
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(_PLAIN) - set(reader.fieldnames or ()):
            raise DataError(f"{path} is no table of runs: it has no column {', '.join(sorted(missing))}.")
        try:
            return [_from_row(row, path.parent) for row in reader]
        except ValueError as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}.") from error


def _from_row(row: Mapping[str, str], folder: Path) -> Run:
    if row["state"] not in get_args(State):
        raise ValueError(f"there is no state {row['state']!r}")

    def group(name: str) -> dict[str, str]:
        return {key.split(".", 1)[1]: value for key, value in row.items() if key.startswith(f"{name}.") and value != ""}

    return Run(
        row["name"],
        group("factors"),
        cast(State, row["state"]),
        {name: float(value) for name, value in group("metrics").items()},
        json.loads(row["curve"] or "[]"),
        {name: float(value) for name, value in group("cost").items()},
        Path(os.path.normpath(folder / row["predictions"])) if row["predictions"] else None,
        row["reason"] or None,
    )


def _read_run(folder: Path, factors: Mapping[str, str]) -> Run:
    status, predictions = read_status(folder), folder / PREDICTIONS
    curve = read_curve(folder) if status else []
    finished = status.get("state") == "finished"
    metrics = status.get("metrics") or ({k: v for k, v in curve[-1].items() if k != "step"} if curve else {})
    return Run(
        folder.name,
        dict(factors),
        state_of(status),
        metrics,
        curve,
        status.get("cost", {}),
        predictions if finished and predictions.is_file() else None,
        status.get("reason"),
    )


def state_of(status: Mapping[str, Any]) -> State:
    """Return the state of a run; one that gave no sign of life for long was killed, and waits to go on."""
    state = status.get("state", "waiting")
    if state == "running" and time.time() - status.get("heartbeat", 0.0) > SILENCE:
        return "waiting"
    return cast(State, state)


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and text != "" and float(text) is not None
    except ValueError:
        return False
