"""What every objective is: taps in, one weighted scalar out."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar
from weakref import ref

from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ildistil.capture import Activations, Sizes, Tap
from ildistil.mappings import LayerMapping, Pairs, Uniform

__all__ = ["LayerObjective", "Objective", "ObjectiveError"]

_LAYERED = {"hidden": 0, "attention": 1}  # the lowest layer number of each
_ONE_LAYER = re.compile(r"(hidden|attention)\[(-?\d+)\]")


class ObjectiveError(ValueError):
    """An objective can't work with these two models."""


class Objective(Callback, ABC):
    """One weighted term of the loss, passed to the Trainer as a callback.

    The callback is passive: the engine asks it for its loss inside the training step. A subclass says what it reads
    (``taps``), what it learns (:meth:`build`) and what it costs (:meth:`loss`).

    Args:
        weight: factor of the term, finite and not negative.
        name: key of the term in logs and checkpoints; by default the class name in snake case. Two objectives of one
            class need different names.

    Attributes:
        taps: what is read of both models: ``"hidden"`` and ``"attention"`` (every layer), ``"hidden[-1]"`` (one
            layer), ``"logits"``, ``"loss"``, or the path of a module.
        teacher_taps: what is read of the teacher, where that differs; ``()`` for a term that needs no teacher.
        projections: learnable parts, made in :meth:`build`; trained and resumed, never exported.
    """

    taps: ClassVar[tuple[str, ...]] = ()
    teacher_taps: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight >= 0):
            raise ObjectiveError(f"{type(self).__name__}: weight must be a finite number >= 0, got {weight!r}.")
        self.weight = weight
        self.name = _snake_case(type(self).__name__) if name is None else name
        self.projections = nn.ModuleDict()
        self._owner: ref[object] | None = None

    def claim(self, engine: object | None) -> None:
        """Note which engine uses this objective; its pairs and projections belong to one pair of models.

        Raises:
            ObjectiveError: another engine uses it.
        """
        owner = self._owner() if self._owner is not None else None
        if engine is not None and owner is not None and owner is not engine:
            raise ObjectiveError(
                f"The objective {self.name} is in use by another pair of models, and its projections belong to them. "
                "Make a new one for each."
            )
        self._owner = None if engine is None else ref(engine)

    @property
    def state_key(self) -> str:
        """Identify the callback by its name, so that several of one class can coexist."""
        return f"ildistil.{self.name}"

    @property
    def needs_teacher(self) -> bool:
        """Tell whether the teacher has to run for this term."""
        return bool(self.taps if self.teacher_taps is None else self.teacher_taps)

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Check the sizes of both models and make the projections; called once, before training.

        Raises:
            ObjectiveError: the objective can't work with these models; the message names the remedy.
        """

    @abstractmethod
    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the unweighted term, a scalar: the mean over examples of a per-example mean."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Have a Distiller leave its models as they came, which it can't notice by itself."""
        give_back = getattr(pl_module, "give_back", None)
        if give_back is not None:
            give_back()

    def student_wants(self, student: Sizes) -> set[Tap]:
        """Resolve ``taps`` for the student."""
        return _expand(self.taps, student)

    def teacher_wants(self, teacher: Sizes) -> set[Tap]:
        """Resolve ``teacher_taps`` (or ``taps``) for the teacher."""
        return _expand(self.taps if self.teacher_taps is None else self.teacher_taps, teacher)

    def describe(self) -> str:
        """Say in the plan which layers are compared."""
        return ", ".join(self.taps)


class LayerObjective(Objective):
    """An objective on pairs of layers: the mean over the pairs of :meth:`pair_loss`.

    Args:
        weight: see :class:`Objective`.
        mapping: which student layer learns from which teacher layer.
        name: see :class:`Objective`.
    """

    def __init__(self, weight: float = 1.0, mapping: LayerMapping | None = None, name: str | None = None) -> None:
        super().__init__(weight, name)
        if mapping is not None and not isinstance(mapping, LayerMapping):
            raise ObjectiveError(
                f"{type(self).__name__}: mapping must be a LayerMapping, such as mappings.Uniform() or "
                f"mappings.Explicit([[1, 4], [2, 8]]); got {mapping!r}."
            )
        self.mapping = Uniform() if mapping is None else mapping
        self.pairs: Pairs = []

    def build(self, student: Sizes, teacher: Sizes) -> None:
        """Resolve the mapping for these two models."""
        self.pairs = self.mapping.pairs(student, teacher, lowest=_LAYERED[self.taps[0]])

    @abstractmethod
    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Give the scalar loss of one (student layer, teacher layer) pair."""

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean over the pairs."""
        losses = [self.pair_loss(pair, student, teacher) for pair in self.pairs]
        return sum(losses[1:], start=losses[0]) / len(losses)

    def student_wants(self, student: Sizes) -> set[Tap]:
        """Only the mapped layers."""
        return {Tap(self.taps[0], s) for s, _ in self.pairs}

    def teacher_wants(self, teacher: Sizes) -> set[Tap]:
        """Only the mapped layers."""
        return {Tap(self.taps[0], t) for _, t in self.pairs}

    def describe(self) -> str:
        """Give the pairs, student layer first."""
        return " ".join(f"{s}<-{t}" for s, t in self.pairs)


def same_tokens(student: Tensor, teacher: Tensor, axis: int) -> None:
    """Refuse states of different sequences: they can't be compared position by position."""
    if student.shape[0] != teacher.shape[0] or student.shape[axis] != teacher.shape[axis]:
        raise ObjectiveError(
            f"The student saw {student.shape[axis]} tokens of {student.shape[0]} examples, the teacher "
            f"{teacher.shape[axis]} of {teacher.shape[0]}. Both must read the same tokens."
        )


def _expand(taps: tuple[str, ...], sizes: Sizes) -> set[Tap]:
    wanted: set[Tap] = set()
    for tap in taps:
        if tap in _LAYERED:
            wanted |= {Tap(tap, layer) for layer in range(_LAYERED[tap], sizes.depth + 1)}
        elif one := _ONE_LAYER.fullmatch(tap):
            name, layer = one[1], int(one[2])
            number = layer + sizes.depth + 1 if layer < 0 else layer
            if not _LAYERED[name] <= number <= sizes.depth:
                raise ObjectiveError(
                    f"Tap {tap!r} is out of range: the model has layers {_LAYERED[name]}..{sizes.depth}."
                )
            wanted.add(Tap(name, number))
        else:
            wanted.add(Tap(tap))
    return wanted


def _snake_case(name: str) -> str:
    """Turn a class name into a term's name.

    >>> [_snake_case(n) for n in ("AttentionKL", "HiddenMSE", "TaskLoss", "LogitsKL")]
    ['attention_kl', 'hidden_mse', 'task_loss', 'logits_kl']
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
