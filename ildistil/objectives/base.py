"""What every objective is: taps in, one weighted scalar out."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar, Literal, NamedTuple
from weakref import ref

from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ildistil.capture import Activations, ModelInfo, Role, Tap
from ildistil.errors import ObjectiveError
from ildistil.schedules import HEAVIEST, Schedule
from ildistil.stages import Step

Weight = float | Schedule

LOWEST = {"hidden": 0, "attention": 1}  # layer number
_ONE_LAYER = re.compile(r"(hidden|attention)\[(-?\d+)\]")


class Count(NamedTuple):
    """How many things a term is the mean of.

    Attributes:
        number: a scalar.
        unit: what they are: ``"examples"``, or the target ``"tokens"`` of a language model.
    """

    number: Tensor
    unit: Literal["examples", "tokens"] = "examples"


class Objective(Callback, ABC):
    """One weighted term of the loss, passed to the Trainer as a callback.

    The callback is passive: the engine asks it for its loss inside the training step. A subclass says what it reads
    (``taps``, or :meth:`reads`), what it learns (:meth:`build`) and what it costs (:meth:`loss`).

    Args:
        weight: factor of the term, a finite number that is not negative, or a schedule over the progress of training.
            While it is 0 the term is neither computed nor captured.
        name: key of the term in logs and checkpoints; by default the class name in snake case. Two objectives of one
            class need different names.

    Attributes:
        taps: what is read of both models: ``"hidden"`` and ``"attention"`` (every layer), ``"hidden[-1]"`` (one
            layer), ``"logits"``, ``"loss"``, or the path of a module.
        teacher_taps: what is read of the teacher, where that differs; ``()`` for a term that needs no teacher.
        projections: learnable parts, made in :meth:`build`; trained and resumed, never exported.
        batch_coupled: true where the examples of a batch are compared with each other. Such a term sums over the
            batches of all processes (see :mod:`ildistil.distributed`) and can't be accumulated over several batches.
    """

    taps: ClassVar[tuple[str, ...]] = ()
    teacher_taps: ClassVar[tuple[str, ...] | None] = None
    batch_coupled: bool = False

    def __init__(self, weight: Weight = 1.0, name: str | None = None) -> None:
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not isinstance(weight, Schedule) and not (number and 0 <= weight <= HEAVIEST):
            raise ObjectiveError(
                f"{type(self).__name__}: weight must be a finite number >= 0 or a schedule, and at most "
                f"{HEAVIEST:g}; got {weight!r:.80}."
            )
        if not isinstance(name, str | None):
            raise ObjectiveError(f"{type(self).__name__}: name must be a string, got {name!r}.")
        self.weight = weight if isinstance(weight, Schedule) else float(weight)
        self.name = _snake_case(type(self).__name__) if name is None else name
        self.projections = nn.ModuleDict()
        self._owner: ref[object] | None = None

    def bind(self, engine: object | None) -> None:
        """Bind this objective to an engine, or to none; its projections belong to one pair of models.

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
        """Whether the teacher has to answer for this term."""
        return bool(self.taps if self.teacher_taps is None else self.teacher_taps)

    @property
    def may_train_head(self) -> bool:
        """Whether the term may reach what makes the student's logits: it reads more of it than layers."""
        return not self.taps or any(tap not in LOWEST and not _ONE_LAYER.fullmatch(tap) for tap in self.taps)

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Check both models and make the projections; called once, before training.

        Raises:
            ObjectiveError: the objective can't work with these models; the message names the remedy.
        """

    def reads(self, role: Role, info: ModelInfo) -> list[Tap]:
        """Return what :meth:`loss` reads of a model, one tap for each read; by default what ``taps`` names.

        The engine counts the reads: ``activations.hidden.take(layer)`` lets a layer go after its last one.
        """
        taps = self.teacher_taps if role == "teacher" and self.teacher_taps is not None else self.taps
        return _expand(taps, info)

    def may_read(self, role: Role, info: ModelInfo) -> list[Tap]:
        """Return what :meth:`reads` may name at any step."""
        return self.reads(role, info)

    @abstractmethod
    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Return the unweighted term, a scalar: the mean over examples of a per-example mean."""

    def weight_at(self, progress: float | None) -> float:
        """Return the weight at a progress of training between 0 and 1.

        Raises:
            ObjectiveError: the weight is a schedule, and the progress is not known.
        """
        if not isinstance(self.weight, Schedule):
            return self.weight
        if progress is None:
            raise ObjectiveError(
                f"The weight of {self.name} is a schedule. Say how far training is: "
                "distill(batch, Step(progress=step / steps))."
            )
        return self.weight(progress)

    def begin(self, step: Step) -> None:
        """Prepare for a batch of an optimiser step, such as by drawing layers for the step; repeatable."""

    def learn(self, step: Step) -> None:
        """Learn, as a training step begins, what :meth:`remember` kept of the one before; repeatable."""

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Count:
        """Return what :meth:`loss` is a mean of: the examples with a token, unless a subclass says otherwise.

        With it, means over batches of different sizes, on several processes, become the mean over all.
        """
        return Count(student.mask.any(1).sum())

    def remember(self) -> None:
        """Keep something of a real training step, such as in a memory bank; not called in dry runs."""

    def describe(self) -> str:
        """Return what the plan says of it: which layers are compared."""
        return ", ".join(self.taps)


def same_tokens(student: Tensor, teacher: Tensor, axis: int) -> None:
    """Refuse states of different sequences: they can't be compared position by position."""
    if student.shape[0] != teacher.shape[0] or student.shape[axis] != teacher.shape[axis]:
        raise ObjectiveError(
            f"The student saw {student.shape[axis]} tokens of {student.shape[0]} examples, the teacher "
            f"{teacher.shape[axis]} of {teacher.shape[0]}. Both must read the same tokens."
        )


def _expand(taps: tuple[str, ...], info: ModelInfo) -> list[Tap]:
    wanted: list[Tap] = []
    for tap in taps:
        if tap in LOWEST:
            wanted += [Tap(tap, layer) for layer in range(LOWEST[tap], info.depth + 1)]
        elif one := _ONE_LAYER.fullmatch(tap):
            name, layer = one[1], int(one[2])
            number = layer + info.depth + 1 if layer < 0 else layer
            if not LOWEST[name] <= number <= info.depth:
                raise ObjectiveError(f"Tap {tap!r} is out of range: the model has layers {LOWEST[name]}..{info.depth}.")
            wanted.append(Tap(name, number))
        else:
            wanted.append(Tap(tap))
    return wanted


def _snake_case(name: str) -> str:
    """Turn a class name into a term's name.

    >>> [_snake_case(n) for n in ("AttentionKL", "HiddenMSE", "TaskLoss", "CLSMSE", "CLSContrast")]
    ['attention_kl', 'hidden_mse', 'task_loss', 'cls_mse', 'cls_contrast']
    """
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Z])(?=MSE$)", "_", name).lower()
