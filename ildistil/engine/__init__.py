"""The engine: one teacher run, one student run, all objectives. It needs no Trainer."""

from ildistil.engine.balance import Balance
from ildistil.engine.distillation import Distillation, DryRun, TermCheck, Terms
from ildistil.engine.synthetic import synthetic_batch

__all__ = ["Balance", "Distillation", "DryRun", "TermCheck", "Terms", "synthetic_batch"]
