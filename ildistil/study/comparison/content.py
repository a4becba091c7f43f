"""Internal: what a comparison of trained models consists of, whatever it is written as."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ildistil.study.statistics import Estimate, McNemar, Proportion

__all__ = [
    "Against", "Bin", "Calibration", "Cost", "Flip", "Model", "OfClass", "Report", "Settings", "Speed", "as_plain",
]  # fmt: skip


@dataclass(frozen=True)
class OfClass:
    """What a model makes of one class: Wilson's intervals over the rows of it, and over those predicted as it.

    ``precision`` is None where no row is predicted as the class, ``recall`` where no row is of it.
    """

    name: str
    rows: int
    recall: Estimate | None
    precision: Estimate | None
    f1: float


@dataclass(frozen=True)
class Bin:
    """The rows whose confidence is in ``(low, high]``: their mean confidence, and the share that is right."""

    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error, mean confidence and accuracy, and the bins that have rows."""

    error: float
    confidence: float
    accuracy: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Speed:
    """Times of a forward pass over batches of one size, in seconds; ``faster`` is how many times the teacher's speed.

    ``faster`` is the median over rounds of the teacher's time by the model's, on the same rows one after the other.
    """

    batch_size: int
    rounds: int
    p50: float
    p95: float
    rows_per_second: float
    faster: float


@dataclass(frozen=True)
class Cost:
    """Parameters, bytes of the weights' files, peak bytes of a forward pass with the weights, and speeds."""

    parameters: int
    bytes_on_disk: int | None
    peak_memory: int
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Model:
    """One model: its metrics with their intervals, the primary one first; classes and calibration of a classifier."""

    name: str
    path: str
    kind: str
    layers: int
    width: int | None
    metrics: Mapping[str, Estimate]
    classes: tuple[OfClass, ...]
    calibration: Calibration | None
    cost: Cost


@dataclass(frozen=True)
class Flip:
    """A row on which student and teacher differ; ``confidence`` is the student's in what it says."""

    row: int
    texts: tuple[str, ...] | None
    label: str
    teacher: str
    student: str
    confidence: float | None


@dataclass(frozen=True)
class Against:
    """A student beside the teacher, on the primary metric.

    Attributes:
        student: Its name.
        difference: Of the metric, student less teacher.
        kept: The metric as a share of the teacher's; None where that isn't surely above 0.
        mcnemar: Of a classifier, student first.
        agreement: Rows with the same prediction; of numbers, the correlation of the predictions.
        lost: Number of rows that only the teacher is right on, and some of them.
        gained: The same of rows that only the student is right on; of numbers, none.
        size: Parameters as a share of the teacher's.
    """

    student: str
    difference: Estimate
    kept: Estimate | None
    mcnemar: McNemar | None
    agreement: Proportion | Estimate
    lost: tuple[int, tuple[Flip, ...]]
    gained: tuple[int, tuple[Flip, ...]]
    size: float


@dataclass(frozen=True)
class Settings:
    """How it was measured."""

    device: str
    dtype: str
    threads: int
    draws: int
    level: float
    bins: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """A comparison: of a teacher alone, or with students.

    Attributes:
        task: Name of the task.
        set_name: Name of the set that was measured.
        rows: Its number.
        primary: Name of the primary metric.
        majority: Accuracy of always saying the most frequent class; None in a regression.
        overlap: Rows whose texts stand in the training set, and rows of that; None where texts aren't known.
        teacher: First model.
        students: The others.
        against: Each of them beside the teacher.
        settings: How it was measured.
    """

    task: str
    set_name: str
    rows: int
    primary: str
    majority: float | None
    overlap: tuple[int, int] | None
    teacher: Model
    students: tuple[Model, ...]
    against: tuple[Against, ...]
    settings: Settings

    @property
    def models(self) -> tuple[Model, ...]:
        """All models, the teacher first."""
        return (self.teacher, *self.students)


def as_plain(value: Any) -> Any:
    """Return content as values that JSON can hold; what is not finite becomes None.

    >>> as_plain(Bin(0.0, 0.5, 3, float("nan"), 1.0))
    {'low': 0.0, 'high': 0.5, 'rows': 3, 'confidence': None, 'accuracy': 1.0}
    """
    if is_dataclass(value):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
