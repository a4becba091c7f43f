"""Layer mappings: which student layer learns from which teacher layer.

Layers are numbered ``1..L``. ``0`` is the embedding output (hidden states only); negative numbers count from the end,
so ``-1`` is the last layer. A mapping is a rule ``(student depth, teacher depth) -> [(student layer, teacher layer)]``;
subclass :class:`LayerMapping` to add one.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar, Protocol

from ildistil.errors import ConfigError

__all__ = [
    "All", "Explicit", "First", "FromInit", "Last", "LayerMapping", "Random", "Skip", "Uniform", "UniformConsecutive",
    "UniformLast",
]  # fmt: skip

Pairs = list[tuple[int, int]]


class Depth(Protocol):
    """What a mapping asks of a model: its number of layers, and the teacher layers that it was initialised from."""

    @property
    def depth(self) -> int:
        """Number of layers."""

    @property
    def init_layers(self) -> tuple[int, ...] | None:
        """Teacher layers that a student was initialised from; ``None`` if it doesn't say."""


class LayerMapping(ABC):
    """A rule from the depths of both models to (student layer, teacher layer) pairs."""

    draws: ClassVar[bool] = False  # anew at every step

    def at(self, step: int) -> "LayerMapping":
        """Return the rule for an optimiser step; itself unless it draws layers."""
        return self

    def drawable(self, student: int, teacher: int) -> Pairs:
        """Return every pair that some step may draw; of models of these depths, all pairs by default."""
        return [(s, t) for s in range(1, student + 1) for t in range(1, teacher + 1)]

    @abstractmethod
    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return the pairs for a student of depth ``student`` and a teacher of depth ``teacher``."""

    def pairs(self, student: Depth, teacher: Depth, lowest: int = 1) -> Pairs:
        """Return the checked pairs for two models, negative numbers resolved.

        Args:
            student: info of the student.
            teacher: info of the teacher.
            lowest: the first valid layer number: 0 where the embedding output counts, else 1.

        Returns:
            The (student layer, teacher layer) pairs, in the order of the rule.

        Raises:
            ConfigError: a model has no layers; a pair isn't two integers, is out of range, or occurs twice; or
                there is no pair at all.
        """
        for role, depth in (("student", student.depth), ("teacher", teacher.depth)):
            if depth < 1:
                raise ConfigError(f"{self}: the {role} has no layers to map.")
        pairs = [
            (_resolve(s, student.depth, "student", lowest, self), _resolve(t, teacher.depth, "teacher", lowest, self))
            for s, t in _checked(self.raw_pairs(student, teacher), str(self))
        ]
        if not pairs:
            raise ConfigError(
                f"{self} gives no pair of layers for {student.depth} student and {teacher.depth} teacher layers."
            )
        if len(set(pairs)) < len(pairs):
            raise ConfigError(f"{self} gives a pair of layers more than once: {pairs}. Name each pair once.")
        return pairs

    def raw_pairs(self, student: Depth, teacher: Depth) -> Pairs:
        """Return the unchecked pairs; override where depths alone don't decide."""
        return self(student.depth, teacher.depth)


def _checked(pairs: Any, mapping: str) -> Pairs:
    """Return pairs of integers: 4.0 would name another layer's projection than 4, and True is no layer."""
    found = [tuple(pair) if isinstance(pair, Sequence) else pair for pair in pairs]
    for pair in found:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(_is_integer, pair))):
            raise ConfigError(
                f"{mapping}: expected pairs [student layer, teacher layer] of integers such as [[1, 4], [2, 8]], "
                f"got {pair!r}."
            )
    return [(int(s), int(t)) for s, t in found]


