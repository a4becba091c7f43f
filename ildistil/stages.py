"""Training in stages: first the intermediate layers, say, then the prediction."""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ildistil.errors import ConfigError

__all__ = ["Place", "Stage", "Step", "Timeline", "check_names"]

# A progress at which weights that fall to 0 at the end haven't yet.
_JUST_BEFORE_THE_END = 1 - 2.0**-20
# Of epochs: what is more is no number of epochs.
_LONGEST = 10**9


@dataclass(frozen=True)
class Stage:
    """Some epochs with some of the terms; the learning rate's schedule and the optimiser's state start anew.

    Args:
        objectives: names of the terms that take part.
        epochs: how many epochs the stage lasts.
        learning_rate: its peak; by default the module's.
    """

    objectives: Sequence[str]
    epochs: int
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        names, epochs, rate = self.objectives, self.epochs, self.learning_rate
        listed = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
        if not listed or not names or type(epochs) is not int or not 1 <= epochs <= _LONGEST:
            raise ConfigError(
                "A stage has at least one epoch and a list of names of objectives, such as "
                f"Stage(['attention_kl'], epochs=3); got {names!r:.80} and {epochs!r:.80}."
            )
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if rate is not None and not (number and 0 < rate <= sys.float_info.max):
            raise ConfigError(f"A stage's learning_rate must be > 0 and finite, got {rate!r:.80}.")


class Step(NamedTuple):
    """The optimiser step that a batch belongs to.

    Attributes:
        number: number of the step, the same in all processes and after resuming, for terms that draw something anew at
            every step; ``None`` if nobody says it.
        progress: how far the training, or its stage, is, from 0 to 1, for weights that are schedules.
        only: names of the terms that take part; ``None`` for all.
    """

    number: int | None = None
    progress: float | None = None
    only: Collection[str] | None = None


class Place(NamedTuple):
    """Where a step is: the stage's number from 0, the step within it, and the number of its steps."""

    stage: int
    step: int
    steps: float

    @property
    def progress(self) -> float:
        """How far the stage is, from 0 to 1; 0 where it has no end."""
        return min(1.0, self.step / max(1.0, self.steps))


class Timeline:
    """Where each optimiser step belongs: a function of the step alone, so that resuming needs nothing else.

    Args:
        stages: the stages; none for a training in one.
        steps: number of all steps, perhaps infinite.

    >>> timeline = Timeline([Stage(["hidden"], epochs=1), Stage(["logits"], epochs=3)], steps=40)
    >>> timeline.place(9), timeline.place(10)
    (Place(stage=0, step=9, steps=10), Place(stage=1, step=0, steps=30))
    """

    def __init__(self, stages: Sequence[Stage], steps: float) -> None:
        self.stages, self.steps = stages, steps
        epochs = sum(stage.epochs for stage in stages)
        several = len(stages) > 1
        self._lengths: list[float] = [int(steps) * s.epochs // epochs for s in stages] if several else [steps]

    def place(self, step: int) -> Place:
        """Return where a step is."""
        for number, length in enumerate(self._lengths[:-1]):
            if step < length:
                return Place(number, step, length)
            step -= int(length)
        return Place(len(self._lengths) - 1, step, self._lengths[-1])

    def step(self, number: int) -> Step:
        """Return an optimiser step, with its progress and the names of the active terms."""
        place = self.place(number)
        return Step(number, place.progress, self.stages[place.stage].objectives if self.stages else None)

    def yardstick(self, number: int) -> Step:
        """Return the step by which sets are measured in the stage of a step: just before that stage's end.

        Its weights are the same throughout the stage, so that what is measured is comparable.
        """
        return Step(0, _JUST_BEFORE_THE_END, self.step(number).only)

    def starts_anew(self, step: int) -> bool:
        """Return whether a stage other than the first starts with a step."""
        place = self.place(step)
        return place.stage > 0 and place.step == 0

    def is_last(self, step: int) -> bool:
        """Return whether a step belongs to the last stage."""
        return self.place(step).stage == len(self._lengths) - 1

    def parts(self) -> list[tuple[Collection[str] | None, float]]:
        """Return the names of the terms of each stage (``None``: all) and the number of its steps."""
        names: list[Collection[str] | None] = [stage.objectives for stage in self.stages]
        return list(zip(names or [None], self._lengths, strict=True))

    def factor(self, peak: float, shape: Callable[[int, float], float]) -> Callable[[int], float]:
        """Return the learning rate at a step as a factor of ``peak``; ``shape(step, steps)`` is that of one stage."""

        def at(step: int) -> float:
            place = self.place(step)
            own = self.stages[place.stage].learning_rate if self.stages else None
            return shape(place.step, place.steps) * (own or peak) / peak

        return at


def check_names(stages: Sequence[Stage], objectives: Mapping[str, object]) -> None:
    """Compare the names in the stages with the objectives there are.

    Raises:
        ConfigError: a name is unknown, or an objective is in no stage.
    """
    named = {name for stage in stages for name in stage.objectives}
    if unknown := sorted(named - objectives.keys()):
        raise ConfigError(
            f"A stage names {unknown[0]!r}, and there is no such objective. There are: {', '.join(sorted(objectives))}."
        )
    if idle := sorted(objectives.keys() - named):
        raise ConfigError(f"The objective {idle[0]!r} takes part in no stage. Name it in one, or leave it out.")
