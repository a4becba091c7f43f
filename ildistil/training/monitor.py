"""What a run costs: tokens per second and peak memory."""

import resource
import sys
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

__all__ = ["Throughput"]


class Throughput(Callback):
    """Logs ``train/tokens_per_second`` (real tokens, padding left out) and ``train/peak_memory_gib`` at each epoch.

    Peak memory is the device's on CUDA, else the resident set of the process.
    """

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._tokens: Tensor | int = 0
        self._seconds = 0.0
        self._start = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the step begins."""
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the tokens; on the device, so that nothing waits for it."""
        mask = batch.get("attention_mask")
        self._tokens = self._tokens + (batch["input_ids"].numel() if mask is None else mask.sum())
        self._seconds += time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log both."""
        if self._seconds:
            pl_module.log(
                "train/tokens_per_second", float(self._tokens) / self._seconds, sync_dist=True, reduce_fx="sum"
            )
        pl_module.log("train/peak_memory_gib", peak_memory(pl_module.device))


def peak_memory(device: torch.device) -> float:
    """Give the peak memory so far, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
