"""From a study's YAML to its runs: axes, levels, and which of them go together."""

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["PLAIN", "Grid", "file_name", "place", "read_axes", "unknown_keys"]

Config = dict[str, Any]
Choice = dict[str, str]  # a level of each axis

#: Axes whose levels may be plain values, and what these are values of.
PLAIN = {
    "seed": "seed_everything",
    "objective": "preset",
    "task": "data.init_args.task",
    "learning_rate": "model.learning_rate",
    "batch_size": "data.init_args.batch_size",
    "epochs": "trainer.max_epochs",
}


@dataclass(frozen=True)
class Grid:
    """The axes of a study, each with its levels: partial configurations by their names.

    >>> grid = Grid({"objective": {"a": {}, "b": {}}, "seed": {"0": {}, "1": {}}})
    >>> list(grid.choices([], [{"objective": "b", "seed": 1}], []))[1:]
    [{'objective': 'a', 'seed': '1'}, {'objective': 'b', 'seed': '0'}]
    """

    axes: Mapping[str, Mapping[str, Config]]

    def choices(self, runs: Sequence[Any], exclude: Sequence[Any], problems: list[str]) -> Iterator[Choice]:
        """Yield a level of each axis for each run.

        Args:
            runs: levels that go together, instead of all; an axis that one doesn't name takes all of its levels.
            exclude: those that are left out; what one doesn't name may be anything.
            problems: what is wrong is added here.
        """
        wanted = self._read_all(runs, "runs", problems).values() if runs else [{}]
        left_out = self._read_all(exclude, "exclude", problems)
        matched: set[int] = set()
        seen: set[tuple[str, ...]] = set()
        for entry in wanted:
            levels = [entry.get(axis) or list(named) for axis, named in self.axes.items()]
            for chosen in itertools.product(*levels):
                choice = dict(zip(self.axes, chosen, strict=True))
                fits = {i for i, each in left_out.items() if all(choice[axis] in each[axis] for axis in each)}
                matched |= fits
                if not fits and chosen not in seen:
                    seen.add(chosen)
                    yield choice
        for number in sorted(left_out.keys() - matched):
            problems.append(f"exclude[{number}] matches no run. Correct it, or remove it.")  # noqa: PERF401
        if not seen:
            problems.append("The study has no run: all are excluded. Leave one in.")

    def parts(self, choice: Choice) -> list[Config]:
        """Return the partial configurations of a choice, in the order of the axes."""
        return [self.axes[axis][level] for axis, level in choice.items()]

    def _read_all(self, entries: Sequence[Any], key: str, problems: list[str]) -> dict[int, dict[str, list[str]]]:
        """Return what entries name, by their numbers, without those that are wrong."""
        found = {number: self._read(entry, f"{key}[{number}]", problems) for number, entry in enumerate(entries)}
        return {number: entry for number, entry in found.items() if entry is not None}

    def _read(self, entry: Any, where: str, problems: list[str]) -> dict[str, list[str]] | None:
        """Return the levels that an entry of ``runs`` or ``exclude`` names, by axis; ``None`` if some don't exist."""
        if not isinstance(entry, Mapping):
            problems.append(f"{where} is {entry!r}. Name levels by their axes: {{objective: att-kl, seed: 0}}.")
            return None
        found: dict[str, list[str]] = {}
        before = len(problems)
        for axis, levels in entry.items():
            named = [str(level) for level in (levels if isinstance(levels, list) else [levels])]
            if axis not in self.axes:
                problems.append(f"{where}: there is no axis {axis!r}.{_near(str(axis), self.axes)}")
                continue
            levels = self.axes[axis]
            lost = [level for level in named if level not in levels]
            problems += [f"{where}: the axis {axis!r} has no level {level!r}.{_near(level, levels)}" for level in lost]
            found[axis] = named
        return found if len(problems) == before else None


def read_axes(given: Any, where: str, problems: list[str]) -> Grid:
    """Return the axes as a YAML file has them.

    Args:
        given: by name, each a mapping of levels, or a list of plain values where the name says of what: see `PLAIN`, or
            a path such as ``model.warmup``.
        where: the place, for messages.
        problems: what is wrong is added here.

    >>> read_axes({"learning_rate": [0.1]}, "axes", []).axes
    {'learning_rate': {'0.1': {'model': {'learning_rate': 0.1}}}}
    """
    axes: dict[str, dict[str, Config]] = {}
    if not isinstance(given, Mapping):
        problems.append(f"{where} is {given!r}. Name the axes, each with its levels.")
        return Grid({})
    for axis, levels in given.items():
        at = f"{where}.{axis}"
        found: dict[str, Any] = {}
        if isinstance(levels, list):
            path = PLAIN.get(axis, axis if "." in str(axis) else None)
            if path is None:
                problems.append(
                    f"{at} is a list, and it isn't known of what. Lists are for {', '.join(PLAIN)}, and for paths such "
                    "as model.warmup; else give each level a name and a partial configuration."
                )
                continue
            found = {str(value): place(path, value) for value in levels}
            if len(found) < len(levels):
                problems.append(f"{at} has a value twice: {levels}. Remove one.")
        elif isinstance(levels, Mapping):
            found = {str(name): {} if level is None else level for name, level in levels.items()}
            for name, level in found.items():
                if not isinstance(level, Mapping):
                    problems.append(f"{at}.{name} is {level!r}. A level is a partial configuration, such as 'model:'.")
        if not found:
            problems.append(f"{at} has no levels: the grid is empty.")
            continue
        names: dict[str, str] = {}
        for name in found:
            other = names.setdefault(file_name(name).lower(), name)
            if other != name:
                problems.append(f"{at}: the names {other!r} and {name!r} clash as names of folders. Rename one.")
        axes[str(axis)] = {name: dict(level) for name, level in found.items() if isinstance(level, Mapping)}
    return Grid(axes)


def place(path: str, value: Any) -> Config:
    """Return a configuration with a value at a place.

    >>> place("model.warmup", 0.1)
    {'model': {'warmup': 0.1}}
    """
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


def file_name(text: str) -> str:
    """Return a name as part of a folder's name.

    >>> file_name("att-kl + val/kl")
    'att-kl-+-val-kl'
    """
    return re.sub(r"[^\w.+=-]+", "-", text).strip("-.") or "none"


def unknown_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> list[str]:
    """Return a message for each key that means nothing."""
    known = list(known)
    return [f"{where}{key}: unknown.{_near(str(key), known)}" for key in given if key not in known]


def _near(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(known) or 'none'}."
