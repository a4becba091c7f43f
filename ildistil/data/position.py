"""Where a training stands in its data, and how much of them it takes at once."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import CombinedLoader

__all__ = ["keeps_position", "position", "processes", "step_size"]


def position(trainer: L.Trainer) -> dict[str, int]:
    """Return where a training is: its epoch, and the number of batches that each process has seen of it."""
    loop: Any = trainer.fit_loop
    epochs, batches = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    over = batches.is_last_batch and batches.current.processed == batches.current.ready
    if epochs.processed < epochs.started and not over:
        return {"epoch": epochs.processed, "batches": batches.current.processed}
    return {"epoch": epochs.started, "batches": 0}


def keeps_position(trainer: L.Trainer) -> bool:
    """Return whether a training's data go on within an epoch: by a data module, or by loaders, with a state."""
    if trainer.datamodule is not None and type(trainer.datamodule).state_dict is not L.LightningDataModule.state_dict:  # type: ignore[attr-defined]
        return True
    return all(hasattr(loader, "load_state_dict") for loader in _loaders(trainer))


def processes(trainer: L.Trainer) -> tuple[int, int]:
    """Return the number of processes that share the rows, and which of them this is.

    It is not the world size: with tensor parallelism several processes work on the same rows.
    """
    place = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    return place["num_replicas"], place["rank"]


def step_size(trainer: L.Trainer) -> str:
    """Return in words what an optimiser step is made of: all rows of all processes and accumulated batches."""
    batches = processes(trainer)[0] * trainer.accumulate_grad_batches
    sizes = [
        getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        for loader in _loaders(trainer)
    ]
    return " + ".join(f"{size * batches} rows" if size else f"{batches} batches" for size in sizes)


def _loaders(trainer: L.Trainer) -> list[Any]:
    found: list[Any] = CombinedLoader(trainer.train_dataloader).flattened
    return found
