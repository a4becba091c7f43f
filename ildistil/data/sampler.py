"""The order of rows in an epoch: shuffled, grouped by length, and a function of (seed, epoch) only.

All samplers are `DistributedSampler`, also for one process: Lightning leaves those alone and tells them the epoch. Any
other sampler it wraps and reshuffles under ddp, and a custom batch sampler it refuses there. So what makes whole
batches here is no batch sampler either, but the sampler of a data loader with ``batch_size=None``.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data.distributed import DistributedSampler

from ildistil.errors import DataError

# Rows are sorted by length within this many batches: enough for little padding (measured at 32 rows a batch: 4.6 % of
# what the model processes on SST-2, against 67 % in random batches), few enough for epochs that differ.
BATCHES_PER_CHUNK = 50
# Rows of like length are shuffled among the batches of a bucket: few buckets make epochs differ, many save padding
# (measured on SST-2 at 4,096 tokens a batch: 6.4 % with 20 buckets, 4.2 % with 30, 2.6 % with 50).
BUCKETS = 30


class EpochSampler(DistributedSampler[int]):
    """Rows in an order that depends on the seed and the epoch only; no process group is needed.

    Rank ``r`` takes every ``num_replicas``-th row, from the ``r``-th on. For training the order is repeated from its
    start until it divides evenly (at most ``num_replicas - 1`` rows are seen twice), so that all ranks have batches of
    the same size. For evaluation nothing is repeated, and every epoch has the same order.

    Args:
        rows: Number of rows.
        num_replicas: Number of processes that share the rows.
        rank: Number of this process, from 0.
        shuffle: Shuffle; otherwise the rows come in the file's order.
        seed: Seed of the order, not negative.
        evaluation: Repeat nothing and ignore the epoch.

    Raises:
        DataError: There is no row, the seed is negative, or the rank does not exist.

    >>> sampler = EpochSampler(5, shuffle=False, num_replicas=2, rank=1)
    >>> list(sampler), list(EpochSampler(5, shuffle=False, num_replicas=2, rank=1, evaluation=True))
    ([1, 3, 0], [1, 3])
    """

    def __init__(
        self, rows: int, num_replicas: int = 1, rank: int = 0, shuffle: bool = True, seed: int = 0,
        evaluation: bool = False,
    ) -> None:  # fmt: skip
        if seed < 0:
            raise DataError(f"The seed of the order of rows is {seed}; it must not be negative.")
        if rows < 1 or not 0 <= rank < num_replicas:
            raise DataError(f"There is no share {rank} of {rows} rows among {num_replicas} processes, counted from 0.")
        # The base class only asks a data set for its length.
        super().__init__(range(rows), num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.rows = rows
        self.evaluation = evaluation
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

    def order(self) -> torch.Tensor:
        """Return all row numbers in this epoch's order, before they are shared among the ranks."""
        return torch.randperm(self.rows, generator=self.generator()) if self.shuffle else torch.arange(self.rows)

    def generator(self) -> torch.Generator:
        """Return a generator seeded from (seed, epoch); seed + epoch would give seed 1 the epochs of seed 0 again."""
        epoch = 0 if self.evaluation else self.epoch
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that nothing happens before the first row is asked for: a loader may open two and use one.
        seen, self._seen = self._seen, 0
        yield from itertools.islice(self.items(), seen, None)

    def items(self) -> Iterator[Any]:
        """Return this rank's rows of the epoch, in their order."""
        # resize repeats the order from its start, and changes nothing in evaluation.
        order = np.resize(self.order().numpy(), self.total_size)
        return iter(order[self.rank :: self.num_replicas].tolist())


