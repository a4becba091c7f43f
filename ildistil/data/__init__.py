"""Data modules that a YAML file can name: GLUE, and the user's own texts; and what is asked of any other."""

from ildistil.data.glue import Glue
from ildistil.data.labelled import LabelledText
from ildistil.data.loading import LoadingOptions, TokenizedDataModule
from ildistil.data.sampler import LengthGroupedSampler, TokenBudgetSampler
from ildistil.data.task import Task, every_row, label_config, set_names, task_of
from ildistil.data.text import TextData

__all__ = [
    "Glue",
    "LabelledText",
    "LengthGroupedSampler",
    "LoadingOptions",
    "Task",
    "TextData",
    "TokenBudgetSampler",
    "TokenizedDataModule",
    "every_row",
    "label_config",
    "set_names",
    "task_of",
]
