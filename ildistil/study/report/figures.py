"""Internal: the figures of a report, drawn by matplotlib, the same bytes each time."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np

from ildistil.study import statistics
from ildistil.study.report.document import Figure
from ildistil.study.report.grid import Grid, Metric, plural, spoken
from ildistil.study.report.grid import combinations as combinations_of

__all__ = ["available", "cost", "curves", "inline", "intervals", "png", "scores", "svg"]

#: Series; each is legible on white and on black.
_COLOURS = ("#2d7fc1", "#d9702b", "#2f9c72", "#a463c7", "#b8901f", "#d3547f", "#6b8794", "#8a6d4f")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK, _QUIET = "#1a1b1e", "#7f858c"  # a page replaces them by its own
_WIDTH = 4.1
_STYLE = {
    "font.size": 9, "axes.edgecolor": _QUIET, "axes.linewidth": 0.8, "text.color": _INK, "axes.labelcolor": _INK,
    "xtick.color": _QUIET, "ytick.color": _QUIET, "xtick.labelcolor": _INK, "ytick.labelcolor": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _QUIET, "grid.alpha": 0.25,
    "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8.5, "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "report", "axes.axisbelow": True, "axes.formatter.useoffset": False,
    "font.family": "DejaVu Sans",
}  # fmt: skip


def available() -> bool:
    """Return whether matplotlib is installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    return mpl is not None


def scores(grid: Grid, view: str) -> Figure:
    """Draw means with their intervals, and each seed, rows from top to bottom."""
    metric, series = grid.metric(view), len(grid.columns)
    where = grid.where(view) or "Scores"
    of = f" by {spoken(grid.axes.columns)}" if grid.axes.columns else ""
    n = plural(sum(len(grid.scores(row, c, view)) for row in grid.rows for c in grid.columns), "value")
    caption = f"{where}{of}: {metric.label}; mean with its 95 % interval, and each seed as a stroke; n = {n}"
    return Figure(
        f"scores-{view or 'all'}", caption, partial(_scores, grid, view), 1.3 + 0.17 * len(grid.rows) * (series + 1)
    )


def _scores(grid: Grid, view: str, axes: Any) -> None:
    metric, count = grid.metric(view), len(grid.columns)
    for number, column in enumerate(grid.columns):
        label = f"{spoken(grid.axes.columns)} {column}" if grid.axes.columns else None
        for place, row in enumerate(grid.rows):
            values = list(grid.scores(row, column, view).values())
            if values:
                height = place + (number - (count - 1) / 2) * 0.75 / count
                half = _half(values)
                axes.plot(
                    values, [height] * len(values), ls="", marker="|", ms=8, alpha=0.55, color=_look(number)["color"]
                )
                axes.errorbar(
                    np.mean(values), height, xerr=half, ms=5, mew=0, lw=1.4, ls="", label=label, **_look(number)
                )
                label = None
    _rows(axes, grid.rows)
    axes.set_xlabel(metric.label)
    _legend(axes, count if grid.axes.columns else 0)


def intervals(name: str, caption: str, unit: str, found: Mapping[str, statistics.Estimate]) -> Figure:
    """Draw estimates with their intervals, from top to bottom."""

    def draw(axes: Any) -> None:
        for place, each in enumerate(found.values()):
            axes.plot([each.low, each.high], [place, place], lw=1.4, color=_COLOURS[0])
            axes.plot(each.value, place, ms=5.5, mew=0, **_look(0))
        _rows(axes, list(found))
        axes.set_xlabel(unit)

    return Figure(name, caption, draw, 1.1 + 0.27 * len(found))


def curves(grid: Grid) -> list[Figure]:
    """Draw what was measured over the steps, a figure for each task and column."""
    found = []
    for task, column in product(grid.tasks, grid.columns):
        points = {row: _points(grid, row, column, task, grid.metric(task)) for row in grid.rows}
        if count := sum(max(map(len, each.values()), default=0) for each in points.values()):
            where = ", ".join(each for each in (task, column) if each) or "All runs"
            caption = f"{where}: mean over seeds; shaded, lowest to highest seed; n = {plural(count, 'run')}"
            draw = partial(_curves, points, grid.metric(task))
            found.append(Figure(f"curve-{task}-{column}", caption, draw, 3.1 + 0.1 * len(grid.rows)))
    return found


