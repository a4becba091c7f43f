"""Store what a teacher says of the training set, for many runs without it; takes the configuration of 'fit'."""

from collections.abc import Sequence
from typing import cast

from lightning.pytorch.cli import LightningArgumentParser

from ildistil.commands._distilling import PreparingRun
from ildistil.commands._parser import with_flags
from ildistil.commands._run import lightning_errors
from ildistil.data.task import task_of
from ildistil.data.tokenizing import tokenizer_digest
from ildistil.engine.checks import named_objectives
from ildistil.errors import ConfigError
from ildistil.teachers import StoredTeacher, estimate, precompute
from ildistil.training.targets import rows_to_store

__all__ = ["Precompute", "main"]


class Precompute(PreparingRun):
    """A run that stores targets."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what 'fit' has not."""
        parser.set_defaults({"model.targets": "targets"})
        parser.add_argument("--estimate", type=bool, default=False, help="Print how large the targets get, and stop.")

    def before_instantiate_classes(self) -> None:
        """Make sure that the teacher will be a stored one."""
        super().before_instantiate_classes()
        if self.config.model.targets is None:
            raise ConfigError("Name the folder of the targets: --model.targets FOLDER.")

    @property
    def stored(self) -> StoredTeacher:
        """The teacher, a stored one as there is a folder of targets."""
        return cast(StoredTeacher, self.model.teacher)


def main(command: str, arguments: Sequence[str]) -> None:
    """Print what is needed, and store what is missing."""
    run = Precompute(command, with_flags(arguments, "estimate"), __doc__)
    terms, stored, task = named_objectives(run.objectives()), run.stored, task_of(run.datamodule)
    with lightning_errors():
        run.prepare()
    if task.tokenizer is not None:
        stored.check_tokenizer(tokenizer_digest(task.tokenizer))
    rows = rows_to_store(
        run.datamodule, list(terms.values()), run.model.student, run.config.trainer.limit_val_batches != 0
    )
    work, device = (stored, terms, run.model.student, rows), run.trainer.strategy.root_device
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
