"""The rooms of the library, and the one direction of imports: a room imports only rooms named before it."""

import ast
import inspect
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

import ildistil

ROOT = Path(ildistil.__file__).parent
# From the ground up, as docs/architecture.md draws them.
ROOMS = [
    "errors", "storage", "shards", "distributed", "schedules", "stages", "mappings", "tables", "metrics", "functional",
    "attention", "kernels", "capture", "students", "objectives", "presets", "data", "teachers", "engine", "training",
    "study", "commands", "cli",
]  # fmt: skip


def rooms() -> set[str]:
    return {p.stem for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - {"__init__"}


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
    return names & rooms()


def test_every_room_is_listed() -> None:
    assert rooms() == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room: str) -> None:
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else list((ROOT / room).rglob("*.py"))
    for path in files:
        assert imported(path) <= set(ROOMS[: ROOMS.index(room) + 1]), path.name


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_no_room_asks_which_kind_of_teacher_it_has() -> None:
    outside = [path for path in sources() if "teachers" not in path.parts]
    asking = [p.name for p in outside if "isinstance(" in p.read_text() and "StoredTeacher)" in p.read_text()]
    assert asking == []


def test_objectives_are_few_steps_from_lightnings_callback() -> None:
    def steps(kind: type) -> int:
        return kind.__mro__.index(Callback)

    kinds = [kind for kind in vars(ildistil.objectives).values() if isinstance(kind, type)]
    assert max(steps(kind) for kind in kinds if issubclass(kind, Callback)) <= 5


def test_files_are_short() -> None:
    assert [path.name for path in sources() if len(path.read_text().splitlines()) > 400] == []


def test_the_two_modules_are_short() -> None:
    for kind, limit in ((ildistil.Distiller, 300), (ildistil.Distillation, 350)):
        assert len(inspect.getsource(kind).splitlines()) <= limit
