"""What a checkpoint holds beside Lightning's own parts: its format is written and read here alone."""

import inspect
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from ildistil.capture import unwrapped
from ildistil.data.position import position, step_size
from ildistil.data.serving import RowsDataModule
from ildistil.data.task import task_of
from ildistil.errors import CheckpointError
from ildistil.objectives import Objective
from ildistil.schedules import has_schedules
from ildistil.stages import Stage
from ildistil.training.position import recount, settle

__all__ = [
    "KEY",
    "PROJECTIONS",
    "STUDENT",
    "Saved",
    "restore",
    "run_settings",
    "write",
]

# To be raised when a checkpoint would be written in another way.
FORMAT = 2
KEY = "ildistil"
STUDENT, PROJECTIONS = "distillation.student.", "distillation.projections."
_TRAINER = ("gradient_clip_val", "gradient_clip_algorithm", "precision")
_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
# Of a config: what it is called, and who wrote it.
_NAMES = {"_name_or_path", "transformers_version", "architectures"}


@dataclass(frozen=True)
class Saved:
    """What a Distiller adds to a checkpoint, in plain values and tensors.

    Attributes:
        objectives: each term as one would write it.
        stages: each stage in words.
        projections: the learned parts of the objectives, by their names in the module; kept apart, so that a student
            loads without them.
        student: what rebuilds the student without its teacher; ``None`` where it is no transformers model.
        tokenizer: name or folder of the student's tokenizer.
        teacher: name or folder of the teacher.
        metrics: what was measured last on validation sets.
        balance: the sizes of the terms.
        window: the averages of accumulated batches.
        waiting: how many batches waited for the end of their optimiser step: what they gave is in no checkpoint.
        settings: what else decides how training goes on, in words: data, steps, learning rate, seed ...
        position: the epoch, and the number of batches seen of it.
        seeds: what the random numbers of every batch are seeded from.
        head_untrained: whether the student has a head that no term trained.
        sealed: whether its file ends with a checksum.
    """

    objectives: dict[str, str]
    stages: dict[str, str]
    projections: dict[str, Tensor]
    student: dict[str, Any] | None = None
    tokenizer: str | None = None
    teacher: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    balance: dict[str, float] = field(default_factory=dict)
    window: dict[str, tuple[float, float]] = field(default_factory=dict)
    waiting: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    position: dict[str, int] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    head_untrained: bool = False
    sealed: bool = False

    @classmethod
    def of(cls, module: Any, projections: dict[str, Tensor]) -> Self:
        """Collect it from a Distiller."""
        distillation = module.distillation
        balance, teacher = distillation.balance, distillation.teacher
        return cls(
            objectives={name: specification(objective) for name, objective in distillation.objectives.items()},
            stages=stage_lines(module.stages),
            projections=projections,
            student=recipe(unwrapped(distillation.student)),
            tokenizer=module.tokenizer_source,
            teacher=None if teacher is None else teacher.info.source,
            metrics=module.evaluation.measured({} if module._trainer is None else module.trainer.callback_metrics),
            balance={} if balance is None else balance.state_dict(),
            window=module.window.state_dict(),
            waiting=module.window.waiting,
            settings=module.settings,
            position={} if module._trainer is None else position(module.trainer),
            seeds=list(module.seeds),
            head_untrained=module.head_untrained,
        )

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Add it to a checkpoint."""
        checkpoint[KEY] = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any], source: str = "The checkpoint") -> Self:
        """Take it out of a checkpoint.

        Raises:
            CheckpointError: no Distiller wrote it, or one with another format.
        """
        said = checkpoint.get(KEY)
        if not isinstance(said, Mapping) or "format" not in said:
            raise CheckpointError(f"{source} holds no transformers student that an ildistil Distiller saved.")
        if said["format"] != FORMAT:
            raise CheckpointError(
                f"{source} is in format {said['format']}; this version of ildistil reads format {FORMAT}. Export its "
                "student with the version that wrote it."
            )
        return cls(**{key: value for key, value in said.items() if key != "format"})

    def check_projections(self, own: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint whose projections and optimiser state don't fit a run.

        Args:
            own: the projections of the run.

        Raises:
            CheckpointError: the checkpoint's are others.
        """
        if self.projections.keys() != own.keys():
            raise CheckpointError(
                "This checkpoint was made with other projections, so neither they nor its optimiser state fit: it has "
                f"{_owners(self.projections)}, this run {_owners(own)}. Go on with the same objectives, or start a "
                "new run from its student (ildistil export)."
            )

    def check_same(self, now: Self, accept: bool, keeps_position: bool = True) -> None:
        """Name what differs between the run that wrote this and the one that goes on.

        Args:
            now: what the run that goes on would write.
            keeps_position: whether the data go on within an epoch.
            accept: warn of differences rather than refuse them.

        Raises:
            CheckpointError: something differs, or accumulated batches are lost, and that isn't accepted.
        """
        was, told = self._words(), now._words()
        lines = [
            f"  {name}: {was.get(name, 'not there')} in the checkpoint, {told.get(name, 'not there')} now"
            for name in sorted(was.keys() | told.keys())
            if was.get(name) != told.get(name)
        ]
        if self.waiting:
            lines.append(f"  {self.waiting} batches had waited for the end of their step, and would be lost")
        if self.position.get("batches") and not keeps_position:
            lines.append(
                f"  the checkpoint is of batch {self.position['batches']} of an epoch, and the data begin it anew: "
                "write state_dict and load_state_dict of the data module, or go on from an epoch's end"
            )
        if not lines:
            return
        differences = "\n".join(lines)
        if not accept:
            raise CheckpointError(
                f"This run is another than the one that wrote the checkpoint:\n{differences}\nGo on with the same, or "
                "with accept_changes (--model.accept_changes=true) if this is what you want."
            )
        rank_zero_warn(f"Training goes on in another way than the checkpoint's:\n{differences}")

    def _words(self) -> dict[str, str]:
        config = {} if self.student is None else self.student["config"]
        student = {f"student's {key}": str(value) for key, value in config.items() if key not in _NAMES}
        kept = {f"objective {name}": value for name, value in self.objectives.items()}
        return {**self.settings, **self.stages, **kept, **student}


