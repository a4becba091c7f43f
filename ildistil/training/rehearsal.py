"""Dry runs before training: on a made-up batch while the module is configured, then on the first real one."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from ildistil.data.task import task_of
from ildistil.engine import Distillation, DryRun
from ildistil.errors import DataError, ModelRunError, TargetsError

_ONE_BY_ONE = (SequentialSampler, RandomSampler, DistributedSampler)

__all__ = ["try_first_batch", "try_synthetic_batch"]


def try_synthetic_batch(distillation: Distillation) -> DryRun | None:
    """Dry-run a made-up batch; ``None`` where none can be made, or a model refuses it.

    Raises:
        IldistilError: a term can't work with these models.
    """
    batch = distillation.synthetic_batch()
    try:
        return None if batch is None else distillation.dry_run(batch)
    except ModelRunError as error:  # about a batch that we made up: the first real one will tell
        rank_zero_info(f"The dry run on a synthetic batch was skipped, the model refused it: {error}")
        return None


def try_first_batch(distillation: Distillation, trainer: L.Trainer) -> DryRun | None:
    """Dry-run the data set's first rows; ``None`` where they can't be had without losing them, or aren't stored.

    Raises:
        IldistilError: a term can't work with these models and data.
    """
    batch = _first_batch(trainer)
    try:
        found = None if batch is None else distillation.dry_run(batch)
    except TargetsError:
        # They are the data set's first rows, not the loader's: a sampler may leave them out. If the loader's own rows
        # are missing too, the first step says so.
        return None
    if found is not None:
        _check_tokens(task_of(trainer.datamodule).head, found.next_token)  # type: ignore[attr-defined]
    return found


def _check_tokens(head: str | None, next_token: bool | None) -> None:
    """Refuse next tokens that the student's loss takes for those at the same position."""
    if head == "causal-lm" and next_token is False:
        raise DataError(
            "The labels are the next tokens, and the student's loss compares its logits at a position with the token "
            "at that position: it would learn to copy. Decoders taken from an encoder-decoder (BartForCausalLM ...) "
            "are such models. Take a causal language model (GPT-2, Llama ...), or labels: masked."
        )


def _first_batch(trainer: L.Trainer) -> Any | None:
    loader: Any = trainer.train_dataloader
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
        return None  # a stream: taking a batch would lose it
    # Neither through the loader nor its sampler: they may hold random states and workers of their own.
    with isolate_rng():
        if loader.batch_sampler is None and type(loader.sampler) in _ONE_BY_ONE:
            batch = loader.collate_fn(dataset[0])  # the data set's items are batches
        else:
            size = getattr(loader.batch_sampler, "batch_size", None) or 2
            batch = loader.collate_fn([dataset[row] for row in range(min(8, size, len(dataset)))])
    return trainer.strategy.batch_to_device(batch, trainer.lightning_module.device)
