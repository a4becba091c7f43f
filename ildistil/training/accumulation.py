"""The mean over all examples of an optimiser step, whatever the batches and processes it came in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ildistil import distributed
from ildistil.engine import Terms

__all__ = ["Window", "over_processes"]


def over_processes(terms: Terms) -> Tensor:
    """Return what to differentiate so that Lightning's mean over the processes is the mean over what each term counts.

    For one batch a step: each term is scaled by its count over that of all processes.
    """
    processes = distributed.world_size()
    if processes == 1:
        return terms.total
    counts = terms.count_values()
    factors = counts * processes / distributed.all_reduce_sum(counts).clamp(min=1)
    return terms.sum(dict(zip(terms.counts, factors, strict=True)))


class Window:
    """Makes the mean over the accumulated batches of one optimiser step, of which the later ones' counts are unknown.

    Each batch's terms are scaled by their counts, in units of what a batch counts on average; at the end the gradient
    is divided by the sum of the counts. There is one gradient, so there can be one sum: that of the examples. Where a
    term counts something else (target tokens beside examples), its batches are weighed exactly against each other, and
    its weight against the other terms is off by how far the window differs from the average.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of the counts of all batches before this window, over all processes
        self._batches: dict[str, Tensor] = {}
        self._now: dict[str, list[Tensor]] = {}

    @property
    def waiting(self) -> int:
        """Number of batches that wait for the end of their step."""
        return len(self._now.get("", ()))

    def abandon(self) -> None:
        """Forget the batches of a step that never ended."""
        self._now = {}

    def add(self, terms: Terms) -> Tensor:
        """Note the counts of one batch, and return what to differentiate."""
        counts = {**dict(zip(terms.values, terms.count_values(), strict=True)), "": terms.common_count()}
        if counts.keys() != self._sums.keys():  # other terms: averages of one history, so that equal counts stay equal
            self._sums, self._batches = {}, {}
            self._learn({name: [count] for name, count in counts.items()})
        for name, count in counts.items():
            self._now.setdefault(name, []).append(count)
        return terms.sum({name: count / self._unit(name) for name, count in counts.items() if name})

    def close(self, accumulated: int) -> Tensor:
        """Return the factor that makes Lightning's mean over batches and processes the mean over what was counted."""
        whole = distributed.all_reduce_sum(torch.stack(self._now[""]).sum()).clamp(min=1) / self._unit("")
        self._learn(self._now)
        self._now = {}
        return accumulated * distributed.world_size() / whole

    def state_dict(self) -> dict[str, tuple[float, float]]:
        """Return the averages for a checkpoint: of each term the sum of the counts, and the number of batches."""
        return {name: (float(sum_), float(self._batches[name])) for name, sum_ in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, float]]) -> None:
        """Take the averages of a checkpoint."""
        self._sums = {name: torch.tensor(sum_) for name, (sum_, _) in state.items()}
        self._batches = {name: torch.tensor(batches) for name, (_, batches) in state.items()}

    def _unit(self, name: str) -> Tensor:
        known = torch.where(self._sums[name] > 0, self._sums[name], self._sums[""])
        return (known / self._batches[name]).clamp(min=1)

    def _learn(self, counts: Mapping[str, list[Tensor]]) -> None:
        """Take counts into the average, the same in all processes."""
        seen = torch.stack([torch.stack(own).sum() for own in counts.values()])
        number = torch.stack([seen.new_full((), len(own)) for own in counts.values()])
        whole = distributed.all_reduce_sum(seen), distributed.all_reduce_sum(number)
        for name, sum_, batches in zip(counts, *whole, strict=True):
            self._sums[name] = self._sums.get(name, torch.zeros_like(sum_)).to(sum_) + sum_
            self._batches[name] = self._batches.get(name, torch.zeros_like(batches)).to(batches) + batches