def _curves(curves: Mapping[str, Mapping[float, Sequence[float]]], metric: Metric, axes: Any) -> None:
    for number, (row, points) in enumerate(curves.items()):
        if points:
            steps = sorted(points)
            low, mean, high = ([f(points[step]) for step in steps] for f in (min, np.mean, max))
            axes.fill_between(steps, low, high, alpha=0.15, lw=0, color=_COLOURS[number % len(_COLOURS)])
            axes.plot(steps, mean, lw=1.3, ms=3.5, mew=0, label=row or None, **_look(number))
    axes.set(xlabel="optimiser steps", ylabel=metric.label)
    _legend(axes, sum(map(bool, curves)))


def _points(grid: Grid, row: str, column: str, task: str, metric: Metric) -> dict[float, list[float]]:
    """Return step to the values of all seeds that were measured there."""
    found: dict[float, list[float]] = {}
    for run in grid.planned(row, column, task).values():
        for point in run.curve:
            value = metric.scale * point.get(metric.name, np.nan)
            if np.isfinite(value) and np.isfinite(point.get("step", np.nan)):
                found.setdefault(point["step"], []).append(value)
    return found


def cost(grid: Grid, view: str) -> Figure | None:
    """Draw scores over the time of a run; ``None`` where no time is known."""
    metric, points = grid.metric(view), []
    for row, column in combinations_of(grid):
        values = grid.scores(row, column, view)
        runs = [run for task in grid.tasks for run in grid.planned(row, column, task).values()]
        seconds = [run.cost["seconds"] for run in runs if run.state == "finished" and "seconds" in run.cost]
        if values and seconds:
            points.append((row, column, float(np.mean(seconds)) / 60, float(np.mean(list(values.values())))))

    def draw(axes: Any) -> None:
        for row, column, minutes, value in points:
            number, shape = grid.rows.index(row), grid.columns.index(column)
            first = column == next(p[1] for p in points if p[0] == row)
            axes.plot(minutes, value, ls="", ms=6, mew=0, alpha=0.85, label=row if first and row else None,
                      marker=_MARKERS[shape % len(_MARKERS)], color=_COLOURS[number % len(_COLOURS)])  # fmt: skip
        axes.set(xlabel="time of a run (minutes)", ylabel=metric.label)
        axes.set_xlim(left=0)
        _legend(axes, len({p[0] for p in points}))

    if not points:
        return None
    shapes = f"; marks differ by {spoken(grid.axes.columns)}" if grid.axes.columns else ""
    caption = f"Means over seeds against the mean time of a run, {plural(len(points), 'cell')} of the table{shapes}"
    return Figure("cost", caption, draw, 3.2 + 0.1 * len(grid.rows))


@lru_cache(maxsize=256)
def svg(figure: Figure) -> str:
    """Return a figure as SVG."""
    data = io.BytesIO()
    _save(figure, data, "svg", {"Date": None, "Creator": None, "Type": None, "Format": None})
    return data.getvalue().decode()


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    data = io.BytesIO()
    _save(figure, data, "png", {"Software": None})
    return data.getvalue()


def inline(text: str, name: str, caption: str) -> str:
    r"""Return SVG for a page: no declarations, ids of its own, and colours that follow the page's.

    >>> inline('<?xml?>\n<svg xmlns="n" width="9pt" height="5pt" viewBox="0 0 9 5"><path id="a"/></svg>', "f", "It")
    '<svg viewBox="0 0 9 5" role="img" aria-label="It"><path id="f-a"/></svg>'
    """
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = (
        re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", text[: text.index(">")]) + text[text.index(">") :]
    )
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text).replace("xlink:href", "href")
    text = text.replace(_INK, "currentColor").replace(_QUIET, "var(--quiet)")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    label = caption.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace(">", f' role="img" aria-label="{label}">', 1).strip()


def _save(figure: Figure, data: io.BytesIO, kind: str, metadata: Mapping[str, Any]) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a reader's font may well have it
        canvas = Canvas(figsize=(_WIDTH, figure.height), layout="constrained")
        figure.draw(canvas.subplots())
        canvas.savefig(data, format=kind, dpi=200, metadata=dict(metadata), transparent=kind == "svg")


def _look(number: int) -> dict[str, Any]:
    return {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}


def _half(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = statistics.summarise(values).mean
    return mean.high - mean.value


def _rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _legend(axes: Any, count: int) -> None:
    """Draw a legend below the axes, which hides nothing there."""
    handles, labels = axes.get_legend_handles_labels()
    if count and labels:
        axes.figure.legend(handles, labels, loc="outside lower left", ncols=2, handlelength=1.4)
