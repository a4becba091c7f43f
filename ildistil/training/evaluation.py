"""Measure a student on the sets of a data module: what it predicts, or the terms that it is trained by."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from ildistil.capture import ModelInfo, unwrapped
from ildistil.capture.inputs import token_mask, without_labels
from ildistil.capture.run import model_errors
from ildistil.capture.trial import Trial, predicts_next_token, undisturbed
from ildistil.data.task import Task, set_names
from ildistil.engine import Distillation, Terms
from ildistil.errors import CaptureError, ConfigError, DataError, ModelError, NotFiniteError
from ildistil.metrics import IGNORED, default_metrics
from ildistil.objectives import Objective
from ildistil.stages import Step
from ildistil.training.measures import Predictions, TermMeans

__all__ = ["Evaluation", "batch_size", "check_predicted", "measures_terms"]


def measures_terms(task: Task, objectives: Iterable[Objective], student: ModelInfo) -> bool:
    """Return whether sets are measured by the terms of the training: without labels, or a head that a term trains.

    Args:
        task: what the data module says of itself.
        objectives: the terms.
        student: what is known of it.
    """
    used = [objective for objective in objectives if objective.weight != 0]
    return (
        task.labelled is False
        or student.is_body
        or (task.labelled is True and bool(used) and not any(objective.may_train_head for objective in used))
    )


class Measures(nn.Module):
    """What is measured on one set: predictions, terms, or both."""

    def __init__(self, predictions: Predictions | None, terms: TermMeans | None) -> None:
        super().__init__()
        self.predictions, self.terms = predictions, terms

    def suits(self, terms: Terms | None) -> bool:
        """Return whether it is of these terms: another stage has others."""
        return (None if self.terms is None else self.terms.terms.keys()) == (
            None if terms is None else terms.values.keys()
        )

    def logged(self) -> dict[str, Metric]:
        """Return what is logged of the set, by name; the loss is that of the terms where these are measured."""
        terms = [] if self.terms is None else list(self.terms.logged())
        found = [] if self.predictions is None else list(self.predictions.logged())
        pairs = terms + [pair for pair in found if not terms or pair[0] != "loss"]
        if len(named := dict(pairs)) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ConfigError(f"An objective has the name of a metric, {twice!r}. Name it otherwise.")
        return named


class Evaluation:
    """The names of the sets that a student is measured on, and how.

    Args:
        task: what the data module says of itself.
        student: its head decides what is measured where the task says nothing of its labels.
        by_terms: whether the terms are measured, also where there are labels.
    """

    def __init__(self, task: Task, student: ModelInfo, by_terms: bool = False) -> None:
        self._task, self._student, self.by_terms = task, student, by_terms
        self._validated: set[str] = set()
        self._constant: set[str] = set()
        self._next_token: bool | None = None

    @property
    def may_measure_terms(self) -> bool:
        """Whether a set may be measured by the terms; where the data don't say, its batches do."""
        return self.by_terms or self._task.labelled is None

    def name(self, stage: Literal["val", "test"], number: int, count: int) -> str:
        """Return the name of one of ``count`` sets in logs.

        Raises:
            DataError: the data module names more or fewer sets than it has.
        """
        names = self._task.validation_names if stage == "val" else self._task.test_names
        name = set_names(names, count)[number]
        if stage == "val":
            self._validated.add(name)
        return name

    def measure(
        self, sets: nn.ModuleDict, name: str, batch: Mapping[str, Any], distillation: Distillation, step: Step
    ) -> tuple[Measures, bool]:
        """Measure a batch of a set.

        Args:
            sets: what is measured, by the names of the sets; gets what it lacks.
            name: of the set.
            batch: with labels, or without.
            distillation: both models, and the terms.
            step: decides which terms are measured, with which weights.

        Returns:
            What is measured of the set, and whether it is new.

        Raises:
            DataError: there is nothing to measure.
        """
        labels, labelled = batch.get("labels"), self._task.labelled
        if labels is None and labelled:
            raise DataError(
                f"The {name} set has no labels, so there is nothing to measure. Use 'predict' for unlabelled rows."
            )
        by_terms = self.by_terms or labels is None
        if by_terms and not distillation.objectives:
            raise DataError(
                f"The {name} set has no labels of a task, and there are no objectives whose terms could be measured. "
                "Give the Trainer the objectives as callbacks, or the rows labels."
            )
        terms, student = distillation.measure(batch, step) if by_terms else (None, None)
        predicts = labels is not None and labelled is not False and not self._student.is_body
        measures: Any = sets[name] if name in sets else None  # noqa: SIM401 (a ModuleDict has no get)
        is_new = measures is None or not measures.suits(terms)
        if is_new:
            predictions = self._predictions(labels) if predicts and labels is not None else None
            means = None if terms is None else TermMeans(terms.weights)
            sets[name] = measures = Measures(predictions, means).to(next(distillation.student.parameters()).device)
        if measures.terms is not None and terms is not None and student is not None:
            measures.terms.update(terms, student, labels)
        if measures.predictions is not None and labels is not None:
            self._predict(measures.predictions, batch, labels, distillation)
        return measures, is_new

    def _predict(
        self, measures: Predictions, batch: Mapping[str, Any], labels: Tensor, distillation: Distillation
    ) -> None:
        """Run the student alone, and compare what it predicts with the labels."""
        inputs = distillation.student_inputs(batch)
        with model_errors("student", inputs):
            output = distillation.student(**inputs)
        weight = self.weight(unwrapped(distillation.student), inputs, labels, output.logits)
        measures.update(output, self.predictions(output.logits, labels), labels, weight)

    def _predictions(self, labels: Tensor) -> Predictions:
        """Return new measures of predictions for a set with such labels."""
        made, classes = self._task.metrics(), self._student.labels or 0
        multi_label = self.is_multi_label(labels)
        if made is None and self._task.num_labels is None:
            made = default_metrics(self._student.labels, self._is_regression, multi_label)
        return Predictions(made, classes if classes > 1 and labels.ndim == 1 and not labels.is_floating_point() else 0)

    @property
    def _is_regression(self) -> bool:
        return self._task.regression or self._student.labels == 1 or self._student.problem_type == "regression"

    def is_multi_label(self, labels: Tensor | None = None) -> bool:
        """Return whether a row may have several labels; numbers for each class say so too, as in transformers."""
        if self._task.multi_label or self._student.problem_type == "multi_label_classification":
            return True
        several = labels is not None and labels.is_floating_point() and labels.ndim == 2 and labels.shape[1] > 1
        return several and not self._is_regression

    def predictions(self, logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return a class index for each row, 0 or 1 for each of several labels, or a number in a regression.

        A label is predicted where its probability is above 0.5.
        """
        if self.is_multi_label(labels):
            return (logits > 0).long()
        return logits.squeeze(-1).float() if logits.shape[-1] == 1 else logits.argmax(-1)

    def weight(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, logits: Tensor) -> Tensor:
        """Return how many things the model's loss of a batch is the mean of.

        These are its rows with a label, or the target tokens of a language model.
        """
        if labels.is_floating_point():
            return torch.tensor(len(labels), device=labels.device)
        if labels.ndim == 2 and logits.shape[:2] == labels.shape and self._predicts_next(model, inputs, logits):
            labels = labels[:, 1:]
        return torch.ne(labels, IGNORED).sum()

    def _predicts_next(self, model: nn.Module, inputs: dict[str, Any], logits: Tensor) -> bool:
        """Return whether logits predict the next token, which the model's loss then has no first label for."""
        real = token_mask(inputs)
        real = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device) if real is None else real
        if self._next_token is None and real.shape == logits.shape[:2]:
            found: bool | str | None = "not known"
            with suppress(CaptureError), undisturbed(model):
                trial = Trial.of(without_labels(model, inputs), real, repeats=False)
                found = predicts_next_token(model, trial, logits.shape[-1])
            self._next_token = None if found is None else found is True
        return self._next_token is True

    def look(self, measures: nn.ModuleDict, quiet: bool = False) -> None:
        """Look at the predictions on all sets, when they are through.

        A student that predicts one class for all rows of a set is pointed out once.

        Args:
            measures: by the names of the sets.
            quiet: whether these are only some rows.

        Raises:
            NotFiniteError: logits are NaN.
        """
        for name, measured in measures.items():
            assert isinstance(measured, Measures)
            each = measured.predictions
            if each is None or not each.seen.update_called:
                continue
            predicted, true, spoilt = each.seen.compute()
            each.seen.reset()
            _refuse_nan(spoilt, f"rows of {name}")
            constant = sum(map(bool, predicted)) == 1 and sum(map(bool, true)) > 1
            if constant and not quiet and name not in self._constant:
                self._constant.add(name)
                rank_zero_warn(
                    f"The student predicts one class for all {sum(predicted):,} rows of {name}: "
                    f"{self._class_name(predicted.index(max(predicted)))}. Their labels are of {sum(map(bool, true))} "
                    "classes. Metrics can look good all the same, where one class is frequent: look at macro_f1 or "
                    "matthews. Early in training this may pass; else try another learning rate."
                )

    def _class_name(self, number: int) -> str:
        names = self._task.label_names or self._student.label_names
        return f"{names[number]!r} (number {number})" if number < len(names) else f"number {number}"

    def measured(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Select what was measured on validation sets."""
        return {key: float(value) for key, value in metrics.items() if key.split("/")[0] in self._validated}


def check_predicted(output: Any) -> Tensor:
    """Return the logits of a batch, and refuse those that predict nothing.

    Raises:
        ModelError: there are none.
        NotFiniteError: they are NaN.
    """
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        raise ModelError(
            f"The student has no head that predicts: its output ({type(output).__name__}) has no logits. Export it, "
            "and fine-tune it on a task first (ildistil finetune)."
        )
    _refuse_nan(int(logits.isnan().flatten(1).any(1).sum()), "rows of a batch")
    return logits


def _refuse_nan(count: int, rows: str) -> None:
    if count:
        raise NotFiniteError(
            f"The student's logits are NaN for {count} {rows}: what it predicts there means nothing. Look for NaN in "
            "its weights, or for an unfit precision."
        )


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch."""
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
