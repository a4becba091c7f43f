"""Internal: sentences that follow from the numbers."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ildistil.study import statistics
from ildistil.study.report.analysis import ALPHA, Difference, Family, compare_sensitivities, mean_of
from ildistil.study.report.grid import AVERAGE, Axes, Grid, Metric, plural, spoken, value_of
from ildistil.study.report.tables import COSTS
from ildistil.study.runs import Run

__all__ = ["answers", "cost", "curves", "sensitivity", "summary"]


def summary(runs: Sequence[Run], axes: Axes, found: Sequence[Grid]) -> list[str]:
    """Return what was run, how much of it is there, and what the axes are taken for."""
    metrics = {task: metric.name for grid in found for task, metric in grid.metrics.items()}
    have = sum(
        value_of(run, metrics[run.factors.get(axes.task, "none") if axes.task else ""]) is not None for run in runs
    )
    states = Counter(run.state for run in runs)
    odd = [f"{states[state]} {state}" for state in ("failed", "running", "waiting") if states[state]]
    if without := states["finished"] - have:
        odd.append(f"{without} finished without a finite value")
    named = [name for name in (axes.rows, axes.columns, axes.task, *axes.seeds, *axes.blocks, *axes.best_over) if name]
    sizes = [plural(len({run.factors.get(name, "none") for run in runs}), name) for name in named]
    told = [
        f"{have} of {plural(len(runs), 'run')} with a value{f' ({_listed(odd)})' if odd else ''}: {' × '.join(sizes)}."
    ]
    if len(set(metrics.values())) == 1:
        told.append(f"Measured: {found[0].metric(found[0].tasks[0]).label}, on the validation set.")
    else:
        each = _listed([f"{task} {found[0].metrics[task].label}" for task in found[0].tasks])
        told.append(f"Measured on the validation sets: {each}.")
    if axes.same:
        told.append(f"The same in all runs: {_listed([f'{spoken(n)} {level}' for n, level in axes.same.items()])}.")
    if axes.blocks:
        names = _listed([spoken(name) for name in axes.blocks])
        told.append(f"Each {names} is reported by itself: none is chosen by its result.")
    if axes.best_over:
        names = _listed([spoken(name) for name in axes.best_over])
        told.append(
            f"Each cell is of the {names} with the best mean on the validation set, and names it; being chosen so, "
            "these means are a little too high."
        )
    if len(axes.seeds) > 1:
        told.append(
            f"n counts combinations of {_listed([spoken(name) for name in axes.seeds])}; those that share one of them "
            "are not independent, so that intervals over them are too narrow."
        )
    if not axes.seeds:
        told.append("One seed: no spread between runs can be told, and nothing is tested over seeds.")
    return told


def answers(grid: Grid, view: str, family: Family, sensitive: Mapping[str, statistics.Sensitivity | str]) -> list[str]:
    """Return what came out, effect and interval first."""
    if not any(grid.scores(row, column, view) for row in grid.rows for column in grid.columns):
        return ["No run has a value yet, so that nothing can be compared."]
    told = [_best_of(grid, view, column, family) for column in grid.columns]
    if len(grid.rows) > 1:
        told.insert(0, _headline(grid, view, family))
    return [*told, *sensitivity(grid, view, sensitive)]


def _headline(grid: Grid, view: str, family: Family) -> str:
    """Return which rows come first in how many columns, and how many comparisons hold."""
    firsts = Counter(order[0] for column in grid.columns if (order := _ordered(grid, column, view)))
    named = [f"{row} with {plural(count, grid.axes.columns or '')}" if grid.varies else row
             for row, count in firsts.most_common()]  # fmt: skip
    by = grid.metric(view).label if view == AVERAGE or len(grid.tasks) == 1 else f"{grid.metric(view).label} on {view}"
    return f"First of {_sorts(grid)}, by {by}: {_listed(named)}. {verdict(family)}"


def _ordered(grid: Grid, column: str, view: str) -> list[str]:
    """Return the rows that have a value, the best first."""
    sign = -1 if grid.metric(view).higher else 1
    means = {row: mean for row in grid.rows if (mean := mean_of(grid.scores(row, column, view))) is not None}
    return sorted(means, key=lambda row: sign * means[row])


def _best_of(grid: Grid, view: str, column: str, family: Family) -> str:
    metric, order = grid.metric(view), _ordered(grid, column, view)
    where = f"{_upper(spoken(grid.axes.columns))} {column}: " if grid.axes.columns else ""
    if not order:
        return f"{where}no run has a value."
    reached = _reached(grid.scores(order[0], column, view), metric.digits)
    if len(order) == 1:
        other = f"; no other {spoken(grid.axes.rows or 'run')} has a value" if len(grid.rows) > 1 else ""
        return f"{where}{order[0] or 'the run'} reaches {reached}{other}."
    found = family.between(column, order[0], order[1])
    if found is None:
        second = _reached(grid.scores(order[1], column, view), metric.digits)
        return f"{where}{order[0]} is first with {reached}, {order[1]} second with {second}; they weren't compared."
    return f"{where}{order[0]} is first with {reached}. {_difference(found, metric)}"


def _difference(found: Difference, metric: Metric) -> str:
    start = f"{found.first} less {found.second}, the second"
    if found.value is None or isinstance(found.interval, str):
        value = "no difference" if found.value is None else f"{found.value:+.{metric.digits}f} {metric.unit}"
        return f"{start}: {value}, {found.n}; no interval and no test, {found.interval}."
    text = f"{start}: {_estimate(found.interval, metric)}; {found.n}"
    if found.adjusted is not None:
        whole = found.adjusted.describe(ALPHA).split(";")[0]
        text += f"; {whole if found.adjusted.family > 1 else whole.split(',')[0]}"
        if found.adjusted.smallest > ALPHA:
            text += f"; so few pairs give no p below {found.adjusted.smallest:.3g}"
    meaning = {"differ": ". The two differ", "open": ". Which of the two is better stays open"}
    return f"{text}{meaning.get(found.verdict, '')}."


def sensitivity(grid: Grid, view: str, given: Mapping[str, statistics.Sensitivity | str]) -> list[str]:
    """Return how much the columns decide, and for which row least and most."""
    if not given:
        return []
    name, metric = spoken(grid.axes.columns or ""), grid.metric(view)
    found = {row: each for row, each in given.items() if not isinstance(each, str)}
    if not found:
        return [
            f"How much the {name} decides can't be told: no {spoken(grid.axes.rows or 'row')} has two seeds of each."
        ]
    order = sorted(found, key=lambda row: found[row].range.value)
    least, most = order[0], order[-1]

    def told(row: str) -> str:
        each = found[row]
        return f"{row} ({_estimate(each.range, metric, '')}, n = {sum(each.seeds.values())})"

    if len(order) == 1:
        return [f"Best less worst of {plural(len(grid.columns), name)}: {told(least)}."]
    text = f"Best less worst of {plural(len(grid.columns), name)}: least for {told(least)}, most for {told(most)}"
    pairs = compare_sensitivities(grid, view)
    if between := pairs.get((most, least)):
        text += f"; difference {_estimate(between[0].range, metric)}, {between[1].describe(ALPHA)}"
    return [f"{text}."]


def verdict(family: Family) -> str:
    """Return how many of the comparisons differ, are open, or can't be told."""
    counts = Counter(each.verdict for each in family.differences)
    words = {
        "differ": f"differ at {ALPHA:g} after adjustment",
        "open": "stay open",
        f"cannot reach {ALPHA:g}": f"cannot reach {ALPHA:g} with so few pairs",
        "not tested": "could not be tested for want of pairs",
    }
    each = _listed([f"{counts[kind]} {meaning}" for kind, meaning in words.items() if counts[kind]])
    return f"Of {plural(len(family.differences), 'comparison')}, {each}."


