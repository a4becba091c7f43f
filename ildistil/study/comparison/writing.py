"""Internal: a comparison as text, Markdown and JSON."""

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from ildistil import storage
from ildistil.study.comparison.content import Report, as_plain
from ildistil.study.comparison.document import Document, Table
from ildistil.tables import table

__all__ = ["as_markdown", "as_text", "write_json", "write_markdown"]

_WIDTH = 120


def as_text(document: Document) -> str:
    """Return a report for the terminal; the last column of a wide table is cut."""
    lines = [*_wrapped(document.summary), ""]
    for answer in document.answers:
        lines += _wrapped(answer)
    for section in document.sections:
        lines += ["", section.title]
        lines += [line for sentence in section.sentences for line in _wrapped(sentence, "  ")]
        for each in section.tables:
            lines += [f"  {each.caption}:", *(f"    {line}" for line in _cut(each))]
    return "\n".join(lines)


def as_markdown(document: Document) -> str:
    """Return a report as a page."""
    parts = [f"# {_escaped(document.title)}", _escaped(document.summary)]
    parts.append("\n".join(f"- {_escaped(answer)}" for answer in document.answers))
    for section in document.sections:
        parts += [f"## {_escaped(section.title)}", *map(_escaped, section.sentences)]
        for each in section.tables:
            rows = [each.header, ["---"] * len(each.header), *each.rows]
            lines = [f"| {' | '.join(cell if cell == '---' else _escaped(cell) for cell in row)} |" for row in rows]
            parts += [f"**{_escaped(each.caption)}**", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_json(report: Report, path: str | Path) -> None:
    """Write the content of a comparison.

    Raises:
        WriteError: The file can't be written.
    """
    storage.write_text(Path(path), json.dumps(as_plain(report), indent=2, ensure_ascii=False) + "\n")


def write_markdown(document: Document, path: str | Path) -> None:
    """Write a report as a page.

    Raises:
        WriteError: The file can't be written.
    """
    storage.write_text(Path(path), as_markdown(document))


def _wrapped(sentence: str, indent: str = "") -> list[str]:
    return textwrap.wrap(sentence, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _cut(each: Table) -> Iterator[str]:
    rows: Sequence[Sequence[str]] = [[" ".join(cell.split()) for cell in row] for row in each.rows]
    for line in table(each.header, rows).splitlines():
        yield line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4].rstrip()} ..."


def _escaped(text: str) -> str:
    r"""Escape what Markdown, and the HTML in it, would read.

    >>> print(_escaped("a|b <c> *d*"))
    a\|b &lt;c&gt; \*d\*
    """
    text = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
