"""Data modules that a YAML file can name: GLUE, and the user's own texts."""

from ildistil.data.glue import Glue
from ildistil.data.module import TextDataModule
from ildistil.data.sampler import LengthGroupedSampler, TokenBudgetSampler
from ildistil.data.text import TextData

__all__ = ["Glue", "LengthGroupedSampler", "TextData", "TextDataModule", "TokenBudgetSampler"]
