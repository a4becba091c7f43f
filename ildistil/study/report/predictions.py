"""Internal: row-wise predictions of runs, where they are at hand and give the metric that was logged."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ildistil.study import statistics
from ildistil.study.report.grid import Metric, value_of
from ildistil.study.runs import Run

__all__ = ["Rows", "read_rows"]

Floats = NDArray[np.float64]
#: Readings of a metric's name; that which gives what was logged is used.
_READINGS: Mapping[str, Sequence[statistics.CountedMetric]] = {
    "accuracy": [statistics.accuracy],
    "f1": [statistics.F1(1), statistics.F1(0), statistics.F1(None)],
    "macro_f1": [statistics.F1(None)],
    "matthews": [statistics.matthews],
    "pearson": [statistics.pearson],
    "spearman": [statistics.spearman],
}


@dataclass(frozen=True)
class Rows:
    """Predictions of runs on the same rows.

    Args:
        predictions: name of the run to predictions, ``(rows,)``.
        labels: ``(rows,)``.
        metric: what of them is compared, in the unit of the report.
    """

    predictions: Mapping[str, Floats]
    labels: Floats
    metric: statistics.CountedMetric


def read_rows(runs: Sequence[Run], metric: Metric) -> Rows | str:
    """Read the predictions of all runs that have a value; or return why they can't be used."""
    runs = [run for run in runs if value_of(run, metric.name) is not None]
    if metric.name not in _READINGS:
        return f"{metric.name} is not computed from predictions"
    if all(run.predictions is None for run in runs):
        return "there are no predictions"
    read: dict[str, dict[str, tuple[str, str]]] = {}
    names: tuple[str, ...] = ()
    for run in runs:
        found = _read(run.predictions) if run.predictions is not None and run.predictions.is_file() else None
        if found is None:
            return f"the predictions of {run.name} aren't there, or have no labels"
        names, read[run.name] = found
    if not read:
        return "no run has a value"
    first = next(iter(read.values()))
    if any(rows.keys() != first.keys() or any(rows[i][1] != first[i][1] for i in first) for rows in read.values()):
        return "the runs have predictions of different rows"
    kept = [row for row in first if first[row][1] != ""]
    numbers = {name: float(number) for number, name in enumerate(names)}
    try:
        labels = np.array([numbers[first[row][1]] if names else float(first[row][1]) for row in kept])
        values = {
            name: np.array([numbers[rows[row][0]] if names else float(rows[row][0]) for row in kept])
            for name, rows in read.items()
        }
    except (KeyError, ValueError):
        return "the predictions are of classes that have no probabilities"
    logged = {run.name: run.metrics[metric.name] * metric.scale for run in runs}
    for reading in _READINGS[metric.name]:
        counted = _Scaled(reading, metric.scale)
        given = counted(np.stack([values[name] for name in logged]), labels, np.ones((1, len(kept))))[0]
        if np.allclose(given, list(logged.values()), atol=1e-5 * metric.scale, rtol=0):
            return Rows(values, labels, counted)
    return f"the predictions don't give the {metric.name} that was logged"


@dataclass(frozen=True)
class _Scaled:
    metric: statistics.CountedMetric
    scale: float

    def __call__(self, predictions: Floats, labels: Floats, counts: Floats, /) -> Floats:
        """Compute the metric in the unit of the report."""
        return np.asarray(self.scale * self.metric(predictions, labels, counts))


def _read(path: Path) -> tuple[tuple[str, ...], dict[str, tuple[str, str]]] | None:
    """Return the classes, none of a regression, and row to prediction and label."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            fields = list(reader.fieldnames or ())
            rows = {row["row_id"]: (row["prediction"], row["label"]) for row in reader}
    except (OSError, KeyError, ValueError):
        return None
    return (tuple(name[2:] for name in fields if name.startswith("p_")), rows) if rows else None