def _is_integer(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _resolve(layer: int, depth: int, role: str, lowest: int, mapping: LayerMapping) -> int:
    resolved = layer + depth + 1 if layer < 0 else layer
    if lowest <= resolved <= depth:
        return resolved
    zero = " (0 is the embedding output, which only hidden states have)" if resolved == 0 and lowest == 1 else ""
    raise ConfigError(
        f"{mapping}: {role} layer {layer} is out of range{zero}; the {role} has layers {lowest}..{depth}, "
        f"or -1..{-depth} counted from the end."
    )


@dataclass(frozen=True)
class Uniform(LayerMapping):
    """Spread the student evenly over the teacher: layer ``i`` of ``S`` learns from layer ``ceil(i T / S)`` of ``T``.

    The last layers always meet. Source: Jiao et al., "TinyBERT", 2020.

    >>> Uniform()(3, 12)
    [(1, 4), (2, 8), (3, 12)]
    """

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return one pair for each student layer."""
        return [(i, -(-i * teacher // student)) for i in range(1, student + 1)]


@dataclass(frozen=True)
class Last(LayerMapping):
    """Pair the last ``count`` layers, counted from the end.

    ``count = 1`` is the rule of Wang et al., "MiniLM", 2020.

    Args:
        count: how many layers, at least 1.

    Raises:
        ConfigError: ``count`` is no integer >= 1.

    >>> Last()(3, 12)
    [(3, 12)]
    >>> Last(2)(3, 12)
    [(2, 11), (3, 12)]
    """

    count: int = 1

    def __post_init__(self) -> None:
        _check_least(self, "count", self.count)

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return ``count`` pairs.

        Raises:
            ConfigError: there aren't as many layers, the embedding output counted: -1 would be the last one again.
        """
        if self.count > min(student, teacher) + 1:
            raise ConfigError(
                f"Last: count={self.count!r:.40} is out of range, of {student} student and {teacher} teacher layers."
            )
        return [(student - k, teacher - k) for k in reversed(range(self.count))]


@dataclass(frozen=True)
class First(LayerMapping):
    """Pair layer ``i`` with layer ``i``, for the first ``count`` layers (all of the student's by default).

    Args:
        count: how many layers, at least 1.

    Raises:
        ConfigError: ``count`` is no integer >= 1.

    >>> First()(3, 12)
    [(1, 1), (2, 2), (3, 3)]
    """

    count: int | None = None

    def __post_init__(self) -> None:
        if self.count is not None:
            _check_least(self, "count", self.count)

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return ``count`` pairs."""
        count = min(self.count or student, student + 1)  # one beyond the last layer is enough to be refused
        return [(i, i) for i in range(1, count + 1)]


def _check_least(mapping: LayerMapping, name: str, value: int, least: int = 1) -> None:
    if not _is_integer(value) or value < least:
        raise ConfigError(
            f"{type(mapping).__name__}: {name} must be an integer and must be at least {least}, got {value!r}."
        )


@dataclass(frozen=True)
class Skip(LayerMapping):
    """Layer ``i`` learns from layer ``every * i``, as far as the teacher goes; the last student layer is left out.

    The default ``every`` is the teacher's depth over the student's, rounded down. The last student layer is left out
    whatever ``every`` is: the terms on the prediction teach it. Source: Sun et al., "Patient Knowledge Distillation",
    2019 (PKD-skip).

    Args:
        every: distance between two teacher layers, at least 1.

    Raises:
        ConfigError: ``every`` is no integer >= 1.

    >>> Skip()(6, 12)
    [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]
    >>> Skip(5)(6, 12)
    [(1, 5), (2, 10)]
    """

    every: int | None = None

    def __post_init__(self) -> None:
        if self.every is not None:
            _check_least(self, "every", self.every)

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return one pair for each student layer but the last."""
        every = self.every or max(1, teacher // student)
        return [(i, every * i) for i in range(1, student) if every * i <= teacher]


@dataclass(frozen=True)
class UniformConsecutive(LayerMapping):
    """Cut the teacher into consecutive blocks, one per student layer, which learns from every layer of its block.

    The block of layer ``i`` ends where ``Uniform`` points, so blocks differ by one layer at most.

    >>> UniformConsecutive()(2, 4)
    [(1, 1), (1, 2), (2, 3), (2, 4)]
    """

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return one pair for each teacher layer."""
        return [(i, t) for i, block in enumerate(_blocks(student, teacher), start=1) for t in block]


@dataclass(frozen=True)
class UniformLast(LayerMapping):
    """Learn from the first layer of each block of ``UniformConsecutive``; the last layers meet too.

    >>> UniformLast()(3, 12)
    [(1, 1), (2, 5), (3, 9), (3, 12)]
    """

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return one pair for each student layer, and one for the last of both."""
        pairs = [(i, block[0]) for i, block in enumerate(_blocks(student, teacher), start=1)]
        last = (student, teacher)
        return pairs if last in pairs else [*pairs, last]


def _blocks(student: int, teacher: int) -> list[range]:
    ends = [0, *(t for _, t in Uniform()(student, teacher))]
    # A student deeper than the teacher: a block holds one layer at least, which neighbours then share.
    return [range(min(before + 1, end), end + 1) for before, end in pairwise(ends)]


@dataclass(frozen=True)
class All(LayerMapping):
    """Every student layer learns from every teacher layer.

    >>> All()(2, 2)
    [(1, 1), (1, 2), (2, 1), (2, 2)]
    """

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return all pairs."""
        return [(s, t) for s in range(1, student + 1) for t in range(1, teacher + 1)]


@dataclass(frozen=True)
class Explicit(LayerMapping):
    """Pairs as listed; many-to-one and one-to-many are fine.

    Args:
        layers: pairs ``[student layer, teacher layer]``, at least one; negative numbers count from the end.

    Raises:
        ConfigError: there is no pair, or one isn't two integers.

    >>> Explicit([[1, 4], [-1, -1]])(3, 12)
    [(1, 4), (-1, -1)]
    """

    layers: Sequence[Sequence[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        pairs = _checked(self.layers if isinstance(self.layers, Sequence) else [self.layers], "Explicit")
        if not pairs:
            raise ConfigError(
                "Explicit: expected pairs [student layer, teacher layer] such as [[1, 4], [2, 8]], got none."
            )
        object.__setattr__(self, "layers", pairs)  # a copy: the caller's list may change

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return the pairs as they were listed."""
        return [(s, t) for s, t in self.layers]


@dataclass(frozen=True)
class FromInit(LayerMapping):
    """Each student layer learns from the teacher layer whose weights it started from.

    Needs a student made by ``init_student(teacher, layers=[...])``. This is what the text of Wang et al., "How to
    Distill your BERT", 2023, describes.
    """

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Raise: depths alone don't say where the student started, see :meth:`raw_pairs`."""
        raise ConfigError("FromInit needs the student's record of its initialisation; call pairs(student, teacher).")

    def raw_pairs(self, student: Depth, teacher: Depth) -> Pairs:
        """Return the layers that the student was initialised from.

        Raises:
            ConfigError: the student doesn't say.
        """
        if student.init_layers is None:
            raise ConfigError(
                "FromInit: this student does not say which teacher layers it was initialised from. Make it with "
                "init_student(teacher, layers=[...]), or name the pairs with Explicit."
            )
        return list(enumerate(student.init_layers, start=1))


@dataclass(frozen=True)
class Random(LayerMapping):
    """Each student layer learns from a teacher layer drawn anew at every step, in ascending order.

    Every choice of as many teacher layers as the student has is equally likely. The draw depends on seed and step only:
    it is the same in all processes and after resuming. Source: Haidar et al., "RAIL-KD", 2022, who draw at every epoch.

    Args:
        seed: of the draws, an integer >= 0.
        step: the optimiser step whose draw this is; see :meth:`at`.

    Raises:
        ConfigError: a number is no integer, or negative.

    >>> Random()(3, 12)
    [(1, 3), (2, 5), (3, 6)]
    >>> Random().at(step=1)(3, 12)
    [(1, 3), (2, 4), (3, 9)]
    """

    seed: int = 0
    step: int = field(default=0, repr=False)
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_least(self, "seed", self.seed, least=0)
        _check_least(self, "step", self.step, least=0)

    def at(self, step: int) -> LayerMapping:
        """Return the draw of a step."""
        return replace(self, step=step)

    def drawable(self, student: int, teacher: int) -> Pairs:
        """Return the pairs that leave enough teacher layers before and behind."""
        return [(s, t) for s in range(1, student + 1) for t in range(s, teacher - student + s + 1)]

    def __call__(self, student: int, teacher: int) -> Pairs:
        """Return one pair for each student layer.

        Raises:
            ConfigError: the teacher has fewer layers than the student.
        """
        if student > teacher:
            raise ConfigError(f"Random: the student has {student} layers, the teacher only {teacher} to draw from.")
        drawn = random.Random(f"{self.seed} {self.step}").sample(range(1, teacher + 1), student)
        return list(enumerate(sorted(drawn), start=1))
