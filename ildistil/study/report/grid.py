"""Internal: runs as a grid of rows, columns, tasks and seeds, and what was measured in it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from ildistil.data.glue import TASKS
from ildistil.errors import ConfigError, DataError
from ildistil.study.runs import Run

__all__ = ["AVERAGE", "Axes", "Grid", "Metric", "find_axes", "grids", "plural", "spoken"]

#: Stands for the mean over all tasks.
AVERAGE = "average "  # no task's name ends so
_ROLES = {
    "objective": ("objective", "objectives", "preset", "method"),
    "initialisation": ("initialisation", "initialization", "init"),
    "task": ("task", "dataset", "data"),
    "seed": ("seed", "seed_everything"),
}
_SHARES = {
    "accuracy": "accuracy (%)", "f1": "F1 (%)", "macro_f1": "macro F1 (%)", "micro_f1": "micro F1 (%)",
    "average_precision": "average precision (%)", "matthews": "Matthews correlation (× 100)",
    "pearson": "Pearson correlation (× 100)", "spearman": "Spearman correlation (× 100)",
}  # fmt: skip
_LOWER = ("loss", "perplexity", "error")


@dataclass(frozen=True)
class Axes:
    """What the factors of the runs stand for.

    Args:
        rows: factor whose levels are compared, as a rule the objective; ``None`` if nothing varies.
        columns: factor beside it, as a rule the initialisation.
        task: factor that names the tasks.
        seeds: factors over which is averaged.
        blocks: further factors that vary: everything is done for each of their levels.
        best_over: further factors of which each cell takes its best level.
        same: factors with one level, and this.
    """

    rows: str | None
    columns: str | None
    task: str | None
    seeds: tuple[str, ...]
    blocks: tuple[str, ...]
    best_over: tuple[str, ...]
    same: Mapping[str, str]


@dataclass(frozen=True)
class Metric:
    """A metric with its unit; shares and correlations are shown times 100."""

    name: str
    scale: float = 1.0

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return not any(word in self.name for word in _LOWER)

    @property
    def digits(self) -> int:
        """Decimals of a mean in a table."""
        return 1 if self.name in _SHARES else 3

    @property
    def label(self) -> str:
        """Name and unit."""
        better = "higher" if self.higher else "lower"
        return _SHARES.get(self.name, f"{spoken(self.name)} (as logged, {better} is better)")

    @property
    def unit(self) -> str:
        """That of a difference."""
        return "points" if self.name in _SHARES else f"of {spoken(self.name)}"


@dataclass(frozen=True)
class Grid:
    """Runs by row, column, task and seed.

    Args:
        axes: what these stand for.
        rows: levels, in the order of the study; as columns and tasks.
        cells: (row, column, task) to seed to run, whether it has a value or not.
        metrics: task to its metric.
        chosen: (row, column, task) to the level of ``best_over`` that it shows.
        block: levels of ``blocks``.
    """

    axes: Axes
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    tasks: tuple[str, ...]
    cells: Mapping[tuple[str, str, str], Mapping[str, Run]]
    metrics: Mapping[str, Metric]
    chosen: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    block: Mapping[str, str] = field(default_factory=dict)

    @property
    def varies(self) -> bool:
        """Whether there are several columns."""
        return self.axes.columns is not None and len(self.columns) > 1

    @property
    def views(self) -> tuple[str, ...]:
        """The average over tasks, where there is one, and the tasks."""
        kinds = {(metric.higher, metric.scale, metric.unit) for metric in self.metrics.values()}
        return (AVERAGE, *self.tasks) if len(self.tasks) > 1 and len(kinds) == 1 else self.tasks

    def where(self, view: str) -> str:
        """Return a view's name for a caption; that of the only task, where it has none, is empty."""
        return f"Mean over the {len(self.tasks)} tasks" if view == AVERAGE else view

    def metric(self, view: str) -> Metric:
        """Return the metric of a view; that of the average is called by the name that all tasks share, or "score"."""
        if view in self.metrics:
            return self.metrics[view]
        names = {metric.name for metric in self.metrics.values()}
        return next(iter(self.metrics.values())) if len(names) == 1 else _Mixed("accuracy", 100.0)

    def scores(self, row: str, column: str, view: str, metric: Metric | None = None) -> dict[str, float]:
        """Return seed to score of the runs that have one; in the average, of the seeds that have all tasks."""
        if view == AVERAGE:
            each = [self.scores(row, column, task) for task in self.tasks]
            return {
                seed: sum(one[seed] for one in each) / len(each) for seed in each[0] if all(seed in o for o in each)
            }
        metric = metric or self.metrics[view]
        found = {seed: value_of(run, metric.name) for seed, run in self.planned(row, column, view).items()}
        return {seed: value * metric.scale for seed, value in found.items() if value is not None}

    def planned(self, row: str, column: str, view: str) -> dict[str, Run]:
        """Return seed to run, with a value or without; in the average a run that stands for its seed."""
        if view != AVERAGE:
            return dict(self.cells.get((row, column, view), {}))
        found: dict[str, Run] = {}
        for task in self.tasks:
            for seed, run in self.planned(row, column, task).items():
                if seed not in found or value_of(run, self.metrics[task].name) is None:
                    found[seed] = run
        return found

    def label(self, row: str, column: str) -> str:
        """Return a cell's name."""
        return ", ".join(name for name in (row, column) if name)


