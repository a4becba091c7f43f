"""Write the student of a checkpoint as a plain transformers folder."""

from collections.abc import Sequence

from ildistil.commands._parser import call
from ildistil.training.export import export

__all__ = ["main"]


def main(command: str, arguments: Sequence[str]) -> None:
    """Export a student."""
    call(export, command, arguments, "overwrite", "keep_head")
