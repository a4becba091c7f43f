"""Random numbers that depend on nothing but where they are drawn, so that a run that goes on draws the same."""

import os
import random

import numpy as np
import torch

__all__ = ["reseed", "seed_of_run"]


def seed_of_run() -> int:
    """Return the seed of ``seed_everything``, or else what torch was seeded with."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))


def reseed(seed: int, epoch: int, batch: int, rank: int) -> None:
    """Seed Python, NumPy and torch for one training batch, in some 50 microseconds.

    Args:
        seed: the run's.
        epoch: number of the epoch.
        batch: number of the batch in the epoch.
        rank: number of the process: each draws dropout masks of its own.

    >>> reseed(0, epoch=1, batch=2, rank=0)
    >>> drawn = torch.rand(2)
    >>> reseed(0, epoch=1, batch=2, rank=0)
    >>> bool((torch.rand(2) == drawn).all())
    True
    """
    first, second = np.random.SeedSequence([seed, epoch, batch, rank]).generate_state(2, np.uint64)
    torch.manual_seed(int(first >> np.uint64(1)))
    random.seed(int(second))
    np.random.seed(int(second & np.uint64(0xFFFFFFFF)))  # noqa: NPY002 - what others draw from