def write(module: Any, checkpoint: dict[str, Any]) -> None:
    """Complete what Lightning is about to write of a Distiller: projections apart, and no state of metrics."""
    weights = checkpoint["state_dict"]
    projections = {key: weights.pop(key) for key in list(weights) if key.startswith(PROJECTIONS)}
    for key in [key for key in weights if key.startswith("metrics.")]:
        del weights[key]
    if "loops" in checkpoint:
        # Lightning counts on when callbacks save after an epoch.
        checkpoint["epoch"] = max(0, checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["started"] - 1)
        settle(checkpoint["loops"]["fit_loop"], checkpoint["global_step"])
    Saved.of(module, projections).write(checkpoint)


def restore(module: Any, checkpoint: dict[str, Any], *, fits: bool, measures: bool = False) -> Saved | None:
    """Take what a Distiller needs of a checkpoint, before Lightning loads the rest.

    Args:
        module: the Distiller.
        checkpoint: what was read; it gets the projections that the module has.
        fits: whether a training goes on.
        measures: whether the terms are measured.

    Returns:
        What a training that goes on is to be compared with.

    Raises:
        CheckpointError: no Distiller wrote it, or one with other projections.
    """
    saved = Saved.read(checkpoint)
    own = {key: value for key, value in module.state_dict().items() if key.startswith(PROJECTIONS)}
    if fits or measures:
        saved.check_projections(own)
    if fits:
        if "optimizer_states" not in checkpoint:
            raise CheckpointError(
                "This checkpoint holds weights alone (save_weights_only), so that a training can't go on from it. Name "
                "another; or export its student, and start a new run from that."
            )
        _keep_best(module.trainer, checkpoint["callbacks"])
        data = module.trainer.datamodule
        state = checkpoint.get(type(data).__qualname__)
        if isinstance(data, RowsDataModule) and state:
            recount(checkpoint["loops"]["fit_loop"], state["at_once"], data.items_at_once)
        module.window.load_state_dict(saved.window)
        if module.distillation.balance is not None:
            module.distillation.balance.load_state_dict(saved.balance)
    checkpoint["state_dict"] |= {key: saved.projections.get(key, value) for key, value in own.items()}
    return saved if fits else None