class LengthGroupedSampler(EpochSampler):
    """Batches of rows of similar length, over all ranks, in random order.

    The rows are shuffled, cut into chunks of 50 batches, sorted by length within a chunk, cut into batches, and the
    batches are shuffled. The batch with the longest row comes first, so that a lack of memory shows at once. An
    incomplete batch comes last.

    Args:
        lengths: Number of tokens of every row.
        batch_size: Rows per batch and rank; must be the data loader's.

    The other arguments, and what is raised, are those of `EpochSampler`.

    >>> lengths = [3, 9, 3, 9, 3, 9, 3]
    >>> [lengths[row] for row in LengthGroupedSampler(lengths, batch_size=3)]
    [9, 9, 9, 3, 3, 3, 3]
    """

    def __init__(
        self, lengths: Sequence[int] | torch.Tensor, batch_size: int, num_replicas: int = 1, rank: int = 0,
        seed: int = 0, evaluation: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(len(lengths), num_replicas, rank, seed=seed, evaluation=evaluation)
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1.")
        self.lengths = torch.as_tensor(lengths)
        self.global_batch = batch_size * num_replicas

    def order(self) -> torch.Tensor:
        """Return all row numbers in this epoch's order, before they are shared among the ranks."""
        generator = self.generator()
        shuffled = torch.randperm(self.rows, generator=generator)
        chunks = torch.split(shuffled, BATCHES_PER_CHUNK * self.global_batch)
        order = torch.cat([chunk[self.lengths[chunk].argsort(descending=True, stable=True)] for chunk in chunks])
        whole = self.rows - self.rows % self.global_batch
        batches = order[:whole].view(-1, self.global_batch)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        return torch.cat([self._longest_first(batches).flatten(), order[whole:]])

    def _longest_first(self, batches: torch.Tensor) -> torch.Tensor:
        if len(batches) == 0:
            return batches
        longest = int(self.lengths[batches].amax(dim=1).argmax())
        return torch.cat([batches[longest : longest + 1], batches[:longest], batches[longest + 1 :]])


class TokenBudgetSampler(EpochSampler):
    """Whole batches, of as many rows of similar length as a number of tokens allows, padding included.

    The rows are sorted by length, those of one length in random order, and cut into about 30 buckets. A bucket holds
    ``n = tokens_per_batch // longest row`` rows for each of its batches, and equally many batches for every rank; its
    rows are shuffled and dealt to them. The cuts depend on the lengths only, so that every epoch has the same number of
    batches, and in a step the batches of all ranks are of one bucket. The steps come in random order; those with the
    most tokens and with the longest row come first, so that a lack of memory shows at once.

    Every row is seen once, but for at most ``num_replicas - 1`` rows that are seen twice where the last rows are fewer
    than the ranks. It is meant for a data loader with ``batch_size=None``.

    Args:
        lengths: Number of tokens of every row.
        tokens_per_batch: The most tokens of a batch and rank: its rows times the longest of them.

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
        seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(len(lengths), num_replicas, rank, seed=seed)
        self.lengths = torch.as_tensor(lengths)
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
        steps = max(1, sum(descending) // (tokens_per_batch * self.num_replicas * BUCKETS))
        buckets: list[list[int]] = []
        start = 0
        while start < self.rows:
            fitting, left = tokens_per_batch // descending[start], self.rows - start
            batches = self.num_replicas * min(steps, math.ceil(left / (fitting * self.num_replicas)))
            rows = min(left, batches * fitting)
            # Evenly; and where the last rows don't suffice, one for each batch.
            buckets.append([max(1, rows // batches + (i < rows % batches)) for i in range(batches)])
            start += rows
        return buckets

    def items(self) -> Iterator[list[int]]:
        """Return this rank's batches of the epoch, in their order."""
        generator = self.generator()
        shuffled = torch.randperm(self.rows, generator=generator)
        order = shuffled[self.lengths[shuffled].argsort(descending=True, stable=True)]
        batches: list[torch.Tensor] = []
        start = 0
        for sizes in self.buckets:
            rows = order[start : start + sum(sizes)]
            start += len(rows)
            mixed = rows[torch.randperm(len(rows), generator=generator)]
            batches += torch.split(mixed[torch.arange(sum(sizes)) % len(rows)], sizes)
        for step in self._biggest_first(batches, generator):
            yield batches[step * self.num_replicas + self.rank].tolist()

    def _biggest_first(self, batches: Sequence[torch.Tensor], generator: torch.Generator) -> list[int]:
        """Return the steps in random order, after the ones with the most tokens and with the longest row."""
        longest = torch.stack([self.lengths[batch].max() for batch in batches])
        tokens = longest * torch.tensor([len(batch) for batch in batches])
        biggest = [int(size.argmax()) // self.num_replicas for size in (tokens, longest)]
        mixed = torch.randperm(self.num_samples, generator=generator).tolist()
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
