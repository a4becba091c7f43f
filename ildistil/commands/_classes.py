"""Which modules a configuration may name: decided by where they are, before anything of them is imported."""

import importlib.metadata
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import jsonargparse

__all__ = ["allow", "dotted"]

# Loaded with the parser, or without a class for a configuration.
_OURS = {"ildistil", "lightning", "torch", "torchmetrics", "transformers"}
_NEVER = {*sys.stdlib_module_names, "jsonargparse", "pip", "setuptools", "pkg_resources"}


def allow(names: Iterable[str], *folders: Path) -> None:
    """Allow the parser to import installed packages, and modules in a folder where they are named; nothing else.

    Args:
        names: dotted names in a configuration.
        folders: that of the configuration, and the working folder.
    """
    wanted = {name.split(".")[0] for name in names} - _NEVER - _OURS
    allowed = _OURS | {name.split(".")[0] for name in sys.modules}
    if wanted - allowed:
        allowed |= _installed(wanted)
    for folder in folders:
        beside = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        if wanted & beside - allowed:
            if str(folder) not in sys.path:
                sys.path.append(str(folder))
            allowed |= {name for name in beside if _lies_in(name, folder)}
    allowed |= {name for name in wanted - allowed if not _places(name)}  # the error is that there is none
    identifiers = sorted(name for name in allowed - _NEVER if name.isidentifier())
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=identifiers)


def dotted(value: Any) -> Iterator[str]:
    """Yield the dotted names in a value of a configuration.

    >>> list(dotted({"class_path": "mine.Own", "init_args": {"path": "./data", "terms": ["a.B"]}}))
    ['mine.Own', 'a.B']
    """
    if isinstance(value, str):
        if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", value):
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from dotted(each)
    elif isinstance(value, list):
        for each in value:
            yield from dotted(each)


def _installed(wanted: set[str]) -> set[str]:
    """Return the names of installed packages, and those of ``wanted`` that are installed from a folder in place."""
    found = set(importlib.metadata.packages_distributions())
    for distribution in importlib.metadata.distributions():
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
        if source.get("dir_info", {}).get("editable"):
            folder = Path(unquote(urlparse(source["url"]).path))
            found |= {name for name in wanted if _lies_in(name, folder)}
    return found


def _lies_in(name: str, folder: Path) -> bool:
    """Return whether an import of a module would read a folder, and no other."""
    places = _places(name)
    return bool(places) and all(place.is_relative_to(folder.resolve()) for place in places)


def _places(name: str) -> list[Path]:
    """Return the files or folders that an import of a module would read."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return []
    found = [] if spec is None else [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return [Path(place).resolve() for place in found]
