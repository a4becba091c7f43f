"""Intermediate-layer distillation of Transformers for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ildistil import functional, mappings, objectives, presets, schedules
    from ildistil.engine import Balance, Distillation
    from ildistil.stages import Stage, Step
    from ildistil.students import init_student
    from ildistil.training import Distiller, ResumeCheckpoint

__version__ = "0.1.0"
__all__ = [
    "Balance",
    "Distillation",
    "Distiller",
    "ResumeCheckpoint",
    "Stage",
    "Step",
    "functional",
    "init_student",
    "mappings",
    "objectives",
    "presets",
    "schedules",
]

_ROOMS = {"Balance": "engine", "Distillation": "engine", "Distiller": "training", "init_student": "students"}
_ROOMS |= {"ResumeCheckpoint": "training", "Stage": "stages", "Step": "stages"}


def __getattr__(name: str) -> Any:
    # Imported when it is asked for, so that the help of the command needs no torch.
    if name not in __all__:
        raise AttributeError(f"module 'ildistil' has no attribute {name!r}")
    room = import_module(f"ildistil.{_ROOMS.get(name, name)}")
    return getattr(room, name) if name in _ROOMS else room


def __dir__() -> list[str]:
    return __all__
