"""Fine-tune a pretrained model: a teacher on a task, a distilled student on one, or the head of a language model."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ildistil.commands._run import Run
from ildistil.data.task import Task, label_config, task_of
from ildistil.errors import ConfigError
from ildistil.objectives import Objective, TaskLoss
from ildistil.students.heads import freeze_body
from ildistil.students.sources import Head, load
from ildistil.training.distiller import Distiller

__all__ = ["main", "make_finetuner"]


def make_finetuner(
    path: str,
    task: Any = None,
    head: Head | None = None,
    freeze: bool = False,
    config: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    **options: Any,
) -> Distiller:
    """The model, and how it is trained.

    Args:
        path: Name on the hub, or a folder, of the pretrained model.
        task: What the data module declares, see :class:`ildistil.data.Task`.
        head: What is on top: sequence-classification, masked-lm or causal-lm; by default what the data's labels are
            for. Without weights in the checkpoint it starts anew.
        freeze: Train the head alone, and leave the model below it as it is.
        config: Values to change in the model's config, such as a dropout.
        tokenizer: Name or folder of the tokenizer; by default the model's.
        options: Those of :class:`Distiller`.

    Raises:
        ConfigError: The data has no labels, or labels for another head.
        ModelError: The model can't be loaded, or has no head to train.
    """
    task = task_of(task)
    model = load(path, _head(task, head), config=label_config(task) | (config or {}), new_head=True)
    if freeze:
        freeze_body(model)
    return Distiller(model, None, tokenizer=tokenizer or path, stages=(), balance=None, **options)


class _Finetune(Run):
    trains = True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the head to the data's labels."""
        parser.link_arguments("data", "model.task", apply_on="instantiate")

    def objectives(self) -> dict[str, Objective]:
        """Return the task's loss alone."""
        return {"task_loss": TaskLoss()}


def _head(task: Task, head: Head | None) -> Head:
    """Return the head that is to be trained: the one asked for, or the one that the data's labels are for."""
    if task.labelled is False and task.head is None:
        raise ConfigError(
            "The data has no labels to fine-tune on. Name their column, or take a Corpus with labels: masked or next."
        )
    made_for = task.head or (None if task.num_labels is None else "sequence-classification")
    if head is not None and made_for is not None and head != made_for:
        raise ConfigError(f"The head is {head!r}, and the data's labels are for {made_for!r}. Leave out --model.head.")
    return head or made_for or "sequence-classification"


def main(command: str, arguments: Sequence[str]) -> None:
    """Train, and print where the best model is."""
    run = _Finetune(command, make_finetuner, arguments, __doc__)
    run.start(run.trainer.fit)
    run.report_best()
