"""Intermediate-layer distillation of Transformers for PyTorch Lightning."""

from ildistil import functional, mappings, objectives, presets, schedules
from ildistil.balance import Balance
from ildistil.distillation import Distillation
from ildistil.distiller import Distiller
from ildistil.initialize import init_student
from ildistil.stages import Stage

__version__ = "0.1.0"
__all__ = [
    "Balance",
    "Distillation",
    "Distiller",
    "Stage",
    "functional",
    "init_student",
    "mappings",
    "objectives",
    "presets",
    "schedules",
]
