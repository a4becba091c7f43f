"""Internal: what a report consists of, whatever it is written as."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Cell", "Document", "Figure", "Section", "Table"]


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        text: what it says first.
        small: spread, interval and n.
        value: what a column is sorted by.
        mark: "best" of its column, or "missing".
    """

    text: str
    small: str = ""
    value: float | None = None
    mark: Literal["", "best", "missing"] = ""


@dataclass(frozen=True)
class Table:
    """A table with its caption, which has the units.

    Args:
        caption: what it shows.
        header: of each column.
        rows: cells; the first of each names the row.
        note: how it was made.
        folded: whether a page shows it on demand.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure with its caption.

    Args:
        name: of its files.
        caption: what it shows.
        draw: draws it onto a matplotlib Axes.
        height: in inches; all are of one width.
    """

    name: str
    caption: str
    draw: Callable[[Any], None]
    height: float


@dataclass(frozen=True)
class Section:
    """A part of the report: sentences, figures, tables."""

    title: str
    sentences: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Document:
    """A report.

    Args:
        title: of the study.
        summary: what was run.
        answers: what came out, a heading (empty for a single one) and sentences each.
        figures: that belong to the answers.
        sections: the rest.
    """

    title: str
    summary: Sequence[str]
    answers: Sequence[tuple[str, Sequence[str]]]
    figures: Sequence[Figure]
    sections: Sequence[Section]
