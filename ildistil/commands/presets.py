"""List the named configurations for 'fit --preset NAME'."""

from collections.abc import Sequence

from ildistil import presets
from ildistil.commands._parser import call
from ildistil.tables import table

__all__ = ["list_presets", "main"]


def list_presets() -> None:
    """List the named configurations for 'fit --preset NAME'."""
    print(table(("preset", "what it is"), [(name, presets.title(name)) for name in presets.names()]))
    print("\nUse one: ildistil fit --preset NAME --config run.yaml, a file without objectives of its own.")
    print("See one: add --print_config.")


def main(command: str, arguments: Sequence[str]) -> None:
    """List the presets."""
    call(list_presets, command, arguments)
