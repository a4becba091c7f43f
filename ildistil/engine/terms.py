"""The terms of one step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ildistil.objectives import Count


@dataclass
class Terms:
    """The terms of one step.

    ``values`` are unweighted, ``total`` is ``sum(weight * value)``; ``counts`` are what each value is a mean of;
    ``gradients`` holds the share of each term's gradient norm, where these are balanced. Not frozen: Fabric converts
    what a module returns.
    """

    values: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    counts: dict[str, Count]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def total(self) -> Tensor:
        """The weighted sum, to call ``backward()`` on."""
        return self.sum({})

    def sum(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Return ``sum(factor * weight * value)``; a factor that isn't given is 1."""
        weighted = [self.weights[name] * value * factors.get(name, 1.0) for name, value in self.values.items()]
        return sum(weighted[1:], start=weighted[0])

    def count_values(self) -> Tensor:
        """Stack the numbers of the counts in the terms' order, at least in float32."""
        dtypes = {name: torch.promote_types(value.dtype, torch.float32) for name, value in self.values.items()}
        return torch.stack([self.counts[name].number.to(dtype) for name, dtype in dtypes.items()])

    def common_count(self) -> Tensor:
        """Return what the whole is a mean of: examples, or target tokens where no term counts examples."""
        counts = dict(zip(self.values, self.count_values(), strict=True))
        examples = [count for name, count in counts.items() if self.counts[name].unit == "examples"]
        return torch.stack(examples or list(counts.values())).max()

    def shares(self) -> dict[str, Tensor]:
        """Return each term's share of the total: ``|weight * value| / sum``; detached."""
        sizes = {name: (self.weights[name] * value.detach()).abs() for name, value in self.values.items()}
        whole = torch.stack(list(sizes.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
        return {name: size / whole for name, size in sizes.items()}

    def logs(self, prefix: str) -> dict[str, Tensor]:
        """Return what to log: the total, every term unweighted, and with several terms their shares; detached."""
        logs = {f"{prefix}/loss": self.total.detach()}
        logs |= {f"{prefix}/{name}": value.detach() for name, value in self.values.items()}
        if len(self.values) > 1:
            logs |= {f"{prefix}/share/{name}": share for name, share in self.shares().items()}
            logs |= {f"{prefix}/gradient_share/{name}": share for name, share in self.gradients.items()}
        return logs