def _keep_best(trainer: L.Trainer, states: Mapping[str, dict[str, Any]]) -> None:
    """Keep what was best in callbacks, where its file is still there though the folder has another name now."""
    for callback in trainer.checkpoint_callbacks:
        state = states.get(callback.state_key)
        if not isinstance(callback, ModelCheckpoint) or not state or callback.dirpath is None:
            continue
        here, before = Path(callback.dirpath), Path(state["dirpath"])
        if here != before and (here / Path(state["best_model_path"]).name).is_file():
            moved = {name: str(here / Path(state[name]).name) for name in _PATHS if state[name]}
            models = {str(here / Path(path).name): score for path, score in state["best_k_models"].items()}
            state |= {**moved, "dirpath": callback.dirpath, "best_k_models": models}


def specification(objective: Objective) -> str:
    """Return an objective as one would write it: what differs from the defaults, and the weight."""
    parameters = inspect.signature(type(objective)).parameters
    values = {n: getattr(objective, n) for n in sorted(parameters) if n != "name" and hasattr(objective, n)}
    told = [f"{n}={v}" for n, v in values.items() if n == "weight" or v != parameters[n].default]
    return f"{type(objective).__name__}({', '.join(told)})"


def stage_lines(stages: Sequence[Stage]) -> dict[str, str]:
    """Return each stage in words."""
    return {f"stage {i}": f"{', '.join(s.objectives)}, {s.epochs} epochs" for i, s in enumerate(stages, start=1)}


def run_settings(module: Any) -> dict[str, str]:
    """Return what decides how a training goes on, beside models and objectives, in words."""
    trainer, optimization = module.trainer, module.optimization
    scheduled = module.stages or optimization.depends_on_steps or has_schedules(module.distillation.objectives)
    told = {name: getattr(trainer, name) for name in _TRAINER}
    balance = module.distillation.balance
    told["balance"] = balance and f"by {balance.by}, every {balance.every}, momentum {balance.momentum}"
    told |= {
        "teacher": getattr(module.teacher, "digest", None),
        "float32 products": torch.get_float32_matmul_precision(),
    }
    # Not the batches and processes that make up a step: they may be others when a training goes on.
    batches, accumulated = trainer.num_training_batches, trainer.accumulate_grad_batches
    told |= {
        "a step": step_size(trainer),
        "steps of an epoch": math.ceil(batches / accumulated) if math.isfinite(batches) else None,
    }
    told |= {name.replace("_", " "): value for name, value in vars(optimization).items()}
    told["seed"] = os.environ.get("PL_GLOBAL_SEED")
    told["steps"] = f"{module.timeline.steps:g}" if scheduled else None  # else no step depends on it
    told["data"] = task_of(trainer.datamodule).fingerprint
    return {name: str(value) for name, value in told.items()}


def recipe(student: nn.Module) -> dict[str, Any] | None:
    """Return what rebuilds a transformers student without its teacher, in plain values."""
    if not isinstance(student, PreTrainedModel):
        return None
    return {"architecture": type(student).__name__, "config": json.loads(student.config.to_json_string(use_diff=False))}


def _owners(projections: Mapping[str, Tensor]) -> list[str]:
    return sorted({key.removeprefix(PROJECTIONS).split(".")[0] for key in projections}) or ["none"]
