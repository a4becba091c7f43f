"""What the commands with a student and its teacher share."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

from ildistil import presets
from ildistil.commands._run import Run
from ildistil.errors import ConfigError
from ildistil.objectives import Objective
from ildistil.students.sources import ModelSource, StudentOptions
from ildistil.teachers import StoredTeacher
from ildistil.teachers.layout import Dtype
from ildistil.training.distiller import Distiller

__all__ = ["DistillingRun", "PreparingRun", "make_distiller"]


def make_distiller(
    teacher: ModelSource,
    student: StudentOptions,
    tokenizer: str | None = None,
    targets: str | None = None,
    targets_dtype: Dtype | None = None,
    **options: Any,
) -> Distiller:
    """The teacher, the student, and how it is trained.

    Args:
        teacher: Where the frozen model comes from, usually ``pretrained`` with a path.
        student: Where the student comes from: layers of the teacher, a config, or another model's path.
        tokenizer: Name or folder of the tokenizer; by default the teacher's.
        targets: Folder of stored targets, see 'ildistil precompute'; what is missing is stored before the training.
        targets_dtype: Precision of targets in a new folder: float16 (the default), bfloat16 or float32.
        options: Those of :class:`Distiller`.

    Raises:
        ConfigError: There is a precision of targets, and no folder.
        IldistilError: The models can't be loaded or made, or the targets are of another teacher.
    """
    tokenizer = tokenizer or teacher.tokenizer
    if targets is not None:
        stored, model = _stored_teacher(teacher, targets, targets_dtype, with_weights=student.copies_weights)
        return Distiller(student.make(model, teacher), stored, tokenizer=tokenizer, **options)
    if targets_dtype is not None:
        raise ConfigError(
            f"targets_dtype is {targets_dtype}, and there are no targets. Name their folder (--model.targets FOLDER), "
            "or leave targets_dtype out."
        )
    loaded = teacher.load()
    return Distiller(student.make(loaded, teacher), loaded, tokenizer=tokenizer, **options)


def _stored_teacher(
    source: ModelSource, folder: str, dtype: Dtype | None, *, with_weights: bool
) -> tuple[StoredTeacher, PreTrainedModel]:
    """Return the stored teacher, and the teacher or its skeleton to make a student by.

    The teacher is loaded where its weights are wanted, where they can't be told from their files, and where nothing is
    stored yet; else when a row turns out to be missing.
    """
    digest = source.digest()
    stored = StoredTeacher(folder, source.load, dtype=dtype, source=digest)
    if isinstance(stored.model, PreTrainedModel):
        return stored, stored.model
    known = digest is not None and digest == stored.facts.source
    skeleton = stored.skeleton() if known and not with_weights else None
    if skeleton is not None:
        return stored, skeleton
    model = source.load()
    if not known:
        stored.facts.check(model)
    return stored, model


class DistillingRun(Run):
    """A run with objectives by name, perhaps those of a preset."""

    usage = "[--preset NAME] [--config FILE]"

    def __init__(self, command: str, arguments: Sequence[str], description: str | None) -> None:
        super().__init__(command, make_distiller, _with_preset(arguments), description)

    def add_objectives(self, parser: LightningArgumentParser) -> None:
        """Add the objectives by name."""
        parser.add_argument(
            "--objectives", type=dict[str, Objective] | None, default=None, metavar="OBJECTIVES",
            help="The terms of the loss: a name for each, and its class_path and init_args.",
        )  # fmt: skip

    def objectives(self) -> dict[str, Objective]:
        """Return the named objectives of this run."""
        for name, objective in (self.config.objectives or {}).items():
            if objective.get("init_args.name") not in (None, name):
                raise ConfigError(f"The objective {name!r} has a name already: leave {objective.init_args.name!r} out.")
        return self.config_init.objectives or {}


class PreparingRun(DistillingRun):
    """A run that prepares everything as a fit does, and trains nothing."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Take only the device from the configuration: nothing is trained, and one process works."""
        config = self.config_init.trainer
        one = config.devices[:1] if isinstance(config.devices, list) else 1
        return L.Trainer(
            accelerator=config.accelerator, devices=one, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    def prepare(self) -> None:
        """Prepare and check the data as a fit does."""
        module, trainer = self.model, self.trainer
        trainer.strategy.connect(module)
        trainer.state.fn = TrainerFn.FITTING
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        self.datamodule.trainer = module.trainer = trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        module.setup("fit")


def _with_preset(arguments: Sequence[str]) -> list[str]:
    """Replace ``--preset NAME`` by the preset's file, before all other configuration.

    Raises:
        ConfigError: There is no such preset, or several are named.
    """
    named, others, words = [], [], iter(arguments)
    for word in words:
        if word == "--preset":
            named.append(next(words, ""))
        elif word.startswith("--preset="):
            named.append(word.removeprefix("--preset="))
        else:
            others.append(word)
    if len(named) > 1:
        raise ConfigError(f"There can be one preset, got {' and '.join(named)}. Name the other objectives in a file.")
    return [f"--config={presets.file(name)}" for name in named] + others
