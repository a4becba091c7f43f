"""Random numbers that depend on nothing but where they are drawn, so that a run that goes on draws the same."""

import os
import random
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["reseed", "seeds_of_run"]


def seeds_of_run() -> list[int]:
    """Return the seeds of torch, Python and NumPy: that of ``seed_everything``, or what they would draw from now."""
    if (seed := os.environ.get("PL_GLOBAL_SEED")) is not None:
        return [int(seed)] * 3
    python, numpy = random.Random(), np.random.RandomState()
    python.setstate(random.getstate())
    numpy.set_state(np.random.get_state())  # noqa: NPY002
    return [torch.initial_seed(), python.getrandbits(62), int(numpy.randint(2**62))]


def reseed(seeds: Sequence[int], epoch: int, batch: int, rank: int) -> None:
    """Seed torch, Python and NumPy for one training batch, in some 100 microseconds.

    Args:
        seeds: the run's, one for each.
        epoch: number of the epoch.
        batch: number of the batch in the epoch.
        rank: number of the process: each draws dropout masks of its own.

    >>> reseed([0, 0, 0], epoch=1, batch=2, rank=0)
    >>> drawn = torch.rand(2)
    >>> reseed([0, 0, 0], epoch=1, batch=2, rank=0)
    >>> bool((torch.rand(2) == drawn).all())
    True
    """
    first, second, third = (
        int(np.random.SeedSequence([seed, epoch, batch, rank, number]).generate_state(1, np.uint64)[0])
        for number, seed in enumerate(seeds)
    )
    torch.manual_seed(first >> 1)
    random.seed(second)
    np.random.seed(third & 0xFFFFFFFF)  # noqa: NPY002 - what others draw from
