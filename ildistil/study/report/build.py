"""Internal: from runs to the document."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ildistil.errors import DataError
from ildistil.study.report import analysis, figures, tables, words
from ildistil.study.report.document import Document, Figure, Section, Table
from ildistil.study.report.grid import Grid, find_axes, grids, plural, scaled, spoken
from ildistil.study.runs import Run

__all__ = ["build"]


def build(
    runs: Sequence[Run],
    title: str,
    metrics: Mapping[str, str] | None = None,
    rows: str | None = None,
    columns: str | None = None,
    best_over: Sequence[str] = (),
    baseline: str | None = None,
    draws: int = 10_000,
) -> Document:
    """Make the report of a study's runs.

    Args:
        runs: all of them, also those without a value.
        title: of the study.
        metrics: task to the metric that is compared; the key "" for all others.
        rows: factor that is compared; by default the objective, or else the first that varies.
        columns: factor beside it; by default the initialisation, or else the next that varies.
        best_over: factors of which each cell takes its best level; by default each level is reported by itself.
        baseline: level of ``rows`` that all others are compared with; by default all are compared with each other.
        draws: resamples of the bootstrap.

    Raises:
        DataError: there are no runs, or two of the same factors.
        ConfigError: a factor, metric or baseline that isn't there.
    """
    if not runs:
        raise DataError("There are no runs to report. Run the study first.")
    axes = find_axes(runs, rows, columns, best_over)
    found = grids(runs, axes, metrics or {})
    answers: list[tuple[str, Sequence[str]]] = []
    leading: list[Figure] = []
    sections: list[Section] = []
    for grid in found:
        heading = ", ".join(f"{spoken(name)} {level}" for name, level in grid.block.items())
        part = _Part(grid, heading, baseline, draws)
        answers += part.answers()
        leading += part.leading()
        sections += part.sections()
    names = {task: metric.name for grid in found for task, metric in grid.metrics.items()}
    absent = tables.missing(runs, names, axes.task)
    said = "" if absent else "Every run of the study is finished and has a value."
    sections.append(Section("Missing runs", [said] if said else [], tables=[absent] if absent else []))
    count = iter(range(1, 1_000_000))
    leading = [replace(each, name=f"{next(count):02d}-{each.name}") for each in leading]
    sections = [
        replace(part, figures=[replace(each, name=f"{next(count):02d}-{each.name}") for each in part.figures])
        for part in sections
    ]
    return Document(title, words.summary(runs, axes, found), answers, leading, sections)


class _Part:
    """What is said of one grid."""

    def __init__(self, grid: Grid, heading: str, baseline: str | None, draws: int) -> None:
        self.grid, self.heading = grid, heading
        self.families = {view: analysis.compare_all(grid, view, baseline, draws) for view in grid.views}
        self.sensitive = {view: analysis.sensitivities(grid, view) for view in grid.views} if grid.varies else {}

    @property
    def main(self) -> tuple[str, ...]:
        """The average over tasks where there is one, else each task."""
        return self.grid.views[:1] if len(self.grid.views) > len(self.grid.tasks) else self.grid.tasks

    def answers(self) -> list[tuple[str, Sequence[str]]]:
        told: list[tuple[str, Sequence[str]]] = []
        for view in self.main:
            heading = ", ".join(each for each in (self.heading, view if len(self.main) > 1 else "") if each)
            sensitive = self.sensitive.get(view, {})
            told.append((heading, words.answers(self.grid, view, self.families[view], sensitive)))
        return told

    def leading(self) -> list[Figure]:
        return [self._named(figures.scores(self.grid, view)) for view in self.main if self._known(view)]

    def sections(self) -> list[Section]:
        parts = [self._scores(), self._differences(), self._ranks(), self._sensitivity(), self._curves(), self._cost()]
        parts.append(self._others())
        return [self._section(part) for part in parts if part.sentences or part.figures or part.tables]

    def _scores(self) -> Section:
        grid = self.grid
        drawn = [figures.scores(grid, view) for view in grid.views if view not in self.main and self._known(view)]
        legend = [
            "Each cell: mean ± standard deviation over seeds (n). Bold: the best mean of its column, however close the "
            "others are. A missing cell was planned and has no value; one that was not run is not part of the study.",
        ]
        if grid.views[0] not in grid.tasks:
            legend.append("The mean over tasks is of the seeds that have a value on every task.")
        elif len(grid.tasks) > 1:
            legend.append("There is no mean over tasks: their metrics have different directions or units.")
        return Section("Scores", legend, drawn, [tables.scores(grid, view) for view in grid.views])

    def _differences(self) -> Section:
        grid = self.grid
        if len(grid.rows) < 2:
            return Section("Differences")
        shown = [
            tables.differences(grid, view, family, folded=view not in self.main)
            for view, family in self.families.items()
        ]
        return Section(
            "Differences",
            [words.verdict(self.families[view]) for view in self.main[:1]] if len(self.main) == 1 else [],
            tables=shown,
        )

    def _ranks(self) -> Section:
        grid = self.grid
        if len(grid.tasks) < 2 or len(grid.rows) < 2:
            return Section("Ranks")
        if len({metric.higher for metric in grid.metrics.values()}) > 1:
            return Section("Ranks", ["There are no ranks over tasks: on some more is better, on some less."])
        found = analysis.rankings(grid)
        drawn = [
            figures.intervals(
                f"ranks-{column or 'all'}", f"{column or 'All'}: mean rank over tasks with its 95 % interval; n = "
                f"{plural(len(each.tasks), 'task')}", "mean rank (1 is best)", each.ranks,
            )
            for column, each in found.items() if not isinstance(each, str)
        ]  # fmt: skip
        return Section(
            "Ranks", words.ranking(grid, found, analysis.friedmans(grid)), drawn, [tables.ranks(grid, found)]
        )

    def _sensitivity(self) -> Section:
        grid, drawn = self.grid, []
        if not self.sensitive:
            return Section("Sensitivity")
        name = spoken(grid.axes.columns or "")
        for view in self.main:
            known = {row: each for row, each in self.sensitive[view].items() if not isinstance(each, str)}
            n = plural(sum(sum(each.seeds.values()) for each in known.values()), "run")
            caption = f"{grid.where(view) or 'All runs'}: best less worst {name}, with its 95 % interval; n = {n}"
            unit = f"range over {plural(len(grid.columns), name)} ({grid.metric(view).unit})"
            if known:
                ranges = {row: each.range for row, each in known.items()}
                drawn.append(figures.intervals(f"sensitivity-{view or 'all'}", caption, unit, ranges))
        return Section(f"Sensitivity to the {name}", figures=drawn, tables=[tables.sensitivity(grid, self.sensitive)])

    def _curves(self) -> Section:
        return Section("Learning curves", words.curves(self.grid), figures.curves(self.grid))

    def _cost(self) -> Section:
        shown = tables.costs(self.grid)
        drawn = [figure for view in self.main[:1] if (figure := figures.cost(self.grid, view))]
        return Section("Cost", words.cost(self.grid), drawn, [shown] if shown else [])

    def _others(self) -> Section:
        """Return all else that was measured, on demand."""
        shown: list[Table] = []
        for task in self.grid.tasks:
            runs = [run for (_, _, of), cell in self.grid.cells.items() if of == task for run in cell.values()]
            names = dict.fromkeys(name for run in runs for name in run.metrics if name != self.grid.metrics[task].name)
            shown += [tables.scores(self.grid, task, scaled(name, runs)) for name in names]
        return Section("Other metrics", tables=shown)

    def _known(self, view: str) -> bool:
        return any(self.grid.scores(row, column, view) for row in self.grid.rows for column in self.grid.columns)

    def _section(self, part: Section) -> Section:
        title = f"{part.title}: {self.heading}" if self.heading else part.title
        return Section(title, part.sentences, [self._named(figure) for figure in part.figures], part.tables)

    def _named(self, figure: Figure) -> Figure:
        return replace(figure, caption=f"{self.heading}: {figure.caption}") if self.heading else figure
