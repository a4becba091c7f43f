"""The order of rows in an epoch: shuffled, grouped by length, and a function of (seed, epoch) only.

All samplers are `DistributedSampler`, also for one process: Lightning leaves those alone and tells them the epoch. Any
other sampler it wraps and reshuffles under ddp, and a custom batch sampler it refuses there. So what makes whole
batches here is no batch sampler either, but the sampler of a data loader with ``batch_size=None``.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data.distributed import DistributedSampler

from ildistil.data.hashing import keys
from ildistil.data.permutation import Permutation
from ildistil.errors import DataError

# Rows are sorted by length within this many batches: enough for little padding (measured at 32 rows a batch: 4.6 % of
# what the model processes on SST-2, against 67 % in random batches), few enough for epochs that differ.
BATCHES_PER_CHUNK = 50
# Rows of like length are shuffled among the batches of a bucket: few buckets make epochs differ, many save padding
# (measured on SST-2 at 4,096 tokens a batch: 6.4 % with 20 buckets, 4.2 % with 30, 2.6 % with 50).
BUCKETS = 30
# Rows of an order that are computed at once.
_AT_ONCE = 4096


class EpochSampler(DistributedSampler[int]):
    """Rows in an order that depends on the seed and the epoch only; no process group is needed.

    Rank ``r`` takes every ``num_replicas``-th row, from the ``r``-th on, so that a step has the rows that follow one
    another in the order, whatever the number of ranks. For training the order is repeated from its start until it
    divides evenly (at most ``num_replicas - 1`` rows are seen twice), so that all ranks have batches of the same size.
    For evaluation nothing is repeated, and every epoch has the same order. A shuffled order takes no memory.

    Args:
        rows: Number of rows.
        num_replicas: Number of processes that share the rows.
        rank: Number of this process, from 0.
        shuffle: Shuffle; otherwise the rows come in the file's order.
        seed: Seed of the order, not negative.
        evaluation: Repeat nothing and ignore the epoch.
        numbered: The items are ``epoch * rows + row``, for a data set that draws its rows anew in each epoch; in
            evaluation the epoch is 0.

    Raises:
        DataError: There is no row, the seed is negative, or the rank does not exist.

    >>> sampler = EpochSampler(5, shuffle=False, num_replicas=2, rank=1)
    >>> list(sampler), list(EpochSampler(5, shuffle=False, num_replicas=2, rank=1, evaluation=True))
    ([1, 3, 0], [1, 3])
    """

    def __init__(
        self, rows: int, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0,
        evaluation: bool = False, numbered: bool = False,
    ) -> None:  # fmt: skip
        if seed < 0:
            raise DataError(f"The seed of the order of rows is {seed}; it must not be negative.")
        if rows < 1 or not 0 <= rank < num_replicas:
            raise DataError(f"There is no share {rank} of {rows} rows among {num_replicas} processes, counted from 0.")
        # The base class only asks a data set for its length.
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.rows = rows
        self.evaluation = evaluation
        self.numbered = numbered
        self._seen = 0
        if evaluation:
            self.num_samples = len(range(rank, rows, num_replicas))
            self.total_size = rows

    def go_on(self, epoch: int, seen: int) -> None:
        """Leave out, the next time it is iterated, what was seen of an epoch already.

        Args:
            epoch: Number of the epoch, from 0.
            seen: Number of items of this rank that came in it.
        """
        self.set_epoch(epoch)
        self._seen = seen

    def order(self) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """Return what returns the rows at some places of this epoch's order, before it is shared among the ranks."""
        return Permutation(self.rows, self._seeds) if self.shuffle else lambda places: places

    def generator(self) -> torch.Generator:
        """Return a generator seeded from (seed, epoch)."""
        return torch.Generator().manual_seed(int(keys(self._seeds)[0] >> np.uint64(1)))

    @property
    def _seeds(self) -> list[int]:
        """Both numbers: seed + epoch would give seed 1 the epochs of seed 0 again."""
        return [self.seed, 0 if self.evaluation else self.epoch]

    @property
    def _offset(self) -> int:
        return self.epoch * self.rows if self.numbered and not self.evaluation else 0

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that nothing happens before the first row is asked for: a loader may open two and use one.
        seen, self._seen = self._seen, 0
        yield from self.items(seen)

    def items(self, seen: int) -> Iterator[Any]:
        """Return this rank's items of the epoch, in their order, after a number of them."""
        order, offset = self.order(), self._offset
        for start in range(seen, self.num_samples, _AT_ONCE):
            mine = np.arange(start, min(start + _AT_ONCE, self.num_samples)) * self.num_replicas + self.rank
            # Modulo: the order is repeated from its start, which changes nothing in evaluation.
            yield from (order(mine % self.rows) + offset).tolist()


