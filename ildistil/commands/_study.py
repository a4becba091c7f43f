"""How a study reads and checks its configurations: by the parsers, models and data of the commands that it runs."""

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers import AutoConfig, PreTrainedModel

from ildistil.capture import ModelInfo
from ildistil.commands._distilling import DistillingRun, PreparingRun
from ildistil.commands._folder import whole_config
from ildistil.commands._run import Run, lightning_errors
from ildistil.commands.finetune import FinetuneRun, make_finetuner
from ildistil.commands.fit import check_models
from ildistil.commands.precompute import Precompute
from ildistil.data.task import Task, task_of
from ildistil.engine.checks import named_objectives
from ildistil.stages import check_names
from ildistil.students.sources import ModelSource
from ildistil.study.grid import Config
from ildistil.study.jobs import Command, Facts
from ildistil.teachers import estimate
from ildistil.training.evaluation import measures_terms
from ildistil.training.targets import rows_to_store

__all__ = ["Configurations", "ToBeMade"]

# Before everything else: a study's runs have a log, not a terminal.
_FIRST: Config = {"trainer": {"enable_progress_bar": False}}


@dataclass(frozen=True)
class ToBeMade(ModelSource):
    """Stands for a model that a study is still to make: one of its config, with random weights.

    Args:
        folder: that of the config.
        tokenizer_path: name or folder of the tokenizer.
    """

    folder: str
    tokenizer_path: str

    def load(self) -> PreTrainedModel:
        """Return the model."""
        config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        model: PreTrainedModel = getattr(transformers, config.architectures[0])(config)
        return model

    @property
    def tokenizer(self) -> str:
        """The tokenizer of what it is made from."""
        return self.tokenizer_path


class _Parsed(DistillingRun):
    def instantiate_classes(self) -> None:
        """Leave it at the configuration."""


class _ParsedFinetune(FinetuneRun):
    trains = False

    def instantiate_classes(self) -> None:
        """Leave it at the configuration."""


class _PreparingFinetune(PreparingRun, FinetuneRun):  # the trainer of the one, the model of the other
    trains = False
    add_objectives = Run.add_objectives
    objectives = FinetuneRun.objectives

    def __init__(self, arguments: Sequence[str]) -> None:
        Run.__init__(self, "finetune", make_finetuner, arguments, None)


class Configurations:
    """Reads and looks at the configurations of a study; see `ildistil.study.jobs.Resolver`."""

    def __init__(self) -> None:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self._made = tempfile.TemporaryDirectory()
        self._like: dict[str, str] = {}

    def configuration(self, command: Command, parts: Sequence[Config]) -> Config:
        """Return the whole configuration that partial ones make."""
        named = [part["preset"] for part in parts if "preset" in part]
        plain = [{key: value for key, value in part.items() if key != "preset"} for part in parts]
        words = [f"--preset={name}" for name in named] + [_word(part) for part in (_FIRST, *plain) if part]
        run: Run = (
            _ParsedFinetune("finetune", make_finetuner, words, None)
            if command == "finetune"
            else _Parsed("fit", words, None)
        )
        found: Config = yaml.safe_load(whole_config(run.parser, run.config))
        return found

    def facts(self, command: Command, config: Config, later: Mapping[str, Config]) -> Facts:
        """Look at models, objectives and data of a configuration."""
        if command == "finetune":
            path = _base(config["model"]["path"], later)
            run: Run = _PreparingFinetune([_word(config | {"model": config["model"] | {"path": path}})])
        else:
            run = PreparingRun("fit", [_word(self._with_teacher(config, later))], None)
            objectives = named_objectives(run.objectives())
            if run.model.stages:
                check_names(run.model.stages, objectives)
            check_models(objectives.values(), run.model)
        with lightning_errors():
            run.prepare()  # type: ignore[attr-defined]
        if command == "finetune":
            self._remember(config, run)
        return _facts(task_of(run.datamodule), run)

    def target_bytes(self, config: Config, later: Mapping[str, Config]) -> int:
        """Return how many bytes a configuration of ``precompute`` is to write; none where there are targets already."""
        if Path(config["model"]["targets"]).exists():
            return 0
        with tempfile.TemporaryDirectory() as folder:
            changed = self._with_teacher(config, later)
            changed["model"] |= {"targets": folder, "targets_dtype": config["model"]["targets_dtype"]}
            run = Precompute("precompute", [_word(changed)], None)
            with lightning_errors():
                run.prepare()
            terms = list(named_objectives(run.objectives()).values())
            validates = run.config.trainer.limit_val_batches != 0
            rows = rows_to_store(run.datamodule, terms, run.model.student, validates)
            return estimate(run.stored, terms, run.model.student, rows).missing_bytes

    def _with_teacher(self, config: Config, later: Mapping[str, Config]) -> Config:
        """Return a configuration whose teacher is there, or something like it, and that asks for no targets."""
        model = dict(config["model"]) | {"targets": None, "targets_dtype": None}
        made = later.get((model["teacher"].get("init_args") or {}).get("path", ""))
        if made is not None and (folder := self._like.get(_key(made))):
            arguments = {"folder": folder, "tokenizer_path": _base(made["model"]["path"], later)}
            model["teacher"] = {"class_path": f"{__name__}.ToBeMade", "init_args": arguments}
        return config | {"model": model}

    def _remember(self, config: Config, run: Run) -> None:
        """Keep the config of what a fine-tuning makes."""
        folder = Path(self._made.name) / str(len(self._like))
        made: Any = run.model.student
        made.config.architectures = [type(made).__name__]
        made.config.save_pretrained(folder)
        self._like[_key(config)] = str(folder)


def _facts(task: Task, run: Run) -> Facts:
    metrics = [str(name) for name in task.metrics() or {}]
    if measures_terms(task, run.objectives().values(), ModelInfo.of(run.model.student)):
        return Facts(task.validation_names[0], ["loss", *run.objectives(), *metrics, "perplexity"], "loss", "min")
    return Facts(task.validation_names[0], ["loss", *metrics], task.primary_metric, task.primary_mode)


def _base(path: str, later: Mapping[str, Config]) -> str:
    """Return the model that one which is to be made starts from."""
    if path not in later:
        return path
    model = later[path]["model"]
    return _base(str(model["path"] if "path" in model else model["teacher"]["init_args"]["path"]), later)


def _key(config: Config) -> str:
    return json.dumps(config, sort_keys=True, default=str)


def _word(config: Config) -> str:
    """Return a configuration as a word of the command line."""
    return f"--config={yaml.safe_dump(config, default_flow_style=True, sort_keys=False, width=1 << 30).strip()}"
