"""The engine under a Lightning Trainer: the module, optimisation, evaluation, checkpoints, the plan."""

from ildistil.training.distiller import Distiller
from ildistil.training.export import export, load_student, save_student
from ildistil.training.monitor import Throughput, peak_memory
from ildistil.training.plan import describe
from ildistil.training.progress import ResumeCheckpoint

__all__ = [
    "Distiller",
    "ResumeCheckpoint",
    "Throughput",
    "describe",
    "export",
    "load_student",
    "peak_memory",
    "save_student",
]