def ranking(grid: Grid, found: Mapping[str, statistics.Ranking | str],
            tests: Mapping[str, statistics.Friedman | str]) -> list[str]:  # fmt: skip
    """Return whether the tasks agree on the ranks, for each column."""
    told = []
    for column, each in found.items():
        where = f"{spoken(grid.axes.columns)} {column}: " if grid.axes.columns else ""
        test = tests[column]
        words = (
            test.describe() if not isinstance(test, str) else f"whether tasks agree isn't tested ({test.rstrip('.')})"
        )
        left = (
            f"; left out, as not all have them (row, task, seed): {', '.join(each.left_out)}"
            if not isinstance(each, str) and each.left_out
            else ""
        )
        told.append(f"{_upper(where + words)}{left}.")
    return told


def cost(grid: Grid) -> list[str]:
    """Return which rows take most and least time, and how many teacher runs were saved."""
    runs = [run for cell in grid.cells.values() for run in cell.values() if run.state == "finished"]
    told = []
    seconds = {
        row: [run.cost["seconds"] for (first, _, _), cell in grid.cells.items() if first == row
              for run in cell.values() if run.state == "finished" and "seconds" in run.cost]
        for row in grid.rows
    }  # fmt: skip
    means = {row: float(np.mean(each)) for row, each in seconds.items() if each}
    if means:
        total, count = sum(sum(each) for each in seconds.values()), sum(map(len, seconds.values()))
        told.append(f"{_duration(total)} in total, over {plural(count, 'finished run')}.")
    if len(means) > 1:
        fast, slow = min(means, key=lambda row: means[row]), max(means, key=lambda row: means[row])
        ratio = f", {means[slow] / means[fast]:.1f} times as long" if means[fast] > 0 else ""
        told.append(
            f"A run took {_duration(means[slow])} with {slow} (n = {len(seconds[slow])}){ratio} as with {fast}, "
            f"{_duration(means[fast])} (n = {len(seconds[fast])})."
        )
    saved = [(run.cost.get("teacher_runs", 0.0), run.cost["teacher_runs_saved"]) for run in runs
             if "teacher_runs_saved" in run.cost]  # fmt: skip
    if saved and (everything := sum(map(sum, saved))):
        total = sum(kept for _, kept in saved)
        told.append(
            f"{total:,.0f} of {everything:,.0f} teacher runs ({100 * total / everything:.0f} %) were read from stored "
            "targets."
        )
    known = {name for run in runs for name in run.cost}
    if shared := sorted(known - set(COSTS)):
        told.append(
            f"What several runs may share stands with each of them, and isn't summed: {', '.join(map(spoken, shared))}."
        )
    return told


