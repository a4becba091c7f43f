"""The optimiser, and the learning rate at every step."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from ildistil.errors import ConfigError
from ildistil.functional.checks import check_number
from ildistil.stages import Timeline

__all__ = ["Optimization", "Shape"]

Shape = Literal["linear", "cosine", "constant"]


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


_SHAPES: dict[Shape, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": lambda _: 1.0}


@dataclass(frozen=True)
class Optimization:
    """AdamW with a warm-up and a fall of the learning rate.

    Args:
        learning_rate: its peak.
        weight_decay: of all parameters but biases and norms.
        warmup: share of all steps in which the learning rate rises linearly from 0.
        schedule: what it does then: fall to 0 (``"linear"``, ``"cosine"``) or stay (``"constant"``).

    Raises:
        ConfigError: a value is out of range.
    """

    learning_rate: float
    weight_decay: float
    warmup: float
    schedule: Shape

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, "> 0", lambda rate: rate > 0)
        check_number("weight_decay", self.weight_decay, ">= 0", lambda decay: decay >= 0)
        check_number("warmup", self.warmup, "a share of all steps, in [0, 1)", lambda share: 0 <= share < 1)
        if self.schedule not in _SHAPES:
            raise ConfigError(f"schedule must be one of {sorted(_SHAPES)}, got {self.schedule!r}.")

    @property
    def depends_on_steps(self) -> bool:
        """Whether the learning rate of a step depends on the number of all steps."""
        return self.schedule != "constant" or self.warmup > 0

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> AdamW:
        """Make the optimiser of those parameters that require a gradient; biases and norms don't decay."""
        trained = [p for p in parameters if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = all(p.device.type in ("cpu", "cuda") for p in trained)
        optimizer = AdamW([g for g in groups if g["params"]], lr=self.learning_rate, fused=True if fused else None)
        # A fused optimiser offers to unscale float16 gradients while it steps, and Lightning then refuses to clip, in
        # bfloat16 too. Without the offer gradients are unscaled before they are completed, clipped and applied: they
        # reach `on_before_optimizer_step` unscaled, and infinite there where the scale was too large for them.
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def scheduler(self, optimizer: AdamW, timeline: Timeline) -> LambdaLR:
        """Make the schedule, a pure function of the optimiser step; it starts anew with each stage."""
        return LambdaLR(optimizer, timeline.factor(self.learning_rate, self._factor))

    def _factor(self, step: int, steps: float) -> float:
        """Return the learning rate at a step of a stage, as a factor of its peak."""
        if not math.isfinite(steps):
            return 1.0
        rise = round(self.warmup * steps)
        if step < rise:  # step + 1: the very first step must not be lost to a learning rate of zero
            return (step + 1) / (rise + 1)
        return _SHAPES[self.schedule]((step - rise) / max(1, steps - rise))
