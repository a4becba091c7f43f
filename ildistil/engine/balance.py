"""Weights as shares: terms of very different size are scaled so that each makes up its share of the total."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from ildistil import distributed
from ildistil.errors import ConfigError
from ildistil.functional.checks import check_count, check_number

__all__ = ["Balance"]

By = Literal["magnitude", "gradient"]


@dataclass
class Balance:
    """Makes weights mean shares of the total, by the size of the terms' values or of their gradients.

    Each term's size ``m`` is measured in training and smoothed; its factor is ``share * sum_j(w_j m_j) / m``, with
    ``share = w / sum_j(w_j)``. So the total is as large as with plain weights, and every term has its share of it.

    What is measured is the mean over the batches of all processes, weighted by what each term counts, so that sizes
    don't depend on how a batch is shared among processes. Of accumulated batches it is the first one of the step.

    Args:
        by: ``"magnitude"``, the absolute value of the term, or ``"gradient"``, the norm of its gradient in the
            student's parameters (one more backward pass for each term, where it is measured).
        every: steps between two measurements.
        momentum: the old size's part in the new one, from 0 to below 1.

    Raises:
        ConfigError: an argument is out of range.
    """

    by: By = "magnitude"
    every: int = 10
    momentum: float = 0.9
    sizes: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    _measured: tuple[int | None, frozenset[str]] = field(default=(None, frozenset()), init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.by, str) or self.by not in get_args(By):
            raise ConfigError(f"Balance: by is 'magnitude' or 'gradient', got {self.by!r:.80}.")
        check_count("Balance: every", self.every)
        check_number("Balance: momentum", self.momentum, "from 0 to below 1", lambda old: 0 <= old < 1)

    def weights(
        self,
        values: Mapping[str, Tensor],
        weights: Mapping[str, float],
        parameters: Sequence[Tensor],
        step: int | None = None,
        measuring: bool = True,
        counts: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Measure, if it is time to, and give the factors of the terms.

        Args:
            values: the terms, with their graph.
            weights: their shares, which need not sum to 1.
            parameters: what gradients are taken with respect to.
            step: number of the optimiser step; all batches of a step get the same factors. ``None``: measure always.
            measuring: false in evaluation; a term that was never measured then has its plain weight.
            counts: how many things each term is a mean of in this process; by default as many as in any other.
        """
        if measuring and self._is_due(values, step):
            for name, value in values.items():
                count = torch.ones(()) if counts is None else counts[name]
                self._note(name, self._size(value, count.to(value.device), parameters))
            self._measured = step, frozenset(values)
        sizes = {name: self.sizes.get(name, torch.zeros(())).to(value.device) for name, value in values.items()}
        # A term of size 0 has nothing to scale: it keeps its plain weight, and the others share the total.
        whole = torch.stack([weights[name] * (size > 0) for name, size in sizes.items()]).sum()
        total = torch.stack([weights[name] * size for name, size in sizes.items()]).sum()
        return {
            name: torch.where(size > 0, weights[name] / whole * total / torch.where(size > 0, size, 1), weights[name])
            for name, size in sizes.items()
        }

    def gradient_shares(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return each term's part of the sum of gradient norms, where these are what is balanced."""
        if self.by != "gradient":
            return {}
        norms = {name: weight * self.sizes.get(name, torch.zeros(())) for name, weight in weights.items()}
        whole = torch.stack(list(norms.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
        return {name: norm / whole for name, norm in norms.items()}

    def state_dict(self) -> dict[str, float]:
        """Return the sizes for a checkpoint."""
        return {name: float(size) for name, size in self.sizes.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take the sizes of a checkpoint."""
        self.sizes = {name: torch.tensor(size) for name, size in state.items()}

    def _is_due(self, values: Mapping[str, Tensor], step: int | None) -> bool:
        if any(name not in self.sizes for name in values) or step is None:
            return True
        return step % self.every == 0 and self._measured != (step, frozenset(values))

    def _size(self, value: Tensor, count: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Return the size of a term over all processes, of which each has the mean over its own part of the batch."""
        found = [value.detach().reshape(1)]
        if self.by == "gradient":
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(gradients, parameters, strict=True)  # unused ones as 0: another process may have used them
            found = [torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs]
        own = torch.cat([each.float() for each in found]) if found else value.new_zeros(1, dtype=torch.float32)
        if distributed.world_size() > 1:
            part = count / distributed.all_reduce_sum(count.float()).clamp(min=1)
            own = distributed.all_reduce_sum(part * own)
        size: Tensor = torch.linalg.vector_norm(own)
        return size

    def _note(self, name: str, size: Tensor) -> None:
        old = self.sizes.get(name, torch.zeros_like(size)).to(size.device)
        # From 0, as of a term that begins later, there is nothing to smooth: it would look too small for long.
        new = torch.where(old > 0, self.momentum * old + (1 - self.momentum) * size, size)
        self.sizes[name] = torch.where(torch.isfinite(new), new, old)
