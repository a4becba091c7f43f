"""Fine-tune a pretrained model on a task: the teacher."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from ildistil.commands._run import Run
from ildistil.data.task import label_config, task_of
from ildistil.objectives import Objective, TaskLoss
from ildistil.students.sources import load
from ildistil.training.distiller import Distiller

__all__ = ["main", "make_finetuner"]


def make_finetuner(
    path: str,
    labels: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    **options: Any,
) -> Distiller:
    """The model, and how it is trained.

    Args:
        path: Name on the hub, or a folder, of the pretrained model.
        labels: What the data module declares of its labels.
        config: Values to change in the model's config, such as a dropout.
        tokenizer: Name or folder of the tokenizer; by default the model's.
        options: Those of :class:`Distiller`.

    Raises:
        ModelError: The model can't be loaded.
    """
    model = load(path, config=(labels or {}) | (config or {}), new_head=True)
    return Distiller(model, None, tokenizer=tokenizer or path, stages=(), balance=None, **options)


class _Finetune(Run):
    trains = True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the labels of the head to the data."""
        parser.link_arguments("data", "model.labels", compute_fn=_labels, apply_on="instantiate")

    def objectives(self) -> dict[str, Objective]:
        """Return the task's loss alone."""
        return {"task_loss": TaskLoss()}


def _labels(data: object) -> dict[str, Any]:
    return label_config(task_of(data))


def main(command: str, arguments: Sequence[str]) -> None:
    """Train, and print where the best model is."""
    run = _Finetune(command, make_finetuner, arguments, __doc__)
    run.start(run.trainer.fit)
    run.report_best()
