"""Internal: a document as files."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ildistil import storage
from ildistil.errors import ConfigError, writing
from ildistil.study.report import figures
from ildistil.study.report.document import Document, Figure, Table
from ildistil.study.runs import Run, write_csv

__all__ = ["FORMATS", "write"]

#: What a report can be written as.
FORMATS = ("html", "md", "tex", "csv", "svg", "png")
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "×": r"$\times$", "−": r"$-$", "|": r"\textbar{}",
}  # fmt: skip


def write(document: Document, runs: Sequence[Run], folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write a document; the same runs give the same bytes.

    Args:
        document: of `build`.
        runs: for the table of all runs.
        folder: is made if it isn't there.
        formats: some of ``FORMATS``.

    Returns:
        The files.

    Raises:
        ConfigError: an unknown format, or figures without matplotlib.
        WriteError: the folder can't be written.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ConfigError(f"There is no format {unknown[0]!r}. There are: {', '.join(FORMATS)}.")
    drawn = _figures(document)
    if drawn and not figures.available() and set(formats) & {"html", "svg", "png"}:
        raise ConfigError(
            "Figures are drawn by matplotlib, which is not installed: pip install 'ildistil[report]', or ask for the "
            "formats md, tex and csv alone."
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = {f"report.{kind}": _page(document, kind, formats) for kind in ("html", "md", "tex") if kind in formats}
    for figure in drawn:
        if "svg" in formats:
            files[f"figures/{_file_name(figure)}.svg"] = figures.svg(figure)
    for name, text in files.items():
        storage.write_text(folder / name, text)
    written = [folder / name for name in files]
    for figure in drawn if "png" in formats else ():
        written.append(folder / "figures" / f"{_file_name(figure)}.png")
        with writing(written[-1]), storage.replacing(written[-1]) as draft:
            draft.write_bytes(figures.png(figure))
    if "csv" in formats:
        written.append(folder / "runs.csv")
        write_csv(runs, written[-1])
    return written


def _page(document: Document, kind: str, formats: Sequence[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"), autoescape=kind == "html",
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        variable_start_string="<<" if kind == "tex" else "{{", variable_end_string=">>" if kind == "tex" else "}}",
    )  # fmt: skip
    environment.filters |= {"tex": _tex, "md": _md, "inline": _inline, "file": _file_name, "columns": _columns}
    pictures = next((each for each in ("png", "svg") if each in formats), None)
    return environment.get_template(f"report.{kind}.jinja").render(document=document, pictures=pictures)


def _figures(document: Document) -> list[Figure]:
    return [*document.figures, *(figure for section in document.sections for figure in section.figures)]


def _inline(figure: Figure) -> Markup:
    return Markup(figures.inline(figures.svg(figure), _slug(figure.name), figure.caption))


def _slug(text: str) -> str:
    """Return a name that files and anchors may have."""
    return re.sub(r"[^\w]+", "-", text, flags=re.ASCII).strip("-").lower() or "all"


def _file_name(figure: Figure) -> str:
    return _slug(figure.name)


def _tex(text: Any) -> str:
    return "".join(_TEX.get(letter, letter) for letter in str(text).replace("\n", " "))


def _columns(table: Table) -> str:
    """Return the columns of a LaTeX table; long texts are broken into lines."""
    lengths = [max(len(cell.text) + len(cell.small) for cell in column) for column in zip(*table.rows, strict=True)]
    return "".join("l" if length < 50 else r"p{5cm}" for length in lengths)


def _md(text: Any) -> str:
    """Escape what Markdown and the HTML in it would read."""
    escaped = re.sub(r"([\\`*_\[\]|#~])", r"\\\1", str(text).replace("\n", " "))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
