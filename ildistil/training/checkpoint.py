"""What a checkpoint holds beside Lightning's own parts: its format is written and read here alone."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from ildistil.errors import CheckpointError
from ildistil.objectives import Objective
from ildistil.stages import Stage

__all__ = ["PROJECTIONS", "STUDENT", "Saved", "load", "recipe", "specification", "stage_lines"]

# Raised when a checkpoint would be written in another way.
FORMAT = 1
_KEY = "ildistil"
STUDENT, PROJECTIONS = "distillation.student.", "distillation.projections."


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

    def write(self, checkpoint: dict[str, Any]) -> None:
        """Add it to a checkpoint."""
        checkpoint[_KEY] = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self)}}

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any], source: str = "The checkpoint") -> Self:
        """Take it out of a checkpoint.

        Raises:
            CheckpointError: no Distiller wrote it, or one with another format.
        """
        said = checkpoint.get(_KEY)
        if not isinstance(said, Mapping) or "format" not in said:
            raise CheckpointError(f"{source} holds no transformers student that an ildistil Distiller saved.")
        if said["format"] != FORMAT:
            raise CheckpointError(
                f"{source} is in format {said['format']}; this version of ildistil reads format {FORMAT}. Export its "
                "student with the version that wrote it."
            )
        return cls(**{key: value for key, value in said.items() if key != "format"})

    def check_resumes(
        self, objectives: Mapping[str, str], stages: Mapping[str, str], own: Mapping[str, Tensor]
    ) -> None:
        """Name what differs when training goes on, and refuse what can't go on.

        Args:
            objectives: those of this run.
            stages: those of this run.
            own: the projections of this run.

        Raises:
            CheckpointError: the projections are others, so that the optimiser's state doesn't fit.
        """
        _compare(self.objectives, objectives)
        _compare(self.stages, stages)
        if self.projections.keys() != own.keys():
            raise CheckpointError(
                "This checkpoint was made with other projections, so its optimiser state doesn't fit: it has "
                f"{_owners(self.projections)}, this run {_owners(own)}. Resume with the same objectives, or start a "
                "new run from its student (ildistil export)."
            )


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file: tensors and plain values only, since a foreign file must not be able to run code.

    Raises:
        CheckpointError: there is no such file, or it isn't a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise CheckpointError(f"There is no file {str(path)!r}. Checkpoints beside it: {', '.join(near) or 'none'}.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file makes zipfile, pickle or torch raise
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint that can be read: it is damaged, or holds other things than tensors and "
            "plain values. Name another."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not a checkpoint. Name another.")
    return content


def specification(objective: Objective) -> str:
    """Return an objective as one would write it: what differs from the defaults, and the weight."""
    parameters = inspect.signature(type(objective)).parameters
    values = {n: getattr(objective, n) for n in sorted(parameters) if n != "name" and hasattr(objective, n)}
    told = [f"{n}={v}" for n, v in values.items() if n == "weight" or v != parameters[n].default]
    return f"{type(objective).__name__}({', '.join(told)})"


def stage_lines(stages: Sequence[Stage]) -> dict[str, str]:
    """Return each stage in words."""
    return {f"stage {i}": f"{', '.join(s.objectives)}, {s.epochs} epochs" for i, s in enumerate(stages, start=1)}


def recipe(student: nn.Module) -> dict[str, Any] | None:
    """Return what rebuilds a transformers student without its teacher, in plain values."""
    if not isinstance(student, PreTrainedModel):
        return None
    return {"architecture": type(student).__name__, "config": json.loads(student.config.to_json_string(use_diff=False))}


def _compare(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    lines = [
        f"  {name}: {saved.get(name, 'not there')} in the checkpoint, {now.get(name, 'not there')} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if lines:
        rank_zero_warn("Training goes on with other objectives or stages than the checkpoint's:\n" + "\n".join(lines))


def _owners(projections: Mapping[str, Tensor]) -> list[str]:
    return sorted({key.removeprefix(PROJECTIONS).split(".")[0] for key in projections}) or ["none"]
