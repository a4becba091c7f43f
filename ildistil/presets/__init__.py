"""Named configurations from the literature: plain YAML files, which ``ildistil fit --preset NAME`` reads first."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from ildistil.errors import ConfigError
from ildistil.objectives import Objective
from ildistil.stages import Stage

__all__ = ["file", "names", "objectives", "stages", "title"]

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all presets.

    >>> names()[:3]
    ['distilbert', 'minilm', 'minilmv2']
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def file(name: str) -> Path:
    """Return the file of a preset.

    Raises:
        ConfigError: There is no such preset.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(names())}."
        raise ConfigError(f"There is no preset {name!r}. {hint}")
    return _FOLDER / f"{name}.yaml"


def title(name: str) -> str:
    """Return a line that describes a preset.

    >>> title("minilm")
    'MiniLM: attention and value relations of the last layer'
    """
    return file(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def objectives(name: str) -> dict[str, Objective]:
    """Make the objectives of a preset, new ones at each call.

    >>> [str(term.mapping) for term in objectives("minilm").values()]
    ['Last(count=1)', 'Last(count=1)']
    """
    made: dict[str, Objective] = _made(name).objectives
    for key, objective in made.items():
        objective.name = key
    return made


def stages(name: str) -> list[Stage]:
    """Return the stages of a preset; empty where the training has one only.

    >>> [stage.epochs for stage in stages("tinybert")]
    [20, 3]
    """
    found: list[Stage] = _made(name).stages
    return found


def _made(name: str) -> Any:
    config = yaml.safe_load(file(name).read_text(encoding="utf-8"))
    chosen = {"objectives": config["objectives"], "stages": config.get("model", {}).get("stages", [])}
    return _parser().instantiate_classes(_parser().parse_object(chosen))


@cache
def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--objectives", type=dict[str, Objective])
    parser.add_argument("--stages", type=list[Stage])
    return parser
