"""Internal: from trained models and a data module to the content of a comparison."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import lightning as L
import torch
import transformers
from torchmetrics import Metric

from ildistil.data.task import Task, Texts, task_of
from ildistil.errors import ConfigError, DataError
from ildistil.students.sources import Dtype
from ildistil.study.comparison import quality
from ildistil.study.comparison.content import Against, Cost, Model, Report, Settings
from ildistil.study.comparison.cost import costs
from ildistil.study.comparison.outputs import Outputs, Reading, find_set, first_set, outputs
from ildistil.study.comparison.quality import Answers
from ildistil.study.comparison.readings import readings
from ildistil.study.statistics import OverRows, mcnemar, proportion

__all__ = ["compare_models"]

# Rows whose inputs are kept for timing.
_TIMED_ROWS = 256


def compare_models(
    paths: Sequence[str],
    data: L.LightningDataModule,
    *,
    set_name: str | None = None,
    flips: int = 3,
    seconds: float = 10.0,
    accelerator: str = "auto",
    dtype: Dtype = "float32",
    level: float = 0.95,
    draws: int = 10_000,
) -> Report:
    """Compare exported students with their teacher, or measure a teacher alone.

    Args:
        paths: Folders or hub names of trained models, the teacher first.
        data: The task. A data module of this library is read by each model with its own tokenizer.
        set_name: The set to measure on; by default the first validation set, or else the first test set.
        flips: How many rows to show that student and teacher differ on, of each kind.
        seconds: To time the models for, with each batch size; 0 leaves times out.
        accelerator: Where they run, in Lightning's words.
        dtype: Precision of the weights.
        level: Of confidence.
        draws: Resamples of the rows.

    Raises:
        IldistilError: The models don't fit each other or the data, or there is nothing to measure.
    """
    if flips < 0 or seconds < 0:
        raise ConfigError(f"flips and seconds can't be negative, got {flips} and {seconds}.")
    name = set_name or first_set(task_of(data))
    find_set(task_of(data), name)
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    models = readings(paths, data, trainer, name, dtype)
    device, task = trainer.strategy.root_device, task_of(data)
    said = [outputs(model, device, _TIMED_ROWS) for model in models]
    _check_rows(models, said)
    rows = _Rows(task, name, models, said, level, draws)
    students = range(1, len(models))
    measured = [rows.model(i, cost) for i, cost in enumerate(costs(models, said, device, seconds))]
    return Report(
        task=task.task_name or type(data).__name__,
        set_name=name,
        rows=len(said[0].ids),
        primary=rows.primary,
        majority=rows.majority,
        overlap=_overlap(task, rows.texts),
        teacher=measured[0],
        students=tuple(measured[1:]),
        against=tuple(rows.against(i, flips) for i in students),
        settings=_settings(device, dtype, draws, level),
    )


@dataclass(frozen=True)
class _Rows:
    """What all models say of the rows of a set."""

    task: Task
    set_name: str
    models: Sequence[Reading]
    said: Sequence[Outputs]
    level: float
    draws: int

    @cached_property
    def answers(self) -> list[Answers]:
        return [Answers(each.logits, each.labels) for each in self.said]

    @cached_property
    def metrics(self) -> dict[str, OverRows]:
        """Metrics of all models, the primary one first."""
        names = list(_metrics(self.task))
        first = self.task.primary_metric if self.task.primary_metric in names else names[0]
        order = sorted(names, key=lambda name: name != first)
        return {
            name: quality.measured(self.answers, partial(_metric, self.task, name), self.level, self.draws)
            for name in order
        }

    @property
    def primary(self) -> str:
        return next(iter(self.metrics))

    @property
    def majority(self) -> float | None:
        labels = self.answers[0].labels.tolist()
        return None if self.answers[0].is_regression else Counter(labels).most_common(1)[0][1] / len(labels)

    @cached_property
    def classes(self) -> list[str]:
        info = self.models[0].info
        return list(self.task.label_names or info.label_names or map(str, range(info.labels or 0)))

    @cached_property
    def texts(self) -> Texts | None:
        """Texts of the set's rows by their ids, where the data module knows them."""
        split, number = find_set(self.task, self.set_name)
        found = self.task.texts(split)
        return None if found is None else found[number]

    def model(self, number: int, cost: Cost) -> Model:
        """Return what is known of one model."""
        reading, answers = self.models[number], self.answers[number]
        metrics = {name: over.of(number) for name, over in self.metrics.items()}
        if "accuracy" in metrics and not answers.is_regression:  # Wilson's interval has a width near 0 and 1
            right = answers.right
            metrics["accuracy"] = proportion(int(right.sum()), len(right), self.level).share
        return Model(
            name=reading.name,
            path=reading.path,
            kind=reading.info.name,
            layers=reading.info.depth,
            width=reading.info.width,
            metrics=metrics,
            classes=() if answers.is_regression else quality.of_classes(answers, self.classes, self.level),
            calibration=None if answers.is_regression else quality.calibration(answers),
            cost=cost,
        )

    def against(self, number: int, flips: int) -> Against:
        """Return a student beside the teacher."""
        teacher, student, over = self.answers[0], self.answers[number], self.metrics[self.primary]
        ids = self.said[0].ids.tolist()
        lost, gained = quality.flips(teacher, student, ids, self.classes, self.texts, flips)
        return Against(
            student=self.models[number].name,
            difference=over.difference(number, 0),
            kept=over.ratio(number, 0),
            mcnemar=None if student.is_regression else mcnemar(student.right, teacher.right),
            agreement=quality.agreement(teacher, student, self.level, self.draws),
            lost=lost,
            gained=gained,
            size=self.models[number].info.parameters / self.models[0].info.parameters,
        )


def _metrics(task: Task) -> Mapping[str, Metric]:
    found = task.metrics()
    if found is None or not len(found):
        raise DataError("The data module has no metrics, so there is nothing to compare by. Let metrics() return some.")
    return dict(found.items())


def _metric(task: Task, name: str) -> Metric:
    return _metrics(task)[name]


def _check_rows(models: Sequence[Reading], said: Sequence[Outputs]) -> None:
    """Refuse models that got other rows than the teacher."""
    for reading, each in zip(models, said, strict=True):
        if not torch.equal(each.ids, said[0].ids) or not torch.equal(each.labels, said[0].labels):
            raise DataError(
                f"The data module gave {reading.name} other rows than {models[0].name}. Give the batches a row_id, and "
                "let the set be the same each time."
            )


def _overlap(task: Task, texts: Texts | None) -> tuple[int, int] | None:
    """Return how many rows of the set have the texts of a training row, and the number of training rows."""
    trained = task.texts("train") if texts is not None else None
    if not trained or texts is None:
        return None
    known = {row for each in trained for row in each}
    return sum(row in known for row in texts), sum(map(len, trained))


def _settings(device: torch.device, dtype: Dtype, draws: int, level: float) -> Settings:
    return Settings(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=dtype,
        threads=torch.get_num_threads(),
        draws=draws,
        level=level,
        bins=quality.BINS,
        versions={"torch": str(torch.__version__), "transformers": transformers.__version__},
    )
