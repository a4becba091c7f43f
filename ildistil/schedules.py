"""Weights that change with the progress of training: a number is the constant one.

Progress runs from 0 to 1 over the training, or over the stage in which a term is active.
"""

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any

from ildistil.errors import ConfigError

__all__ = ["Cosine", "Linear", "Schedule", "Window"]

#: A larger weight is no weight: float32 would overflow.
HEAVIEST = 1e30


class Schedule(ABC):
    """A weight as a function of progress."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the weight at a progress between 0 and 1; finite and not negative."""


def has_schedules(objectives: Mapping[str, Any]) -> bool:
    """Return whether the weight of one of the objectives changes over the training; for other rooms."""
    return any(isinstance(objective.weight, Schedule) for objective in objectives.values())


@dataclass(frozen=True)
class _Ramp(Schedule):
    """From one weight to another.

    Args:
        start: weight up to ``begin``.
        end: weight from ``until`` on.
        begin: progress at which the change begins.
        until: progress at which it is over.
    """

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _check(self, (self.start, self.end), self.begin, self.until)

    def __str__(self) -> str:
        return f"{type(self).__name__} {self.start:g} to {self.end:g}{_span(self.begin, self.until)}"

    def __call__(self, progress: float) -> float:
        done = min(1.0, max(0.0, (progress - self.begin) / (self.until - self.begin)))
        risen = self.shape(done)
        return (1 - risen) * self.start + risen * self.end  # exact at both ends

    def shape(self, done: float) -> float:
        """Return how much of the change is over, from 0 to 1, like ``done``."""
        return done


class Linear(_Ramp):
    """From the weight ``start`` to the weight ``end`` along a line, between the progress ``begin`` and ``until``.

    Raises:
        ConfigError: a weight is no finite number >= 0, both are 0, or the span isn't within 0 to 1.

    >>> falling = Linear(1.0, 0.0)
    >>> falling(0.0), falling(0.25), falling(1.0)
    (1.0, 0.75, 0.0)
    """


class Cosine(_Ramp):
    """From one weight to another along half a cosine, slow, fast, slow; its arguments are those of :class:`Linear`.

    >>> rising = Cosine(0.0, 2.0, begin=0.5)
    >>> [round(rising(p), 3) for p in (0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.0, 1.0, 2.0]
    """

    def shape(self, done: float) -> float:
        """Return how much of the change is over, from 0 to 1, like ``done``."""
        return 0.5 - 0.5 * math.cos(math.pi * done)


@dataclass(frozen=True)
class Window(Schedule):
    """A constant weight within a span of the training, 0 outside.

    Args:
        weight: the weight from ``begin`` (included) to ``until`` (left out; 1 is the end of training).
        begin: progress at which it begins.
        until: progress at which it ends.

    Raises:
        ConfigError: the weight is no finite number > 0, or the span isn't within 0 to 1.

    >>> early = Window(0.5, until=0.3)
    >>> early(0.0), early(0.29), early(0.3)
    (0.5, 0.5, 0.0)
    """

    weight: float = 1.0
    begin: float = 0.0
    until: float = 1.0

    def __post_init__(self) -> None:
        _check(self, (self.weight,), self.begin, self.until)

    def __str__(self) -> str:
        return f"Window {self.weight:g}{_span(self.begin, self.until)}"

    def __call__(self, progress: float) -> float:
        """Return the weight at a progress between 0 and 1."""
        inside = self.begin <= progress < self.until or progress >= 1.0 == self.until
        return self.weight if inside else 0.0


def _span(begin: float, until: float) -> str:
    return "" if (begin, until) == (0, 1) else f" in {begin:.4g}-{until:.4g}"


def _is_number(value: object) -> bool:
    """Return whether a value is a number of the size of a float."""
    number = isinstance(value, Real) and not isinstance(value, bool | Fraction)
    return number and not (isinstance(value, int) and abs(value) > sys.float_info.max)


def _check(schedule: Schedule, weights: tuple[float, ...], begin: float, until: float) -> None:
    numbers: tuple[object, ...] = (*weights, begin, until)
    if wrong := [number for number in numbers if not _is_number(number)]:
        raise ConfigError(f"{type(schedule).__name__}: weights and shares must be numbers, got {wrong[0]!r:.80}.")
    if not all(0 <= weight <= HEAVIEST for weight in weights) or not any(weights):
        raise ConfigError(f"{schedule}: weights must be finite, not negative, at most {HEAVIEST:g}, and not all 0.")
    if not 0 <= begin < until <= 1:
        raise ConfigError(f"{schedule}: begin and until are shares of the training, 0 <= begin < until <= 1.")
