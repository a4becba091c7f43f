"""The public surface, listed once: the API page names what these modules export, and nothing else.

``python tests/test_api.py`` writes the page.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import jsonargparse
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
PUBLIC = [
    "ildistil", "ildistil.objectives", "ildistil.mappings", "ildistil.schedules", "ildistil.functional",
    "ildistil.kernels", "ildistil.capture", "ildistil.distributed", "ildistil.students", "ildistil.teachers",
    "ildistil.data", "ildistil.presets", "ildistil.training", "ildistil.study.statistics",
    "ildistil.study.comparison", "ildistil.errors",
]  # fmt: skip


def exported(name: str) -> dict[str, object]:
    module = importlib.import_module(name)
    members = {member: getattr(module, member) for member in module.__all__}
    return {member: value for member, value in members.items() if not isinstance(value, ModuleType)}


def page() -> str:
    parts = ["# API", "What these modules export is public. Everything else may change without notice."]
    for name in PUBLIC:
        doc = inspect.getdoc(importlib.import_module(name)) or ""
        parts += [f"## `{name}`", doc.splitlines()[0]]
        parts += [f"::: {name}.{member}" for member in exported(name)]
    return "\n\n".join(parts) + "\n"


def test_the_page_lists_what_is_exported() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python tests/test_api.py"


def test_what_is_public_has_a_docstring() -> None:
    bare = [
        f"{name}.{member}"
        for name in PUBLIC
        for member, value in exported(name).items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and not inspect.getdoc(value)
    ]
    assert bare == []


@pytest.mark.parametrize("name", ["ildistil.objectives", "ildistil.mappings", "ildistil.schedules"])
def test_the_help_of_a_class_describes_every_option(name: str) -> None:
    kinds = [kind for kind in exported(name).values() if inspect.isclass(kind) and not inspect.isabstract(kind)]
    for kind in kinds:
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(kind)
        assert [option.dest for option in parser._actions if not option.help] == [], kind


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
