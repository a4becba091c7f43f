"""What every objective is: taps in, one weighted scalar out."""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, get_args
from weakref import ref

from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ildistil.capture import Activations, ModelInfo, Tap
from ildistil.errors import ObjectiveError
from ildistil.mappings import LayerMapping, Pairs, Uniform
from ildistil.schedules import Schedule

__all__ = ["LayerObjective", "Objective", "Stack", "Weight"]

Weight = float | Schedule
Stack = Literal["encoder", "decoder", "cross"]

_LAYERED = {"hidden": 0, "attention": 1}  # the lowest layer number of each
_ONE_LAYER = re.compile(r"(hidden|attention)\[(-?\d+)\]")


class Objective(Callback, ABC):
    """One weighted term of the loss, passed to the Trainer as a callback.

    The callback is passive: the engine asks it for its loss inside the training step. A subclass says what it reads
    (``taps``), what it learns (:meth:`build`) and what it costs (:meth:`loss`).

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
        counts_tokens: whether :meth:`count` gave target tokens, not examples.
        attention_parts: what is read of the teacher's attention, any of queries, keys and values (``"qkv"``); no more
            is kept, or stored where its targets are (:mod:`ildistil.teachers`).
    """

    taps: ClassVar[tuple[str, ...]] = ()
    teacher_taps: ClassVar[tuple[str, ...] | None] = None
    batch_coupled: bool = False
    counts_tokens: bool = False
    attention_parts: str = "qkv"

    def __init__(self, weight: Weight = 1.0, name: str | None = None) -> None:
        number = isinstance(weight, int | float)
        if not isinstance(weight, Schedule) and not (number and math.isfinite(weight) and weight >= 0):
            raise ObjectiveError(
                f"{type(self).__name__}: weight must be a finite number >= 0 or a schedule, got {weight!r}."
            )
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

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Check the sizes of both models and make the projections; called once, before training.

        Raises:
            ObjectiveError: the objective can't work with these models; the message names the remedy.
        """

    @abstractmethod
    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the unweighted term, a scalar: the mean over examples of a per-example mean."""

    def weight_at(self, progress: float | None) -> float:
        """Give the weight at a progress of training between 0 and 1.

        Raises:
            ObjectiveError: the weight is a schedule, and the progress is not known.
        """
        if not isinstance(self.weight, Schedule):
            return self.weight
        if progress is None:
            raise ObjectiveError(
                f"The weight of {self.name} is a schedule. Say how far training is: "
                "distill(batch, progress=step / steps)."
            )
        return self.weight(progress)

    def begin(self, step: int | None) -> None:
        """Prepare for an optimiser step, such as by drawing layers for it; repeatable.

        Args:
            step: number of the step, the same in all processes and after resuming; ``None`` if nobody says it.
        """

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Tell how many things :meth:`loss` is a mean of: examples with a token, unless a subclass says otherwise.

        With it, means over batches of different sizes, on several processes, become the mean over all.
        """
        return student.mask.any(1).sum()

    def remember(self) -> None:
        """Keep something of a real training step, such as in a memory bank; not called in dry runs."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Have a Distiller leave its models as they came, which it can't notice by itself."""
        give_back = getattr(pl_module, "give_back", None)
        if give_back is not None:
            give_back()

    def student_wants(self, student: ModelInfo) -> set[Tap]:
        """Resolve ``taps`` for the student."""
        return _expand(self.taps, student)

    def teacher_wants(self, teacher: ModelInfo) -> set[Tap]:
        """Resolve ``teacher_taps`` (or ``taps``) for the teacher."""
        return _expand(self.taps if self.teacher_taps is None else self.teacher_taps, teacher)

    def teacher_may_want(self, teacher: ModelInfo) -> set[Tap]:
        """Give what the teacher may be asked for at any step."""
        return self.teacher_wants(teacher)

    def describe(self) -> str:
        """Say in the plan which layers are compared."""
        return ", ".join(self.taps)


