"""The report of a study, from its folder or from a table of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ildistil.study.report import FORMATS, build, write
from ildistil.study.runs import read_csv, read_plan, read_runs

__all__ = ["report"]


def report(
    source: Path,
    output: Path | None = None,
    formats: Sequence[str] = FORMATS,
    title: str | None = None,
    metric: str | None = None,
    rows: str | None = None,
    columns: str | None = None,
    best_over: Sequence[str] = (),
    baseline: str | None = None,
) -> list[Path]:
    """Write the report of a study: what came out in words, figures and tables.

    Args:
        source: the study's folder, or a CSV file in which every run is a line.
        output: folder to write; by default "report" in the study's folder, or a folder beside the file.
        formats: html, md, tex, csv (every run), svg and png (figures).
        title: of the report; by default the name of the source.
        metric: the one that is compared on all tasks; by default each task's own.
        rows: factor that is compared; by default the objective.
        columns: factor beside it; by default the initialisation.
        best_over: factors of which each cell takes its best level, such as learning_rate.
        baseline: level of ``rows`` that all others are compared with, instead of all with each other.

    Returns:
        The files.

    Raises:
        IldistilError: there are no runs, or a factor, metric or format that isn't there.
    """
    is_table = source.suffix == ".csv"
    runs = read_csv(source) if is_table else read_runs(source)
    plan: dict[str, Any] = {"title": source.resolve().stem, "jobs": []} if is_table else read_plan(source)
    metrics = _metrics(plan["jobs"]) if metric is None else {"": metric}
    document = build(runs, title or plan["title"], metrics, rows, columns, best_over, baseline)
    folder = output or (source.with_name(f"{source.stem}-report") if is_table else source / "report")
    return write(document, runs, folder, formats)


def _metrics(jobs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the metric that chooses the best student of each task; of "" where no factor is a task."""
    found = {}
    for job in jobs:
        if job["name"].startswith("runs/") and job["metric"] is not None:
            tasks = [level for name, level in job["factors"].items() if name.split(".")[-1] == "task"]
            found[tasks[0] if tasks else ""] = job["metric"]
    return found
