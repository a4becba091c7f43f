"""Internal: what the statistics refuse."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ildistil.errors import ConfigError, DataError

__all__ = ["at_least", "check_draws", "check_level", "finite", "listed", "vector"]

Floats = NDArray[np.float64]


def finite(values: ArrayLike, what: str) -> Floats:
    """Return the values as float64.

    Raises:
        DataError: They are no numbers, or some are NaN or infinite.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} must be numbers in rows of one length ({error}).") from error
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise DataError(
            f"{bad.size} of {array.size} {what} are NaN or infinite, first at position {bad[0]}. "
            "Leave out the runs that failed, and name them as missing."
        )
    return array


def vector(values: ArrayLike, what: str, least: int = 2) -> Floats:
    """Return finite values as a vector of at least ``least``.

    Raises:
        DataError: They are too few, not finite, or not in one dimension.
    """
    array = finite(values, what)
    if array.ndim != 1:
        raise DataError(f"{what} must be in one dimension, got the shape {array.shape}.")
    at_least(array.size, what, least)
    return array


def at_least(number: int, what: str, least: int) -> None:
    """Check a number of things.

    Raises:
        DataError: There are fewer than ``least``.
    """
    if number < least:
        raise DataError(f"At least {least} {what} are needed, got {number}.")


def check_level(level: float) -> None:
    """Check the level of confidence.

    Raises:
        ConfigError: It is no number between 0 and 1.
    """
    if not 0 < level < 1:
        raise ConfigError(f"The level must be between 0 and 1, as in 0.95, got {level}.")


def check_draws(draws: int) -> None:
    """Check the number of random draws.

    Raises:
        ConfigError: There are fewer than 100, from which no quantile can be read.
    """
    if draws < 100:
        raise ConfigError(f"At least 100 draws are needed, got {draws}. Use 10,000 for figures to be reported.")


def listed(names: Sequence[object]) -> str:
    """Return names for a sentence.

    >>> listed(["a", "b", "c"])
    'a, b, c'
    """
    return ", ".join(" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names)
