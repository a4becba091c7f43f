"""Write a student's predictions to a file, one for each set."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ildistil import distributed, storage
from ildistil.commands.evaluate import MeasuringRun
from ildistil.data.task import Task, set_names, task_of
from ildistil.errors import DataError, ModelError

__all__ = ["main"]

Row = tuple[int, float | list[int], list[float]]  # its id, what is predicted, probabilities of the classes


def main(command: str, arguments: Sequence[str]) -> None:
    """Predict for the test sets, or else for the validation sets."""
    run = MeasuringRun(command, arguments, __doc__)
    results: list[Any] = run.start(run.trainer.predict) or []
    sets = results if results and isinstance(results[0], list) else [results]
    folder, task = Path(run.trainer.log_dir or "."), task_of(run.datamodule)
    for name, batches in zip(_suffixes(task, len(sets)), sets, strict=True):
        rows = _over_processes(list(_rows(batches, task.multi_label)))
        path = folder / f"predictions{name}.tsv"
        if run.trainer.is_global_zero:
            _write(rows, task, path)
            print(f"Predictions: {path}")


def _suffixes(task: Task, count: int) -> list[str]:
    if count == 1:
        return [""]
    declared = next((n for n in (task.test_names, task.validation_names) if len(n) == count), ["set"])
    return [f"_{name}" for name in set_names(declared, count)]


def _rows(batches: Sequence[Mapping[str, Tensor]], multi_label: bool) -> Iterator[Row]:
    """Yield the rows of all batches; without ids in the data they are numbered."""
    number = 0
    for batch in batches:
        logits, ids = batch["logits"].float(), batch.get("row_id")
        if logits.ndim != 2:
            shape = tuple(logits.shape)
            raise ModelError(f"The student's logits have the shape {shape}. Use a head that has one prediction a row.")
        if ids is None and distributed.world_size() > 1:
            raise DataError("The batches have no 'row_id', so the rows of several processes can't be put in order.")
        count, classes = logits.shape
        multi_label = multi_label or batch["prediction"].ndim == 2
        names = range(number, number + count) if ids is None else ids.tolist()
        shares = logits.sigmoid() if multi_label else logits.softmax(-1)
        probabilities = [[]] * count if classes == 1 and not multi_label else shares.tolist()
        yield from zip(names, batch["prediction"].tolist(), probabilities, strict=True)
        number += count


def _over_processes(rows: list[Row]) -> list[Row]:
    """Return the rows of all processes in the order of their ids, each once."""
    if distributed.world_size() == 1:
        return rows
    parts: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(parts, rows)
    return sorted({row[0]: row for part in parts for row in part}.values())


def _write(rows: Sequence[Row], task: Task, path: Path) -> None:
    classes = len(rows[0][2]) if rows else 0
    names = [str(name) for name in task.label_names or range(classes)]
    with storage.replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["row_id", "prediction", *(f"p_{name}" for name in names[:classes])])
        for row, value, probabilities in rows:
            if task.multi_label or isinstance(value, list):
                label: Any = ", ".join(name for name, p in zip(names, probabilities, strict=True) if p > 0.5)
            else:
                label = names[int(value)] if classes else value
            writer.writerow([row, label, *(f"{p:.6f}" for p in probabilities)])
