"""The public surface, listed once: the API page names what these modules export, and nothing else.

``python tests/test_api.py`` writes the page.
"""

import importlib
import inspect
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
PUBLIC = [
    "ildistil", "ildistil.objectives", "ildistil.mappings", "ildistil.schedules", "ildistil.functional",
    "ildistil.kernels", "ildistil.capture", "ildistil.distributed", "ildistil.students", "ildistil.teachers",
    "ildistil.data", "ildistil.presets", "ildistil.training", "ildistil.errors",
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


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
