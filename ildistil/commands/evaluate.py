"""Measure a student on the validation set (validate) or the test set (test)."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from ildistil.commands._distilling import DistillingRun
from ildistil.commands._folder import saved_config
from ildistil.commands._run import Run
from ildistil.commands.finetune import make_finetuner
from ildistil.errors import ConfigError
from ildistil.objectives import Objective, TaskLoss

__all__ = ["MeasuringRun", "main"]


class MeasuringRun(DistillingRun):
    """A run of a trained student alone, or of a fine-tuned model where its folder is named."""

    def __init__(self, command: str, arguments: Sequence[str], description: str | None) -> None:
        self._finetuned = "path" in (saved_config(arguments).get("model") or {})
        if self._finetuned:
            Run.__init__(self, command, make_finetuner, arguments, description)
        else:
            super().__init__(command, arguments, description)

    def add_objectives(self, parser: LightningArgumentParser) -> None:
        """Add the objectives by name, if there are any."""
        if not self._finetuned:
            super().add_objectives(parser)

    def objectives(self) -> dict[str, Objective]:
        """Return those of the training."""
        return {"task_loss": TaskLoss()} if self._finetuned else super().objectives()

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what allows an untrained one."""
        if self._finetuned:
            parser.link_arguments("data", "model.task", apply_on="instantiate")
        parser.add_argument(
            "--untrained", type=bool, default=False, help="Run the student as it starts, before any training."
        )

    def before_instantiate_classes(self) -> None:
        """Refuse to take the student as it starts for a trained one."""
        super().before_instantiate_classes()
        if (self.config.ckpt_path is None) == (not self.config.untrained):
            raise ConfigError(
                f"'{self.command}' runs a trained student: name its run (--run FOLDER) or its checkpoint (--ckpt_path "
                "FILE); or add --untrained=true alone, for the student as it starts."
            )


def main(command: str, arguments: Sequence[str]) -> None:
    """Measure the student of a checkpoint, or as it starts."""
    run = MeasuringRun(command, arguments, __doc__)
    run.start(run.trainer.validate if command == "validate" else run.trainer.test)
