"""Several comparisons at once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import at_least, finite

__all__ = ["Adjusted", "holm"]


@dataclass(frozen=True)
class Adjusted:
    """A p value among those of a family.

    Attributes:
        p: Adjusted for the family.
        smallest: The smallest adjusted p that the family's tests can give here.
        family: Number of comparisons.
    """

    p: float
    smallest: float
    family: int

    def describe(self, alpha: float = 0.05) -> str:
        """Return the adjusted p in words; and whether the comparison can reach ``alpha`` at all."""
        given = f"{self.family} comparisons of so few pairs"
        return (
            f"{wording.p_value(self.p)}, adjusted for {self.family} comparisons (Holm)"
            f"{wording.unreachable(self.smallest, alpha, given)}"
        )


def holm(p_values: Mapping[str, float], smallest: Mapping[str, float] | None = None) -> dict[str, Adjusted]:
    """Adjust p values, so that all those at most ``alpha`` hold together with an error rate of ``alpha``.

    ``p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j))``, of ``m`` p values in rising order. The comparisons of a
    family are stated before the results are seen.

    Args:
        p_values: Of each comparison, by name.
        smallest: The smallest p that each one's test can give, such as `PairedTest.smallest`.

    Raises:
        DataError: No p values, or some out of [0, 1], or other names in ``smallest``.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.

    >>> {name: adjusted.p for name, adjusted in holm({"a": 0.01, "b": 0.04, "c": 0.03}).items()}
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    at_least(len(p_values), "p values", 1)
    if smallest is not None and set(smallest) != set(p_values):
        odd = ", ".join(sorted(set(smallest) ^ set(p_values)))
        raise DataError(f"p values and their smallest must be of the same comparisons; only one has: {odd}.")
    # The adjustment never falls where a p value rises, so that the smallest p values give the smallest adjusted ones.
    least = _adjusted(smallest) if smallest is not None else dict.fromkeys(p_values, 0.0)
    return {name: Adjusted(p, least[name], len(p_values)) for name, p in _adjusted(p_values).items()}


def _adjusted(p_values: Mapping[str, float]) -> dict[str, float]:
    array = finite(list(p_values.values()), "p values")
    if array.min() < 0 or array.max() > 1:
        raise DataError(f"p values must be between 0 and 1, got {array.min():g} to {array.max():g}.")
    order = np.argsort(array, kind="stable")
    factors = np.arange(array.size, 0, -1)
    adjusted = np.empty_like(array)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, factors * array[order]))
    return dict(zip(p_values, map(float, adjusted), strict=True))
