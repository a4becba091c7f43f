"""Data modules that a YAML file can name: GLUE, your own texts, a corpus; and what is asked of any other."""

from ildistil.data.corpus import Corpus
from ildistil.data.glue import Glue
from ildistil.data.labelled import LabelledText
from ildistil.data.loading import TokenizedDataModule
from ildistil.data.options import LoadingOptions
from ildistil.data.sampler import LengthGroupedSampler, TokenBudgetSampler
from ildistil.data.serving import RowsDataModule
from ildistil.data.task import Task, every_row, label_config, set_names, task_of
from ildistil.data.text import TextData

__all__ = [
    "Corpus",
    "Glue",
    "LabelledText",
    "LengthGroupedSampler",
    "LoadingOptions",
    "RowsDataModule",
    "Task",
    "TextData",
    "TokenBudgetSampler",
    "TokenizedDataModule",
    "every_row",
    "label_config",
    "set_names",
    "task_of",
]
