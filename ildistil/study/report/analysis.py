"""Internal: what is asked of a grid of runs, answered by `ildistil.study.statistics`."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ildistil.errors import ConfigError, DataError
from ildistil.study import statistics
from ildistil.study.report.grid import AVERAGE, Grid
from ildistil.study.report.predictions import Rows, read_rows

__all__ = [
    "ALPHA",
    "Difference",
    "Family",
    "compare_all",
    "compare_sensitivities",
    "friedmans",
    "mean_of",
    "rankings",
    "sensitivities",
]

#: Error rate of a family of comparisons.
ALPHA = 0.05
T = TypeVar("T")


@dataclass(frozen=True)
class Difference:
    """Two rows of the grid within a column, first less second.

    Args:
        column: level of the columns.
        first: level of the rows.
        second: the other.
        value: mean difference over the seeds of both; ``None`` without any.
        interval: of it, or why there is none.
        n: seeds, and rows where they count, in words.
        p: two-sided; ``None`` where no test is possible.
        adjusted: p within its family.
        left_out: seeds that only one of them has.
    """

    column: str
    first: str
    second: str
    value: float | None
    interval: statistics.Estimate | str
    n: str
    p: float | None = None
    smallest: float = 1.0
    adjusted: statistics.Adjusted | None = None
    left_out: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What the adjusted p says."""
        if self.adjusted is None:
            return "not tested"
        if self.adjusted.smallest > ALPHA:
            return f"cannot reach {ALPHA:g}"
        return "differ" if self.adjusted.p <= ALPHA else "open"

    def reversed(self) -> "Difference":
        """Return second less first."""
        turned = self.interval
        if isinstance(turned, statistics.Estimate):
            turned = statistics.Estimate(-turned.value, -turned.high, -turned.low, turned.level)
        value = None if self.value is None else -self.value
        return replace(self, first=self.second, second=self.first, value=value, interval=turned)


@dataclass(frozen=True)
class Family:
    """All comparisons of a view, and what they are paired over.

    Args:
        differences: the comparisons.
        how: what is paired and tested, in words.
        tested: number of comparisons with a p.
    """

    differences: tuple[Difference, ...]
    how: str
    tested: int

    def between(self, column: str, one: str, other: str) -> Difference | None:
        """Return the comparison of two rows, the first less the second; `None` if they were not compared."""
        for each in self.differences:
            if each.column == column and {each.first, each.second} == {one, other}:
                return each if each.first == one else each.reversed()
        return None


def seed_name(seed: str) -> str:
    """Return a seed's name for a sentence."""
    return f"seed {seed}" if seed else "the run"


def attempt(compute: Callable[[], T]) -> T | str:
    """Return a result, or why the statistics refuse it."""
    try:
        return compute()
    except DataError as error:
        return str(error)


def mean_of(scores: Mapping[str, float]) -> float | None:
    """Return the mean over seeds."""
    return float(np.mean(list(scores.values()))) if scores else None


def compare_all(grid: Grid, view: str, baseline: str | None = None, draws: int = 10_000) -> Family:
    """Compare all rows with each other, or all with one, within each column; p values of a view are one family.

    Raises:
        ConfigError: there is no such baseline.
    """
    if baseline is not None and baseline not in grid.rows:
        raise ConfigError(f"There is no {baseline!r} to compare with. There are: {', '.join(grid.rows)}.")
    pairs = [(a, b) for a, b in combinations(grid.rows, 2) if baseline is None or baseline in (a, b)]
    pairs = [(b, a) if a == baseline else (a, b) for a, b in pairs]
    rows = _rows_of(grid, view)
    found = [_compare(grid, view, column, *pair, rows, draws) for column in grid.columns for pair in pairs]
    tested = {str(i): (d.p, d.smallest) for i, d in enumerate(found) if d.p is not None}
    if tested:
        adjusted = statistics.holm(
            {k: p for k, (p, _) in tested.items()}, {k: least for k, (_, least) in tested.items()}
        )
        found = [replace(d, adjusted=adjusted.get(str(i))) for i, d in enumerate(found)]
    return Family(tuple(found), _how(grid, view, rows), len(tested))


def _rows_of(grid: Grid, view: str) -> Rows | str:
    if view == AVERAGE:
        return ""
    runs = [run for (_, _, task), cell in grid.cells.items() if task == view for run in cell.values()]
    return read_rows(runs, grid.metric(view))


def _how(grid: Grid, view: str, rows: Rows | str) -> str:
    if isinstance(rows, Rows):
        return (
            f"Paired over seeds and the {rows.labels.size:,} validation rows; intervals and p from a joint bootstrap, "
            "about other seeds and other rows"
        )
    if view == AVERAGE:
        return (
            "Paired over seeds. Intervals are Student's, of the mean difference of the seeds that have all tasks; p is "
            f"of sign flips over pairs of task and seed, of no difference on any of the {len(grid.tasks)} tasks"
        )
    return f"Paired over seeds alone ({rows}). Intervals are Student's, p is of sign flips"