def curves(grid: Grid) -> list[str]:
    """Return whether training was still gaining when it ended."""
    told = []
    for task in grid.tasks:
        metric, gains = grid.metric(task), {}
        for row in grid.rows:
            for column in grid.columns:
                ends = [
                    points[-1] - points[-2]
                    for run in grid.planned(row, column, task).values()
                    if len(points := [metric.scale * p[metric.name] for p in run.curve if metric.name in p]) > 1
                    and run.state == "finished" and np.isfinite(points[-2:]).all()
                ]  # fmt: skip
                if ends:
                    gains[grid.label(row, column)] = ends
        if not gains:
            continue
        everything = [gain for each in gains.values() for gain in each]
        steepest = max(gains, key=lambda name: (1 if metric.higher else -1) * float(np.mean(gains[name])))
        on = f"{task}: between" if task else "Between"
        told.append(
            f"{on} the last two validations the metric changed by {np.mean(everything):+.{metric.digits}f} "
            f"{metric.unit} on average (n = {len(everything)}); it gained most with {steepest or 'the run'}, "
            f"{np.mean(gains[steepest]):+.{metric.digits}f} (n = {len(gains[steepest])})."
        )
    return told


def _reached(scores: Mapping[str, float], digits: int) -> str:
    values = list(scores.values())
    if len(values) < 2:
        return f"{mean_of(scores):.{digits}f} (n = 1)"
    mean = statistics.summarise(values).mean
    return f"{mean.value:.{digits}f} (95 % interval {mean.low:.{digits}f} to {mean.high:.{digits}f}, n = {len(values)})"


def _estimate(estimate: statistics.Estimate, metric: Metric, sign: str = "+") -> str:
    value, low, high = (f"{each:{sign}.{metric.digits}f}" for each in (estimate.value, estimate.low, estimate.high))
    return f"{value} {metric.unit} (95 % interval {low} to {high})"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _p(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.2g}"


def _sorts(grid: Grid) -> str:
    return plural(len(grid.rows), grid.axes.rows or "run")


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + (" and " if len(words) > 1 else "") + words[-1] if words else ""


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
