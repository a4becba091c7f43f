"""Store what a teacher says of the training set, for many runs without it; takes the configuration of 'fit'."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from ildistil.commands._distilling import DistillingRun, open_targets
from ildistil.commands._parser import with_flags
from ildistil.commands._run import lightning_errors
from ildistil.data.task import task_of
from ildistil.data.tokenizing import tokenizer_digest
from ildistil.engine.checks import named_objectives
from ildistil.errors import ConfigError
from ildistil.students.sources import ModelSource, StudentOptions
from ildistil.teachers import StoredTeacher, estimate, precompute
from ildistil.teachers.layout import Dtype
from ildistil.training.distiller import Distiller

__all__ = ["main"]


class _Storing(Distiller):
    """A distiller with its stored teacher at hand."""

    def __init__(self, student: nn.Module, stored: StoredTeacher, **options: Any) -> None:
        super().__init__(student, stored, **options)
        self.stored = stored


def _make(
    teacher: ModelSource,
    student: StudentOptions,
    tokenizer: str | None = None,
    targets: str | None = "targets",
    targets_dtype: Dtype | None = None,
    **options: Any,
) -> _Storing:
    """The teacher, and the student whose objectives decide what is stored.

    Args:
        teacher: Where the frozen model comes from, usually ``pretrained`` with a path.
        student: Where the student comes from: layers of the teacher, a config, or another model's path.
        tokenizer: Name or folder of the tokenizer; by default the teacher's.
        targets: Folder of the targets.
        targets_dtype: Precision of targets in a new folder: float16 (the default), bfloat16 or float32.
        options: Those of :class:`Distiller`; they change nothing here.
    """
    if targets is None:
        raise ConfigError("Name the folder of the targets: --model.targets FOLDER.")
    stored, model = open_targets(teacher, targets, targets_dtype, with_weights=student.copies_weights)
    return _Storing(student.make(model, teacher), stored, tokenizer=tokenizer or teacher.tokenizer, **options)


class _Precompute(DistillingRun):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what `fit` has not."""
        parser.add_argument("--estimate", type=bool, default=False, help="Print how large the targets get, and stop.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Take only the device from the configuration: nothing is trained, and one process stores."""
        config = self.config_init.trainer
        one = config.devices[:1] if isinstance(config.devices, list) else 1
        return L.Trainer(
            accelerator=config.accelerator, devices=one, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    def prepare(self) -> None:
        """Prepare and check the data as a fit does."""
        module, trainer = self.model, self.trainer
        trainer.strategy.connect(module)
        trainer.state.fn = TrainerFn.FITTING
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        self.datamodule.trainer = module.trainer = trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        module.setup("fit")


def main(command: str, arguments: Sequence[str]) -> None:
    """Print what is needed, and store what is missing."""
    run = _Precompute(command, with_flags(arguments, "estimate"), __doc__, _make)
    terms, stored = named_objectives(run.objectives()), run.model.stored
    with lightning_errors():
        run.prepare()
    task = task_of(run.datamodule)
    if task.tokenizer is not None:
        stored.check_tokenizer(tokenizer_digest(task.tokenizer))
    work, device = (stored, terms, run.model.student, task.every_row()), run.trainer.strategy.root_device
    if run.config.estimate:
        print(estimate(*work, device=device))
        return
    try:
        precompute(*work, device=device, report=print)
    except KeyboardInterrupt:
        print(f"Interrupted: {len(stored.store):,} rows are stored. The same command goes on from there.")
        raise SystemExit(130) from None
    folder = stored.store.folder
    print(f"{len(stored.store):,} rows are stored. Add --model.targets {folder} to your ildistil fit command.")
