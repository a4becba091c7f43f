"""Compare exported students with their teacher, or measure a teacher alone: quality, differences, cost."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import transformers
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

import ildistil.data  # so that Glue and TextData can be named  # noqa: F401
from ildistil.commands._config import ConfigFile
from ildistil.commands._parser import Parser, own_errors
from ildistil.commands._run import lightning_errors
from ildistil.students.sources import Dtype
from ildistil.study.comparison import as_text, compare_models, document, write_json, write_markdown

__all__ = ["main"]

_USAGE = "ildistil compare TEACHER [STUDENT ...] [--config FILE] [--data Glue --data.task TASK] [options]"
_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "set": (str | None, None, "Name of the set, such as test; by default the first validation set."),
    "flips": (NonNegativeInt, 3, "Rows to show that student and teacher differ on, of each kind."),
    "seconds": (NonNegativeFloat, 10.0, "Seconds to time the models for, with each batch size; 0 takes no times."),
    "threads": (PositiveInt | None, None, "Threads of torch on a CPU; by default all cores."),
    "accelerator": (str, "auto", "Where the models run, in Lightning's words: cpu, gpu, auto."),
    "dtype": (Dtype, "float32", "Precision of the weights: float32, bfloat16 or float16."),
    "json": (str | None, None, "File to write all figures to."),
    "markdown": (str | None, None, "File to write the report to, as a page."),
}


class _DataOfConfig(ConfigFile):
    """The option ``--config``, of which only the data are taken."""

    parts = frozenset({"data"})


def main(command: str, arguments: Sequence[str]) -> None:
    """Compare, print the report, and write it."""
    with lightning_errors(), own_errors():
        parser = Parser(prog=f"ildistil {command}", usage=_USAGE, description=__doc__)
        parser.add_argument("models", nargs="*", type=str, help="Folders or hub names of models, the teacher first.")
        help = "The YAML file of a run, such as its config.yaml, of which the data are taken."
        parser.add_argument("-c", "--config", action=_DataOfConfig, metavar="FILE", help=help)
        for name, (kind, default, help) in _OPTIONS.items():
            parser.add_argument(f"--{name}", type=kind, default=default, metavar=name.upper(), help=help)
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
        config = parser.parse_args(list(arguments))
        data = parser.instantiate_classes(config).data
    transformers.utils.logging.disable_progress_bar()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    options = {name: config[name] for name in ("flips", "seconds", "accelerator", "dtype")}
    with lightning_errors():
        report = compare_models(config.models, data, set_name=config.set, **options)
    written = document(report)
    print(as_text(written))
    if config.json is not None:
        write_json(report, config.json)
    if config.markdown is not None:
        write_markdown(written, config.markdown)
