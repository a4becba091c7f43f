"""The rooms of the library, and the one direction of imports."""

import ast
from pathlib import Path

import pytest

import ildistil

ROOT = Path(ildistil.__file__).parent
# What each room may import of the others; __init__ sees all.
MAY_IMPORT = {
    "functional": set(),
    "ranks": set(),
    "kernels": {"functional"},
    "schedules": set(),
    "stages": set(),
    "balance": {"ranks"},
    "capture": {"functional"},
    "metrics": set(),
    "data": {"metrics"},
    "mappings": {"capture"},
    "narrow": {"capture"},
    "initialize": {"capture", "narrow"},
    "synthetic": {"capture"},
    "models": {"initialize", "narrow"},
    "export": set(),
    "monitor": set(),
    "objectives": {"functional", "kernels", "capture", "mappings", "ranks", "schedules"},
    "distillation": {"balance", "capture", "objectives", "ranks", "schedules", "synthetic", "targets"},
    "targets": {"capture", "data", "functional", "objectives"},
    "presets": {"objectives", "stages"},
    "plan": {"capture", "distillation", "schedules", "stages", "targets"},
    "distiller": {
        "balance",
        "capture",
        "objectives",
        "metrics",
        "distillation",
        "plan",
        "ranks",
        "schedules",
        "stages",
        "targets",
    },
}
LAST = {"cli", "quickstart"}  # they may import every room


def rooms() -> list[str]:
    return sorted(p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists())


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "ildistil":
                names |= {alias.name for alias in node.names}
            elif node.module.startswith("ildistil."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ildistil.")}
    return names & set(rooms())


def test_every_room_is_listed() -> None:
    assert set(rooms()) - {"__init__", "py"} == set(MAY_IMPORT) | LAST


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else list((ROOT / room).glob("*.py"))
    for path in files:
        assert imported(path) - {room} <= MAY_IMPORT[room], path.name


def test_there_is_no_cycle() -> None:
    done: set[str] = set()
    while done != set(MAY_IMPORT):
        free = {room for room, needs in MAY_IMPORT.items() if needs <= done} - done
        assert free, f"a cycle among {set(MAY_IMPORT) - done}"
        done |= free
