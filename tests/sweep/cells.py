"""The cells of the table: the library's value of one term against the one made by hand."""

import traceback
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from ildistil import Distillation, Step, objectives
from ildistil.errors import IldistilError
from sweep import by_hand
from sweep.architectures import Architecture
from sweep.build import Pair
from sweep.reference import NoReferenceError, Seen, Stack

RESULTS = ("wrong", "foreign", "no reference", "refused", "right")  # of several batches the first one of these counts
TOKENS = ("masked", "causal", "seq2seq")


class Cell(NamedTuple):
    """What one term of one architecture came to."""

    term: str
    result: str
    why: str = ""


class Term(NamedTuple):
    """A term in both ways; the one by hand is given what plain runs of student and teacher gave."""

    name: str
    objective: Callable[[], objectives.Objective]
    by_hand: Callable[[Seen, Seen], float]


def cells(architecture: Architecture, pair: Pair) -> list[Cell]:
    """All cells of a row; the runs by hand come before the library touches the models."""
    stacks = stacks_of(pair)
    chosen = terms(architecture, stacks)

    @cache
    def seen(name: str) -> tuple[Seen, Seen]:
        return Seen(pair.student, pair.batches[name], stacks), Seen(pair.teacher, pair.batches[name], stacks)

    expected = [{name: _reference(term, seen, name) for name in pair.batches} for term in chosen]
    found = _library(pair, chosen)
    if any(isinstance(values, Exception) for values in found.values()):  # each alone: which terms are they of?
        found_alone = [_library(pair, [term]) for term in chosen]
    else:
        found_alone = [{name: [values[i]] for name, values in found.items()} for i in range(len(chosen))]
    return [_cell(*x, pair.dtype) for x in zip(chosen, found_alone, expected, strict=True)]


def stacks_of(pair: Pair) -> tuple[Stack, ...]:
    """The stacks of layers that are compared."""
    several = getattr(pair.teacher.config, "is_encoder_decoder", False)
    return ("encoder", "decoder", "cross") if several else (None,)


def terms(architecture: Architecture, stacks: tuple[Stack, ...]) -> list[Term]:
    """The terms of an architecture."""
    kinds = {
        objectives.HiddenMSE: by_hand.hidden_mse,
        objectives.CLSMSE: by_hand.cls_mse,
        objectives.AttentionKL: by_hand.attention_kl,
    }
    found = [
        Term(
            kind.__name__ + (f", {stack}" if stack else ""),
            lambda kind=kind, stack=stack: kind(stack=stack),
            lambda s, t, hand=hand, stack=stack: hand(s, t, stack),
        )
        for stack in stacks
        for kind, hand in kinds.items()
        if stack != "cross" or kind is objectives.AttentionKL
    ]
    if architecture.head != "base":
        kind = objectives.LogitsKL if architecture.head in TOKENS else objectives.LogitsMSE
        found.append(Term(kind.__name__, kind, by_hand.logits))
    return found


def predicts(architecture: Architecture, pair: Pair) -> str | None:
    """Which token a row of a language model's logits predicts, by its own loss."""
    if architecture.head not in TOKENS:
        return None
    try:
        return ("own", "next")[by_hand.shift(pair.student, pair.batches["long"])]
    except Exception:
        return "unknown"


def _reference(term: Term, seen: Callable[[str], tuple[Seen, Seen]], name: str) -> float | str:
    try:
        return term.by_hand(*seen(name))
    except NoReferenceError as error:
        return str(error)
    except Exception as error:
        return _told(error)


def _library(pair: Pair, chosen: list[Term]) -> dict[str, list[float] | Exception]:
    """The library's values on each batch, after a dry run on the first one, as in training; or what it raised."""
    engine, found = None, dict[str, list[float] | Exception]()
    try:
        engine = Distillation(pair.student, pair.teacher)
        engine.set_objectives({f"term{i}": term.objective() for i, term in enumerate(chosen)})
        engine.dry_run(next(iter(pair.batches.values())))
        engine.eval()
        for name, batch in pair.batches.items():
            try:
                with torch.no_grad():
                    found[name] = [value.item() for value in engine(batch, Step(0)).values.values()]
            except Exception as error:
                found[name] = error
    except Exception as error:
        found["dry run"] = error
    finally:
        if engine is not None:
            engine.release()
    return found


def _cell(
    term: Term, found: dict[str, list[float] | Exception], expected: dict[str, float | str], dtype: torch.dtype
) -> Cell:  # fmt: skip
    compared = []
    for name, values in found.items():
        if isinstance(values, Exception):
            compared.append(_failed(term, values, name))
        else:
            compared.append(_compared(term, name, values[0], expected[name], dtype))
    return min(compared, key=lambda cell: RESULTS.index(cell.result))


def _compared(term: Term, name: str, value: float, expected: float | str, dtype: torch.dtype) -> Cell:
    if isinstance(expected, float) and (expected == 0 or expected != expected):
        expected = f"by hand it is {expected}"
    if isinstance(expected, str):
        return Cell(term.name, "no reference", f"{expected} (the library has {value:.6g})")
    limit = 1e-6 if dtype == torch.float64 else 1e-3
    is_right = abs(value - expected) < limit * abs(expected)
    return Cell(term.name, "right" if is_right else "wrong", f"{value:.8g} for {expected:.8g} [{name}]")


def _failed(term: Term, error: Exception, where: str) -> Cell:
    if isinstance(error, IldistilError):
        return Cell(term.name, "refused", f"{type(error).__name__}: {error} [{where}]")
    return Cell(term.name, "foreign", f"{_told(error)} [{where}]")


def _told(error: BaseException) -> str:
    """An error, the last line of this project in its traceback, and the very last one."""
    frames: list[Any] = list(traceback.extract_tb(error.__traceback__))
    ours = [f for f in frames if "/ildistil/" in f.filename or "/sweep/" in f.filename]
    places = ["/".join(f.filename.split("/")[-2:]) + f":{f.lineno}" for f in (*ours[-1:], *frames[-1:])]
    return f"{type(error).__name__}: {error}"[:400] + f" ({', '.join(dict.fromkeys(places))})"