class LayerObjective(Objective):
    """An objective on pairs of layers: the mean over the pairs of :meth:`pair_loss`.

    Args:
        weight: see :class:`Objective`.
        mapping: which student layer learns from which teacher layer.
        stack: which layers of an encoder-decoder: ``"encoder"``, ``"decoder"`` or, for attention, ``"cross"``.
        name: see :class:`Objective`.

    Attributes:
        default_mapping: the mapping where none is given.
        one_pair_at_a_time: whether :meth:`pair_loss` reads no other layer of the teacher than the pair's. Each is then
            let go of after its last pair.
    """

    default_mapping: ClassVar[LayerMapping] = Uniform()
    one_pair_at_a_time: ClassVar[bool] = False

    def __init__(
        self,
        weight: Weight = 1.0,
        mapping: LayerMapping | None = None,
        stack: Stack | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        if mapping is not None and not isinstance(mapping, LayerMapping):
            raise ObjectiveError(
                f"{type(self).__name__}: mapping must be a LayerMapping, such as mappings.Uniform() or "
                f"mappings.Explicit([[1, 4], [2, 8]]); got {mapping!r}."
            )
        if stack not in (None, *get_args(Stack)):
            raise ObjectiveError(
                f"{type(self).__name__}: stack must be 'encoder', 'decoder' or 'cross', got {stack!r}."
            )
        self.mapping = self.default_mapping if mapping is None else mapping
        self.stack = stack
        self.pairs: Pairs = []
        self._sizes: tuple[ModelInfo, ModelInfo] | None = None

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Resolve the mapping for these two models; a subclass gets the sizes of the chosen stack by :meth:`sizes`."""
        self._sizes = student.stack(self.stack), teacher.stack(self.stack)
        self.pairs = self._pairs(0)

    @property
    def sizes(self) -> tuple[ModelInfo, ModelInfo]:
        """ModelInfo of the chosen stack of student and teacher."""
        assert self._sizes is not None, "known from build() on"
        return self._sizes

    def begin(self, step: int | None) -> None:
        """Draw the layers of a step, where the mapping is one that draws."""
        if self.mapping.draws:
            if step is None:
                raise ObjectiveError(
                    f"{self.name} draws its layers anew at every step. Say which it is: distill(batch, step=step)."
                )
            self.pairs = self._pairs(step)

    def _pairs(self, step: int) -> Pairs:
        return self.mapping.at(step).pairs(*self.sizes, lowest=_LAYERED[self.taps[0]])

    @abstractmethod
    def pair_loss(self, pair: tuple[int, int], student: Activations, teacher: Activations) -> Tensor:
        """Give the scalar loss of one (student layer, teacher layer) pair."""

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean over the pairs."""
        student, teacher = student.stack(self.stack), teacher.stack(self.stack)
        losses = []
        for i, pair in enumerate(self.pairs):
            losses.append(self.pair_loss(pair, student, teacher))
            if self.one_pair_at_a_time and pair[1] not in {layer for _, layer in self.pairs[i + 1 :]}:
                teacher.layers(Tap(self.taps[0], pair[1])).release(pair[1])
        return sum(losses[1:], start=losses[0]) / len(losses)

    def count(self, student: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the number of examples with a token in the chosen stack."""
        return super().count(student.stack(self.stack), batch)

    def student_wants(self, student: ModelInfo) -> set[Tap]:
        """Only the mapped layers."""
        return {Tap(self.taps[0], s, self.stack) for s, _ in self.pairs}

    def teacher_wants(self, teacher: ModelInfo) -> set[Tap]:
        """Only the mapped layers."""
        return {Tap(self.taps[0], t, self.stack) for _, t in self.pairs}

    def teacher_may_want(self, teacher: ModelInfo) -> set[Tap]:
        """Every layer, where layers are drawn."""
        if not self.mapping.draws:
            return self.teacher_wants(teacher)
        depth = teacher.stack(self.stack).depth
        return {Tap(self.taps[0], layer, self.stack) for layer in range(1, depth + 1)}

    def layers(self) -> tuple[list[int], list[int]]:
        """Give the mapped layers of the student, and those of the teacher, whichever belong together."""
        return sorted({s for s, _ in self.pairs}), sorted({t for _, t in self.pairs})

    def describe_layers(self) -> str:
        """Say which layers take part on either side."""
        student, teacher = (" ".join(map(str, layers)) for layers in self.layers())
        return f"[{student}]<-[{teacher}]"

    def describe(self) -> str:
        """Give the pairs, student layer first."""
        stack = "" if self.stack is None else f"{self.stack} "
        if self.mapping.draws:
            return f"{stack}{len(self.pairs)} pairs drawn at each step"
        return stack + " ".join(f"{s}<-{t}" for s, t in self.pairs)


def same_tokens(student: Tensor, teacher: Tensor, axis: int) -> None:
    """Refuse states of different sequences: they can't be compared position by position."""
    if student.shape[0] != teacher.shape[0] or student.shape[axis] != teacher.shape[axis]:
        raise ObjectiveError(
            f"The student saw {student.shape[axis]} tokens of {student.shape[0]} examples, the teacher "
            f"{teacher.shape[axis]} of {teacher.shape[0]}. Both must read the same tokens."
        )


def _expand(taps: tuple[str, ...], sizes: ModelInfo) -> set[Tap]:
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
