"""Report of a study: what came out in words, figures and tables, as HTML, Markdown, LaTeX, CSV, SVG and PNG."""

from ildistil.study.report.build import build
from ildistil.study.report.document import Document
from ildistil.study.report.render import FORMATS, write

__all__ = ["FORMATS", "Document", "build", "write"]