def _compare(grid: Grid, view: str, column: str, first: str, second: str, rows: Rows | str, draws: int) -> Difference:
    ones, others = (grid.scores(row, column, view) for row in (first, second))
    seeds = [seed for seed in ones if seed in others]
    sides = ((first, ones, others), (second, others, ones))
    odd = [f"{seed_name(seed)} of {row}" for row, mine, its in sides for seed in mine if seed not in its]
    differences = [ones[seed] - others[seed] for seed in seeds]
    n = f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}"
    value = float(np.mean(differences)) if differences else None
    if len(seeds) < 2:
        return Difference(column, first, second, value, "fewer than two seeds of both", n, left_out=tuple(odd))
    if isinstance(rows, Rows):
        of: list[dict[Hashable, NDArray[np.float64]]] = [
            {s: rows.predictions[grid.cells[row, column, view][s].name] for s in seeds} for row in (first, second)
        ]
        joint = attempt(lambda: statistics.compare(of[0], of[1], rows.labels, rows.metric, draws=draws))
        if not isinstance(joint, str):
            n = f"{n}, {joint.rows:,} rows"
            return Difference(column, first, second, joint.effect.value, joint.effect, n, joint.p, 2 / (draws + 1),
                              left_out=tuple(odd))  # fmt: skip
    tasks = grid.tasks if view == AVERAGE else (view,)
    each = [grid.scores(first, column, t)[s] - grid.scores(second, column, t)[s] for t in tasks for s in seeds]
    test = statistics.sign_flip(each)
    interval = statistics.summarise(differences).mean
    if len(tasks) > 1:
        n = f"{n}, {len(tasks)} tasks"
    return Difference(column, first, second, value, interval, n, test.p, test.smallest, left_out=tuple(odd))


def sensitivities(grid: Grid, view: str) -> dict[str, statistics.Sensitivity | str]:
    """Return how much the columns decide, for each row, or why that can't be told."""
    return {row: attempt(lambda: statistics.sensitivity(_over_columns(grid, row, view))) for row in grid.rows}  # noqa: B023


def compare_sensitivities(
    grid: Grid, view: str
) -> dict[tuple[str, str], tuple[statistics.SensitivityDifference, statistics.Adjusted]]:
    """Compare how much the columns decide for all pairs of rows, as one family."""
    runs = {row: _over_columns(grid, row, view) for row in grid.rows}
    found: dict[tuple[str, str], statistics.SensitivityDifference] = {}
    for pair in permutations(grid.rows, 2):
        result = attempt(lambda: statistics.compare_sensitivity(runs[pair[0]], runs[pair[1]]))  # noqa: B023
        if not isinstance(result, str) and result.range.value >= 0:
            found[pair] = result
    once = {pair: each for pair, each in found.items() if pair[::-1] not in found or pair < pair[::-1]}
    if not once:
        return {}
    adjusted = statistics.holm({str(number): each.p for number, each in enumerate(once.values())})
    return {pair: (each, adjusted[str(number)]) for number, (pair, each) in enumerate(once.items())}


def _over_columns(grid: Grid, row: str, view: str) -> dict[str, list[float]]:
    planned = [column for column in grid.columns if grid.planned(row, column, view)]
    return {column: list(grid.scores(row, column, view).values()) for column in planned}


def rankings(grid: Grid) -> dict[str, statistics.Ranking | str]:
    """Return the ranks of the rows over tasks, for each column."""
    higher = grid.metric(grid.tasks[0]).higher
    found: dict[str, statistics.Ranking | str] = {}
    for column in grid.columns:
        runs = {row: {task: grid.scores(row, column, task) for task in grid.tasks} for row in grid.rows}
        present = {row: tasks for row, tasks in runs.items() if any(tasks.values())}
        found[column] = attempt(lambda: statistics.ranks(present, higher))  # type: ignore[arg-type] # noqa: B023
    return found


def friedmans(grid: Grid) -> dict[str, statistics.Friedman | str]:
    """Return the test of whether the tasks agree on the ranks, for each column."""
    higher = grid.metric(grid.tasks[0]).higher
    found: dict[str, statistics.Friedman | str] = {}
    for column in grid.columns:
        means = [[mean_of(grid.scores(row, column, task)) for row in grid.rows] for task in grid.tasks]
        whole: Sequence[Sequence[float | None]] = [each for each in means if None not in each]
        found[column] = attempt(lambda: statistics.friedman(whole, higher))  # type: ignore[arg-type] # noqa: B023
    return found