class _Mixed(Metric):
    """Mean of several metrics, all in points."""

    @property
    def label(self) -> str:
        """Name and unit."""
        return "mean of the tasks' metrics (× 100)"


def value_of(run: Run, metric: str) -> float | None:
    """Return what a run reached; ``None`` if it isn't finished, or has no finite value."""
    value = run.metrics.get(metric, math.nan)
    return value if run.state == "finished" and math.isfinite(value) else None


def find_axes(runs: Sequence[Run], rows: str | None = None, columns: str | None = None,
              best_over: Sequence[str] = ()) -> Axes:  # fmt: skip
    """Find out what the factors stand for, by their names.

    Args:
        runs: of one study.
        rows: factor to compare; by default the objective, or else the first that varies.
        columns: factor beside it; by default the initialisation, or else the next that varies.
        best_over: factors of which each cell takes its best level.

    Raises:
        ConfigError: a factor is named that no run has.
    """
    names = list(dict.fromkeys(name for run in runs for name in run.factors))
    if unknown := [name for name in (rows, columns, *best_over) if name is not None and name not in names]:
        raise ConfigError(f"No run has the factor {unknown[0]!r}. There are: {', '.join(names) or 'none'}.")
    varying = [name for name in names if len(_levels(runs, name)) > 1]
    seeds = tuple(name for name in varying if _is(name, "seed"))
    task = next((name for name in (*varying, *names) if _is(name, "task")), None)
    free = [name for name in varying if name not in (*seeds, task, *best_over, rows, columns)]

    def take(role: str) -> str | None:
        name = next((name for name in free if _is(name, role)), None)
        # An axis by its name goes before any other, also where the other is asked for first.
        other = next((n for n in free if not any(_is(n, r) for r in ("objective", "initialisation"))), None)
        if name := name or other:
            free.remove(name)
        return name

    first = rows or take("objective") or next((name for name in names if _is(name, "objective")), None)
    second = columns or take("initialisation")
    same = {name: _levels(runs, name)[0] for name in names if name not in varying and name not in (first, second, task)}
    return Axes(first or second, second if first else None, task, seeds, tuple(free), tuple(best_over), same)


def grids(runs: Sequence[Run], axes: Axes, metrics: Mapping[str, str]) -> list[Grid]:
    """Arrange runs, a grid for each combination of the levels of ``axes.blocks``.

    Args:
        runs: of one study.
        axes: of `find_axes`.
        metrics: task to the name of its metric; the key "" is that of all others.

    Raises:
        DataError: two runs are of the same factors.
        ConfigError: a metric that no run of its task has.
    """
    tasks = _levels(runs, axes.task)
    units = {task: _metric_of(task, [r for r in runs if _level(r, axes.task) == task], metrics) for task in tasks}
    combined = dict.fromkeys(tuple(_level(run, name) for name in axes.blocks) for run in runs)
    return [
        _grid([run for run in runs if tuple(_level(run, n) for n in axes.blocks) == levels], axes, units, levels)
        for levels in combined
    ]


