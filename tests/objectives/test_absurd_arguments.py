"""Every constructor with absurd values: what it makes works, and all else is refused in words."""

import inspect
import math
import random
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from ildistil import Balance, Stage, mappings, objectives, schedules
from ildistil.errors import ConfigError, IldistilError
from ildistil.objectives import Objective
from ildistil.objectives.projection import Projection
from ildistil.schedules import HEAVIEST
from ildistil.stages import Timeline

VALUES: list[Any] = [
    0, 1, -1, 2, 0.5, 1e30, -1e30, 1e-30, 1e300, 1e-320, math.nan, math.inf, -math.inf, 2**63, 10**400, True, False,
    None, "", "x", "0.5", "nan", "auto", "first", b"x", [], (), {}, set(), [None], [1], (1, 2), {1: 4}, {"1": "4"},
    [[1, 4]], [[1]], [["a", "b"]], [[1.5, 2]], [[True, 1]], [[-1, -1]], ["first", "last"], ["q", "q"], range(2), 1j,
    Fraction(1, 3), Decimal("0.5"), np.float32(0.5), np.int64(2), np.float64("nan"), torch.tensor(1.0),
    torch.tensor([1.0, 2.0]), object, lambda: 1, mappings.Uniform(), schedules.Linear(1.0, 0.0),
]  # fmt: skip
REQUIRED: dict[str, Any] = {"objectives": ["hidden_mse"], "epochs": 1, "start": 1.0, "end": 0.0}


def classes() -> list[type]:
    rooms = ((objectives, Objective), (mappings, mappings.LayerMapping), (schedules, schedules.Schedule))
    named = [getattr(room, name) for room, _ in rooms for name in room.__all__]
    found = [c for c in named if inspect.isclass(c) and issubclass(c, tuple(base for _, base in rooms))]
    return [c for c in found if not inspect.isabstract(c)] + [Projection, Balance, Stage]


def cases(made: type) -> Iterator[dict[str, Any]]:
    parameters = inspect.signature(made).parameters
    needed = {name: REQUIRED[name] for name, p in parameters.items() if p.default is p.empty and name in REQUIRED}
    for name in parameters:
        yield from (needed | {name: value} for value in VALUES)
    generator = random.Random(0)
    for _ in range(40):
        yield needed | {name: generator.choice(VALUES) for name in parameters if generator.random() < 0.5}


class Depth:
    def __init__(self, depth: int) -> None:
        self.depth, self.init_layers = depth, (1,) * (depth < 3) + (4,)


def use(found: Any) -> None:
    if isinstance(found, Objective):
        assert isinstance(found.name, str)
        if isinstance(found.weight, float):
            assert 0 <= found.weight <= HEAVIEST
    elif isinstance(found, mappings.LayerMapping):
        for lowest in (0, 1):
            for s, t in found.at(3).pairs(Depth(2), Depth(4), lowest):  # type: ignore[arg-type]
                assert type(s) is type(t) is int
                assert lowest <= s <= 2
                assert lowest <= t <= 4
    elif isinstance(found, schedules.Schedule):
        assert all(0 <= found(share) <= HEAVIEST for share in (0, 0.1, 0.5, 1.0))
        assert str(found)
    elif isinstance(found, Balance):
        values = {"a": torch.tensor(2.0), "b": torch.tensor(6.0)}
        for step in range(3):
            weights = found.weights(
                values, {"a": 1.0, "b": 1.0}, [torch.ones(1)], step, measuring=found.by != "gradient"
            )
            assert all(weight.isfinite() for weight in weights.values())
    elif isinstance(found, Stage):
        timeline = Timeline([found, Stage(["b"], 1)], 40)
        assert math.isfinite(timeline.factor(1e-3, lambda step, steps: 1.0)(3))
        assert all(isinstance(name, str) for name in timeline.step(0).only or ())


@pytest.mark.parametrize("made", classes())
def test_absurd_arguments_are_refused_in_words(made: type) -> None:
    for arguments in cases(made):
        try:
            use(made(**arguments))
        except IldistilError as error:
            if len(str(error)) > 700:  # something endless is quoted
                raise
        except Exception as error:
            raise AssertionError(f"{made.__name__}: {arguments!r:.200}") from error


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: objectives.LogitsDIST(temperature=1e30), "LogitsDIST: temperature must be a number between"),
        (lambda: objectives.LogitsKL(temperature=math.nan), "must be a number between 0.01 and 1000, got nan"),
        (lambda: objectives.LogitsDIST(inter=math.nan), "LogitsDIST: inter must be a number >= 0"),
        (lambda: objectives.LogitsDIST(inter=0.0, intra=0), "both 0: nothing would teach"),
        (lambda: objectives.LogitsKL(weight=1e300), "weight must be a finite number >= 0 or a schedule, and at"),
        (lambda: objectives.CLSContrast(size=2**63), "size must be an integer >= 1 and at most 65,536"),
        (lambda: objectives.CLSMSE(normalize="no"), "normalize must be True or False, got 'no'"),  # type: ignore[arg-type]
        (lambda: objectives.QKVMSE(parts="qk"), r"parts must be a list of any of 'q', 'k', 'v', each once; got 'qk'"),
        (lambda: objectives.RelationKL(relations=["v-v", "v-v"]), "relations must be a list of any of"),
        (lambda: schedules.Linear(1e300, 0.0), "must be finite, not negative, at most 1e"),
        (lambda: schedules.Linear(Fraction(1, 3), 0.0), "weights and shares must be numbers, got Fraction"),  # type: ignore[arg-type]
        (lambda: Balance(every=True), "Balance: every must be an integer"),
        (lambda: Balance(momentum="0.5"), "Balance: momentum must be a number from 0 to below 1"),  # type: ignore[arg-type]
        (lambda: Stage(["a"], epochs=1.5), "A stage has at least one epoch"),  # type: ignore[arg-type]
        (lambda: Stage([1], epochs=1), "a list of names of objectives"),  # type: ignore[list-item]
        (lambda: Stage(["a"], 1, learning_rate=math.inf), "learning_rate must be > 0 and finite, got inf"),
    ],
)  # fmt: skip
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(IldistilError, match=message):
        make()


@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize(("student", "teacher"), [(3, 12), (4, 2)])
def test_more_last_layers_than_there_are_do_not_count_from_the_end_again(
    lowest: int, student: int, teacher: int
) -> None:
    """Layer -1 is the last one, and must not be what follows layer 0."""
    for count in range(min(student, teacher) + 2 - lowest, 9):
        with pytest.raises(ConfigError, match="is out of range"):
            mappings.Last(count).pairs(Depth(student), Depth(teacher), lowest)  # type: ignore[arg-type]
    for count in range(1, min(student, teacher) + 2 - lowest):
        found = mappings.Last(count).pairs(Depth(student), Depth(teacher), lowest)  # type: ignore[arg-type]
        assert found == [(student - k, teacher - k) for k in range(count)][::-1]
