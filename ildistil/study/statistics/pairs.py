"""Pairing of two systems on what both have."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import finite, listed

__all__ = ["Pairs", "pair"]


@dataclass(frozen=True)
class Pairs:
    """Values of two systems under the same keys, and the keys that only one of them has."""

    keys: tuple[Hashable, ...]
    first: NDArray[Any]
    second: NDArray[Any]
    left_out: tuple[str, ...]

    @property
    def differences(self) -> NDArray[np.float64]:
        """First less second, ``(keys, ...)``."""
        return np.asarray(self.first - self.second)

    def describe(self) -> str:
        """Return the number of pairs, and what is left out."""
        return f"{len(self.keys)} pairs{wording.left_out(self.left_out)}"


def pair(first: Mapping[Any, Any], second: Mapping[Any, Any], least: int = 2) -> Pairs:
    """Pair two systems on the keys that both have, in the first one's order.

    Args:
        first: Key, such as a seed or (task, seed), to score or to a vector of row-wise scores or predictions.
        second: The same of the other system.
        least: Pairs that are needed.

    Raises:
        DataError: Fewer pairs than needed, NaN, or vectors of unequal lengths.

    >>> pairs = pair({0: 80.0, 1: 82.0, 2: 81.0}, {0: 79.0, 2: 79.5, 3: 80.0})
    >>> pairs.differences, pairs.left_out
    (array([1. , 1.5]), ('1 of the first', '3 of the second'))
    """
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        raise DataError("Both systems must be mappings from a key, such as the seed, to a score.")
    keys = [key for key in first if key in second]
    absent = [f"{listed([key])} of the first" for key in first if key not in second]
    absent += [f"{listed([key])} of the second" for key in second if key not in first]
    if len(keys) < least:
        raise DataError(f"At least {least} pairs are needed, got {len(keys)}{wording.left_out(tuple(absent))}.")
    one, other = _stacked([first, second], keys)
    return Pairs(tuple(keys), one, other, tuple(absent))


def _stacked(systems: list[Mapping[Any, Any]], keys: list[Any]) -> list[NDArray[Any]]:
    lengths = {np.shape(system[key]) for system in systems for key in keys}
    if len(lengths) > 1:
        shapes = " and ".join(map(str, sorted(lengths)))
        raise DataError(f"Both systems need the same rows in every pair, got shapes {shapes}. Pair rows by their ids.")
    return [finite([system[key] for key in keys], "scores") for system in systems]
