"""The engine: one teacher run, one student run, all objectives. It needs no Trainer."""

from ildistil.engine.balance import Balance
from ildistil.engine.distillation import Distillation
from ildistil.engine.dry_run import DryRun, TermCheck, all_finite, look_finite
from ildistil.engine.synthetic import synthetic_batch
from ildistil.engine.terms import Terms

__all__ = ["Balance", "Distillation", "DryRun", "TermCheck", "Terms", "all_finite", "look_finite", "synthetic_batch"]
