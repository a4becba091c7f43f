"""Measure a student on the validation set (validate) or the test set (test)."""

from collections.abc import Sequence

from ildistil.commands._distilling import DistillingRun

__all__ = ["main"]


def main(command: str, arguments: Sequence[str]) -> None:
    """Measure the student of a checkpoint, or as it starts."""
    run = DistillingRun(command, arguments, __doc__)
    run.start(run.trainer.validate if command == "validate" else run.trainer.test)
