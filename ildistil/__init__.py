"""Intermediate-layer distillation of Transformers for PyTorch Lightning."""

from ildistil import functional, mappings, objectives
from ildistil.distillation import Distillation
from ildistil.distiller import Distiller
from ildistil.initialize import init_student

__version__ = "0.1.0"
__all__ = ["Distillation", "Distiller", "functional", "init_student", "mappings", "objectives"]
