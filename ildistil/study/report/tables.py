"""Internal: the tables of a report; n in every cell, and nothing missing without its name."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ildistil.study.report.analysis import ALPHA, Family, mean_of
from ildistil.study.report.document import Cell, Table
from ildistil.study.report.grid import AVERAGE, Grid, Metric, plural, spoken, value_of
from ildistil.study.runs import Run
from ildistil.study.statistics import Estimate, Ranking, Sensitivity

__all__ = ["costs", "differences", "missing", "ranks", "scores", "sensitivity", "why_missing"]

#: Factor, decimals and name with unit of what a run cost; anything else is shown as it is.
COSTS = {
    "seconds": (1.0, 0, "time (s)"),
    "tokens_per_second": (1.0, 0, "tokens per second"),
    "peak_memory_bytes": (2.0**-20, 0, "peak memory (MiB)"),
    "teacher_runs": (1.0, 0, "teacher runs (batches)"),
    "teacher_runs_saved": (1.0, 0, "teacher runs saved (batches)"),
}


def scores(grid: Grid, view: str, metric: Metric | None = None) -> Table:
    """Make the table rows x columns of a view."""
    shown = metric or grid.metric(view)
    means = {
        (row, column): mean_of(grid.scores(row, column, view, metric)) for row in grid.rows for column in grid.columns
    }
    best: dict[str, float] = {}
    for column in grid.columns:
        known = [m for row in grid.rows if (m := means[row, column]) is not None]
        if len(known) > 1:
            best[column] = max(known) if shown.higher else min(known)
    body = []
    for row in grid.rows:
        cells = [Cell(row)]
        for column in grid.columns:
            value = means[row, column]
            cell = _score(grid, row, column, view, shown, metric)
            marked = value is not None and column in best and _alike(value, best[column], shown)
            cells.append(Cell(cell.text, cell.small, cell.value, "best") if marked else cell)
        body.append(cells)
    where = grid.where(view) or "Scores"
    return Table(f"{where}: {shown.label}", [_axis(grid.axes.rows), *_headers(grid)], body, folded=metric is not None)


def _score(grid: Grid, row: str, column: str, view: str, shown: Metric, metric: Metric | None) -> Cell:
    values, planned = list(grid.scores(row, column, view, metric).values()), grid.planned(row, column, view)
    if not planned:
        return Cell("not run", "(0)", mark="missing")
    if not values:
        states = Counter(why_missing(run, shown.name, brief=True) for run in planned.values())
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        return Cell("missing", f"(0 of {len(planned)}: {told})", mark="missing")
    n = f"{len(values)}" if len(values) == len(planned) else f"{len(values)} of {len(planned)}"
    spread = f"± {np.std(values, ddof=1):.{shown.digits}f} " if len(values) > 1 else ""
    level = grid.chosen.get((row, column, view), "")
    mean = float(np.mean(values))
    return Cell(f"{mean:.{shown.digits}f}", f"{spread}({n}{f'; {level}' if level else ''})", mean)


def why_missing(run: Run, metric: str, brief: bool = False) -> str:
    """Return why a run has no value, in words."""
    if run.state != "finished":
        return run.state
    if brief:
        return "without a value" if metric not in run.metrics else "not finite"
    return f"finished without {spoken(metric)}" if metric not in run.metrics else f"{spoken(metric)} is not finite"


def differences(grid: Grid, view: str, family: Family, folded: bool = False) -> Table:
    """Make the table of comparisons of a view."""
    metric, body = grid.metric(view), []
    for each in family.differences:
        if isinstance(each.interval, Estimate):
            interval = _interval(each.interval, metric.digits, signed=True)
        else:
            interval = f"({each.interval})"
        value = Cell("missing", mark="missing") if each.value is None else Cell(f"{each.value:+.{metric.digits}f}")
        test = [_p(each.p), _p(None if each.adjusted is None else each.adjusted.p)]
        body.append([
            Cell(f"{each.first} − {each.second}"), *([Cell(each.column)] if grid.axes.columns else []),
            Cell(value.text, interval, each.value, value.mark),
            Cell(each.n, f"(without {', '.join(each.left_out)})" if each.left_out else ""), *test, Cell(each.verdict),
        ])  # fmt: skip
    header = [f"{_axis(grid.axes.rows)}, first − second", *([_axis(grid.axes.columns)] if grid.axes.columns else [])]
    where = grid.where(view) or "Differences"
    caption = f"{where}: difference in {metric.unit} with its 95 % interval"
    adjusted = f"p is adjusted by Holm over the {plural(family.tested, 'comparison')} of this table"
    note = f"{family.how}; {adjusted}" if family.tested else family.how
    return Table(caption, [*header, "difference", "n", "p", "p, adjusted", f"at {ALPHA:g}"], body, note, folded)


def sensitivity(grid: Grid, found: Mapping[str, Mapping[str, Sensitivity | str]]) -> Table:
    """Make the table of ranges over the columns, of views by row."""
    metric = grid.metric(next(iter(found)))
    views = [grid.where(view).lower() if view == AVERAGE else view or "range" for view in found]
    body = []
    for row in grid.rows:
        cells = [Cell(row)]
        for view in found:
            each, digits = found[view][row], grid.metric(view).digits
            if isinstance(each, str):
                cells.append(Cell("missing", f"({each.rstrip('.')})", mark="missing"))
                continue
            n = f"n = {sum(each.seeds.values())}"
            cells.append(
                Cell(f"{each.range.value:.{digits}f}", f"{_interval(each.range, digits)}, {n}", each.range.value)
            )
        body.append(cells)
    name = plural(len(grid.columns), grid.axes.columns or "column")
    caption = (
        f"Best less worst of {name}, in {metric.unit}, without what seeds add to it, with its 95 % interval; "
        "n counts runs"
    )
    return Table(caption, [_axis(grid.axes.rows), *views], body)


def ranks(grid: Grid, found: Mapping[str, Ranking | str]) -> Table:
    """Make the table of mean ranks over tasks."""
    body = []
    for row in grid.rows:
        cells = [Cell(row)]
        for each in found.values():
            if isinstance(each, str) or row not in each.ranks:
                cells.append(
                    Cell("missing", f"({each.rstrip('.')})" if isinstance(each, str) else "(0)", mark="missing")
                )
                continue
            place, best = each.ranks[row], min(estimate.value for estimate in each.ranks.values())
            small = f"{_interval(place, 1)}, n = {len(each.tasks)}"
            cells.append(Cell(f"{place.value:.1f}", small, place.value, "best" if place.value == best else ""))
        body.append(cells)
    caption = "Mean rank over tasks, 1 the best, with its 95 % interval for other tasks like these; n counts tasks"
    return Table(caption, [_axis(grid.axes.rows), *_headers(grid)], body)


def costs(grid: Grid) -> Table | None:
    """Make the table of what a run costs, by row; ``None`` where nothing is known."""
    runs = {
        row: [r for (first, _, _), cell in grid.cells.items() if first == row for r in cell.values()]
        for row in grid.rows
    }
    found = {name for each in runs.values() for run in each for name in run.cost}
    names = [*(name for name in COSTS if name in found), *sorted(found - set(COSTS))]
    if not names:
        return None
    body = []
    for row, each in runs.items():
        cells = [Cell(row)]
        for name in names:
            factor, digits, _ = COSTS.get(name, (1.0, 1, ""))
            values = [factor * run.cost[name] for run in each if run.state == "finished" and name in run.cost]
            if values:
                spread = f"± {np.std(values, ddof=1):,.{digits}f} " if len(values) > 1 else ""
                cells.append(Cell(f"{np.mean(values):,.{digits}f}", f"{spread}({len(values)})", float(np.mean(values))))
            else:
                cells.append(Cell("missing", "(0)", mark="missing"))
        body.append(cells)
    header = [COSTS[name][2] if name in COSTS else f"{spoken(name)} (as logged)" for name in names]
    return Table(
        "Cost of a run: mean ± standard deviation over its finished runs (n)", [_axis(grid.axes.rows), *header], body
    )


def missing(runs: Sequence[Run], metric_of: Mapping[str, str], task: str | None) -> Table | None:
    """Make the table of runs without a value; ``None`` where all have one."""
    body = []
    for run in runs:
        metric = metric_of[run.factors.get(task, "none") if task else ""]
        if value_of(run, metric) is None:
            factors = ", ".join(f"{spoken(name)} {level}" for name, level in run.factors.items())
            body.append([Cell(run.name), Cell(factors), Cell(why_missing(run, metric)), Cell(run.reason or "")])
    return (
        Table("Runs without a value, which no mean contains", ["run", "factors", "state", "last lines"], body)
        if body
        else None
    )


def _alike(one: float, other: float, metric: Metric) -> bool:
    """Return whether two means are shown as the same number."""
    return f"{one:.{metric.digits}f}" == f"{other:.{metric.digits}f}"


def _headers(grid: Grid) -> list[str]:
    return [column or "score" for column in grid.columns]


def _axis(name: str | None) -> str:
    return spoken(name) if name else "run"


def _interval(estimate: Estimate, digits: int, signed: bool = False) -> str:
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{estimate.low:{form}} to {estimate.high:{form}}"


def _p(value: float | None) -> Cell:
    return (
        Cell("none", mark="missing")
        if value is None
        else Cell("< 0.0001" if value < 1e-4 else f"{value:.2g}", "", value)
    )
