"""What a run costs, tokens or examples per second and peak memory; and what its validations measured."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from ildistil.training.evaluation import batch_size

__all__ = ["Throughput", "Validations", "peak_memory"]


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` (real tokens, padding left out) and ``train/peak_memory_gib`` at each epoch.

    Where batches have no tokens, such as images, it logs ``train/examples_per_second`` instead. Peak memory is the
    device's on CUDA, else the resident set of the process.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._reset()

    def _reset(self) -> None:
        self._counts: dict[str, Tensor | int] = {}
        self._seconds = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self._reset()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the step begins."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what the step learned from; on the device, so that nothing waits for it."""
        unit, number = _count(batch)
        self._counts[unit] = self._counts.get(unit, 0) + number
        self._seconds += time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log both."""
        for unit, number in self._counts.items():
            rate = float(number) / self._seconds
            pl_module.log(f"train/{unit}_per_second", rate, sync_dist=True, reduce_fx="sum")
        pl_module.log("train/peak_memory_gib", peak_memory(pl_module.device))


class Validations(Callback):
    """Keeps what each validation of a Distiller measured in the run's checkpoints, whatever the loggers do."""

    def __init__(self) -> None:
        self.measured: list[dict[str, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep what was measured."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        module: Any = pl_module
        sets = tuple(f"{name}/" for name in module.metrics)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(sets)}
        earlier = [each for each in self.measured if each["step"] < trainer.global_step]  # one may come again
        self.measured = [*earlier, {"step": trainer.global_step, **found}]

    def state_dict(self) -> dict[str, Any]:
        """Return what goes into a checkpoint."""
        return {"measured": self.measured}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was measured before."""
        self.measured = list(state_dict["measured"])


def _count(batch: Mapping[str, Any]) -> tuple[str, Tensor | int]:
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return "tokens", mask.sum()
    if isinstance(ids := batch.get("input_ids"), Tensor):
        return "tokens", ids.numel()
    return "examples", batch_size(batch)


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