def _grid(runs: Sequence[Run], axes: Axes, units: Mapping[str, Metric], levels: tuple[str, ...]) -> Grid:
    sorted_out: dict[tuple[str, str, str], dict[str, dict[str, Run]]] = {}
    for run in runs:
        cell = sorted_out.setdefault((_level(run, axes.rows), _level(run, axes.columns), _level(run, axes.task)), {})
        best = ", ".join(f"{spoken(name)} {_level(run, name)}" for name in axes.best_over)
        seed = "/".join(_level(run, name) for name in axes.seeds)
        if (other := cell.setdefault(best, {}).setdefault(seed, run)) is not run:
            raise DataError(f"The runs {other.name!r} and {run.name!r} have the same factors. Remove one of them.")
    cells, chosen = {}, {}
    for key, choices in sorted_out.items():
        metric = units[key[2]]
        chosen[key] = max(choices, key=lambda level: _worth(choices[level].values(), metric))
        cells[key] = choices[chosen[key]]
    tasks = tuple(task for task in units if any(key[2] == task for key in cells))
    return Grid(
        axes, tuple(_levels(runs, axes.rows)), tuple(_levels(runs, axes.columns)), tasks, cells,
        {task: units[task] for task in tasks}, chosen if axes.best_over else {},
        dict(zip(axes.blocks, levels, strict=True)),
    )  # fmt: skip


def _worth(runs: Iterable[Run], metric: Metric) -> float:
    values = [value for run in runs if (value := value_of(run, metric.name)) is not None]
    return (1 if metric.higher else -1) * float(np.mean(values)) if values else -math.inf


def _metric_of(task: str, runs: Sequence[Run], wanted: Mapping[str, str]) -> Metric:
    """Return the metric that was asked for, else GLUE's, else the best known one that was measured."""
    measured = {name for run in runs for name in run.metrics}
    asked = wanted.get(task) or wanted.get("")
    if asked and asked not in measured and measured:
        where = f" on {task}" if task else ""
        raise ConfigError(f"No run{where} measured {asked!r}. There are: {', '.join(sorted(measured))}.")
    official = TASKS[task].metric_names[:1] if task in TASKS else ()
    order = [*official, *_SHARES, *sorted(n for n in measured if Metric(n).higher), "loss", *sorted(measured)]
    name = asked or next((name for name in order if name in measured), (*official, "metric")[0])
    return scaled(name, runs)


def scaled(name: str, runs: Sequence[Run]) -> Metric:
    """Return a metric with its scale; shares that are in percent already stay as they are."""
    values = [abs(run.metrics[name]) for run in runs if math.isfinite(run.metrics.get(name, math.nan))]
    return Metric(name, 100.0 if name in _SHARES and max(values, default=0.0) <= 1 else 1.0)


def spoken(name: str) -> str:
    """Return a factor's or metric's name for a sentence.

    >>> spoken("finetune.learning_rate")
    'finetune learning rate'
    """
    return name.replace("_", " ").replace(".", " ")


def plural(count: int, name: str) -> str:
    """Return a number of things.

    >>> plural(1, "seed"), plural(3, "learning_rate")
    ('1 seed', '3 learning rates')
    """
    return f"{count:,} {spoken(name)}{'' if count == 1 else 's'}"


def _is(name: str, role: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in _ROLES[role]


def _level(run: Run, name: str | None) -> str:
    return "" if name is None else run.factors.get(name, "none")


def _levels(runs: Sequence[Run], name: str | None) -> list[str]:
    return list(dict.fromkeys(_level(run, name) for run in runs))


def combinations(grid: Grid) -> list[tuple[str, str]]:
    """Return the pairs of row and column that are in the study."""
    return [(r, c) for r, c in product(grid.rows, grid.columns) if any((r, c, t) in grid.cells for t in grid.tasks)]
