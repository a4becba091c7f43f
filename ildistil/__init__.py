"""Intermediate-layer distillation of Transformers for PyTorch Lightning."""

from ildistil import functional, mappings, objectives, presets, schedules
from ildistil.engine import Balance, Distillation
from ildistil.stages import Stage, Step
from ildistil.students import init_student
from ildistil.training import Distiller

__version__ = "0.1.0"
__all__ = [
    "Balance",
    "Distillation",
    "Distiller",
    "Stage",
    "Step",
    "functional",
    "init_student",
    "mappings",
    "objectives",
    "presets",
    "schedules",
]
