"""Measure a student on the validation set (validate) or the test set (test)."""

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from ildistil.commands._distilling import DistillingRun
from ildistil.errors import ConfigError

__all__ = ["MeasuringRun", "main"]


class MeasuringRun(DistillingRun):
    """A run of a trained student alone."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what allows an untrained one."""
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
