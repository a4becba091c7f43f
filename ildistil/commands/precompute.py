"""Store what a teacher says of the training set, for many runs without it; takes the configuration of 'fit'."""

from collections.abc import Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn

from ildistil.commands._distilling import DistillingRun
from ildistil.commands._parser import with_flags
from ildistil.commands._run import lightning_errors
from ildistil.data.task import task_of
from ildistil.data.tokenizing import tokenizer_digest
from ildistil.engine.checks import named_objectives
from ildistil.errors import ConfigError
from ildistil.teachers import StoredTeacher, estimate, precompute
from ildistil.training.targets import rows_to_store

__all__ = ["main"]


class _Precompute(DistillingRun):
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
    run = _Precompute(command, with_flags(arguments, "estimate"), __doc__)
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
