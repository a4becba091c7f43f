"""Checks of arguments: what torch would broadcast, convert or compute with silently is refused."""

import math
from collections.abc import Callable, Collection
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ildistil.errors import ConfigError, ObjectiveError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Colder, all probabilities are 0 or 1 in float32; hotter, their differences are lost, and with them the gradient.
_COLDEST, _HOTTEST = 1e-2, 1e3
_MOST = 1e30


class Shapes:
    """The sizes of named dimensions: a name stands for one size, in all tensors that are checked.

    A name that ends in ``?`` stands for its size or for 1, ``1`` for itself.

    >>> states, mask = torch.zeros(2, 3, 4), torch.ones(2, 1, dtype=torch.bool)
    >>> Shapes().floats("batch tokens width", student=states).masks("batch tokens", mask=mask)
    Traceback (most recent call last):
    ildistil.errors.ObjectiveError: mask must be of shape (batch, tokens) = (2, 3), got (2, 1).
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._first: tuple[str, torch.device] | None = None

    def floats(self, dimensions: str, **tensors: Tensor) -> "Shapes":
        """Check tensors of floating-point numbers: their dtype, shape and device."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
                raise ObjectiveError(f"{name} must be a tensor of floating-point numbers, got {_kind(tensor)}.")
            self._check(name, tensor, dimensions)
        return self

    def masks(self, dimensions: str, **tensors: Tensor) -> "Shapes":
        """Check boolean tensors: their dtype, shape and device."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:
                raise ObjectiveError(
                    f"{name} must be a boolean tensor, got {_kind(tensor)}. Convert it by {name}.bool()."
                )
            self._check(name, tensor, dimensions)
        return self

    def _check(self, name: str, tensor: Tensor, dimensions: str) -> None:
        names, sizes = dimensions.split(), self._sizes
        fits = tensor.ndim == len(names)
        for dimension, size in zip(names, tensor.shape, strict=False):
            if dimension == "1" or (size == 1 and dimension[-1] == "?"):
                fits = fits and size == 1
            else:
                fits = fits and sizes.setdefault(dimension.rstrip("?"), size) == size
        if not fits:
            wanted = [str(sizes.get(dimension.rstrip("?"), dimension)) for dimension in names]
            raise ObjectiveError(
                f"{name} must be of shape ({', '.join(names)}) = ({', '.join(wanted)}), got {tuple(tensor.shape)}."
            )
        if self._first is None:
            self._first = name, tensor.device
        elif tensor.device != self._first[1]:
            raise ObjectiveError(
                f"{name} is on {tensor.device}, {self._first[0]} on {self._first[1]}. Move them to one device."
            )


def _kind(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_number(name: str, value: Any, wanted: str, fits: Callable[[float], bool]) -> None:
    """Check a number that is finite, and not so large that float32 overflows.

    >>> check_number("beta", 1.0, "between 0 and 1", lambda beta: 0 < beta < 1)
    Traceback (most recent call last):
    ildistil.errors.ConfigError: beta must be a number between 0 and 1, got 1.0.
    """
    # Fractions are numbers, but none that a tensor can be multiplied by; beyond 1e30 a float32 overflows.
    number = isinstance(value, Real) and not isinstance(value, bool | Fraction)
    if not number or not abs(value) <= _MOST or not fits(float(value)):
        raise ConfigError(f"{name} must be a number {wanted}, got {value!r:.80}.")


def check_temperature(value: Any, name: str = "temperature") -> None:
    """Check a temperature that divides logits or similarities."""
    check_number(name, value, f"between {_COLDEST:g} and {_HOTTEST:g}", lambda t: _COLDEST <= t <= _HOTTEST)


def check_count(name: str, value: Any, least: int = 1, most: float = math.inf) -> None:
    """Check an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        limit = "" if most == math.inf else f" and at most {most:,}"
        raise ConfigError(f"{name} must be an integer >= {least}{limit}, got {value!r:.80}.")


def check_flag(name: str, value: Any) -> None:
    """Check a truth value: any other would silently be one."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r:.80}.")


def check_words(name: str, value: Any, choices: Collection[str]) -> None:
    """Check a list of choices, at least one, each once."""
    words = isinstance(value, list | tuple) and all(isinstance(word, str) and word in choices for word in value)
    if not words or not value or len(set(value)) < len(value):
        known = ", ".join(map(repr, choices))
        raise ConfigError(f"{name} must be a list of any of {known}, each once; got {value!r:.80}.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check the name of a choice."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