class LengthGroupedSampler(EpochSampler):
    """Batches of rows of similar length, over all ranks, in random order.

    The rows are shuffled, cut into chunks of 50 batches, sorted by length within a chunk, cut into batches, and the
    batches are shuffled. The batch with the longest row comes first, so that a lack of memory shows at once. An
    incomplete batch comes last.

    Args:
        lengths: Number of tokens of every row.
        batch_size: Rows per rank that are like each other: those of an optimiser step, all its batches together. The
            order is that of any other number of ranks with as many rows a step.

    The other arguments, and what is raised, are those of `EpochSampler`.

    >>> lengths = [3, 9, 3, 9, 3, 9, 3]
    >>> [lengths[row] for row in LengthGroupedSampler(lengths, batch_size=3)]
    [9, 9, 9, 3, 3, 3, 3]
    """

    def __init__(
        self, lengths: Sequence[int] | torch.Tensor, batch_size: int, num_replicas: int = 1, rank: int = 0,
        seed: int = 0, evaluation: bool = False, numbered: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(len(lengths), num_replicas, rank, seed=seed, evaluation=evaluation, numbered=numbered)
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1.")
        self.lengths = torch.as_tensor(lengths)
        self.global_batch = batch_size * num_replicas

    def order(self) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
        """Return what returns the rows at some places of this epoch's order, before it is shared among the ranks."""
        generator = self.generator()
        shuffled = torch.randperm(self.rows, generator=generator)
        chunks = torch.split(shuffled, BATCHES_PER_CHUNK * self.global_batch)
        order = torch.cat([chunk[self.lengths[chunk].argsort(descending=True, stable=True)] for chunk in chunks])
        whole = self.rows - self.rows % self.global_batch
        batches = order[:whole].view(-1, self.global_batch)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        rows: NDArray[np.int64] = torch.cat([self._longest_first(batches).flatten(), order[whole:]]).numpy()
        return rows.__getitem__

    def _longest_first(self, batches: torch.Tensor) -> torch.Tensor:
        if len(batches) == 0:
            return batches
        longest = int(self.lengths[batches].amax(dim=1).argmax())
        return torch.cat([batches[longest : longest + 1], batches[:longest], batches[longest + 1 :]])


class TokenBudgetSampler(EpochSampler):
    """Whole batches, of as many rows of similar length as a number of tokens allows, padding included.

    The rows are sorted by length, those of one length in random order, and cut into about 30 buckets. A bucket holds
    ``n = tokens_per_batch // longest row`` rows for each of its batches, and as many batches as whole steps take; its
    rows are shuffled and dealt to them. The cuts depend on the lengths only, so that every epoch has the same number of
    batches, and in a step the batches of all ranks are of one bucket. The steps come in random order; those with the
    most tokens and with the longest row come first, so that a lack of memory shows at once.

    Every row is seen once, but for rows that are seen twice where the last ones are fewer than the batches of a step.
    The order is that of any other number of ranks with as many batches a step. It is meant for a data loader with
    ``batch_size=None``.

    Args:
        lengths: Number of tokens of every row.
        tokens_per_batch: The most tokens of a batch and rank: its rows times the longest of them.
        accumulate: Batches per rank of an optimiser step.

    The other arguments are those of `EpochSampler`.

    Raises:
        DataError: A row is longer than ``tokens_per_batch``, or see `EpochSampler`.

    >>> lengths = [2, 3, 6, 2, 6, 3, 2]
    >>> batches = list(TokenBudgetSampler(lengths, tokens_per_batch=12))
    >>> sorted([sorted(lengths[row] for row in batch) for batch in batches])
    [[2], [2, 2, 3, 3], [6, 6]]
    """

    def __init__(
        self, lengths: Sequence[int] | torch.Tensor, tokens_per_batch: int, num_replicas: int = 1, rank: int = 0,
        seed: int = 0, accumulate: int = 1, numbered: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(len(lengths), num_replicas, rank, seed=seed, numbered=numbered)
        self.lengths = torch.as_tensor(lengths)
        self.batches_per_step = num_replicas * accumulate
        longest = int(self.lengths.max())
        if longest > tokens_per_batch:
            raise DataError(
                f"A row has {longest} tokens, and tokens_per_batch is {tokens_per_batch}. Raise it to {longest} or "
                "more, or cut the rows with a lower max_length."
            )
        self.buckets = self._cut(tokens_per_batch)
        self.num_samples = sum(map(len, self.buckets)) // num_replicas

    def _cut(self, tokens_per_batch: int) -> list[list[int]]:
        """Return the numbers of rows of all batches, bucket by bucket from the longest rows on."""
        descending = self.lengths.sort(descending=True).values.tolist()
        at_once = self.batches_per_step
        steps = max(1, sum(descending) // (tokens_per_batch * at_once * BUCKETS))
        buckets: list[list[int]] = []
        start = 0
        while start < self.rows:
            fitting, left = tokens_per_batch // descending[start], self.rows - start
            batches = at_once * min(steps, math.ceil(left / (fitting * at_once)))
            rows = min(left, batches * fitting)
            # Evenly; and where the last rows don't suffice, one for each batch.
            buckets.append([max(1, rows // batches + (i < rows % batches)) for i in range(batches)])
            start += rows
        return buckets

    def items(self, seen: int) -> Iterator[list[int]]:
        """Return this rank's batches of the epoch, in their order, after a number of them."""
        generator, offset = self.generator(), self._offset
        shuffled = torch.randperm(self.rows, generator=generator)
        order = shuffled[self.lengths[shuffled].argsort(descending=True, stable=True)]
        batches: list[torch.Tensor] = []
        start = 0
        for sizes in self.buckets:
            rows = order[start : start + sum(sizes)]
            start += len(rows)
            mixed = rows[torch.randperm(len(rows), generator=generator)]
            batches += torch.split(mixed[torch.arange(sum(sizes)) % len(rows)], sizes)
        steps = self._biggest_first(batches, generator)
        mine = range(self.rank, self.batches_per_step, self.num_replicas)
        places = (step * self.batches_per_step + place for step in steps for place in mine)
        for place in itertools.islice(places, seen, None):
            yield (batches[place] + offset).tolist()

    def _biggest_first(self, batches: Sequence[torch.Tensor], generator: torch.Generator) -> list[int]:
        """Return the steps in random order, after the ones with the most tokens and with the longest row."""
        longest = torch.stack([self.lengths[batch].max() for batch in batches])
        tokens = longest * torch.tensor([len(batch) for batch in batches])
        biggest = [int(size.argmax()) // self.batches_per_step for size in (tokens, longest)]
        mixed = torch.randperm(len(batches) // self.batches_per_step, generator=generator).tolist()
        return list(dict.fromkeys([*biggest, *mixed]))


def even_batch_size(rows: int, batch_size: int, num_replicas: int) -> int:
    """Return a batch size, at most ``batch_size`` if possible, with which all ranks have equally many batches.

    In evaluation no row is repeated, so ranks may differ by one row. Were that row alone in a last batch, its rank
    would run one step more than the others, and anything gathered in each step would wait forever.

    >>> even_batch_size(rows=64, batch_size=32, num_replicas=2), even_batch_size(rows=65, batch_size=32, num_replicas=2)
    (32, 31)
    """
    fewest, extra = divmod(rows, num_replicas)
    if not extra or not fewest:
        return batch_size
    sizes = [*range(batch_size, 1, -1), fewest + 1]
    size: int = next(size for size in sizes if fewest % size)
    return size
