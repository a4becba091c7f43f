"""Write a student's predictions to a file, one for each set."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor

from ildistil import distributed, storage
from ildistil.commands.evaluate import MeasuringRun
from ildistil.data.task import Task, set_names, task_of
from ildistil.errors import DataError, ModelError
from ildistil.metrics import IGNORED

__all__ = ["main"]

Row = tuple[int, float | list[int], list[float]]  # its id, what is predicted, probabilities of the classes


class _Predict(MeasuringRun):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add which sets."""
        super().add_arguments_to_parser(parser)
        help = "Predict for the validation sets also where there are test sets, and write the labels beside."
        parser.add_argument("--validation", type=bool, default=False, help=help)


def main(command: str, arguments: Sequence[str]) -> None:
    """Predict for the test sets, or else for the validation sets."""
    run = _Predict(command, arguments, __doc__)
    labelled = run.config.validation
    if labelled:
        run.datamodule.predict_dataloader = partial(_validation_sets, run.datamodule)
    results: list[Any] = run.start(run.trainer.predict) or []
    sets = results if results and isinstance(results[0], list) else [results]
    folder, task = Path(run.trainer.log_dir or "."), task_of(run.datamodule)
    for name, batches in zip(_suffixes(task, len(sets)), sets, strict=True):
        rows = _over_processes(list(_rows(batches, task.multi_label)))
        labels = dict(_over_processes(list(_labels(batches)))) if labelled else None
        rows = sorted(rows) if labelled else rows
        path = folder / f"predictions{name}.tsv"
        if run.trainer.is_global_zero:
            _write(rows, task, path, labels)
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


def _labels(batches: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[int, Any]]:
    """Yield the ids of all rows with their labels; ``None`` where there are none."""
    number = 0
    for batch in batches:
        ids, labels, count = batch.get("row_id"), batch.get("labels"), len(batch["logits"])
        names = range(number, number + count) if ids is None else ids.tolist()
        yield from zip(names, [None] * count if labels is None else labels.tolist(), strict=True)
        number += count


def _validation_sets(data: Any) -> Any:
    data.setup("validate")
    return data.val_dataloader()


def _over_processes(rows: list[Any]) -> list[Any]:
    """Return the rows of all processes in the order of their ids, each once."""
    if distributed.world_size() == 1:
        return rows
    parts: list[Any] = [None] * distributed.world_size()
    dist.all_gather_object(parts, rows)
    return sorted({row[0]: row for part in parts for row in part}.values())


def _write(rows: Sequence[Row], task: Task, path: Path, labels: Mapping[int, Any] | None = None) -> None:
    classes = len(rows[0][2]) if rows else 0
    names = [str(name) for name in task.label_names or range(classes)]

    def named(value: Any) -> Any:
        if task.multi_label or isinstance(value, list):
            return ", ".join(name for name, chosen in zip(names, value, strict=True) if chosen)
        return names[int(value)] if classes and value != IGNORED else "" if classes else value

    with storage.replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        label = [] if labels is None else ["label"]
        writer.writerow(["row_id", "prediction", *label, *(f"p_{name}" for name in names[:classes])])
        for row, value, probabilities in rows:
            chosen = [p > 0.5 for p in probabilities] if task.multi_label or isinstance(value, list) else value
            truth = [] if labels is None else ["" if labels[row] is None else named(labels[row])]
            writer.writerow([row, named(chosen), *truth, *(f"{p:.6f}" for p in probabilities)])
