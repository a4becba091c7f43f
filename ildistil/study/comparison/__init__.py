"""Comparisons of exported models: is the student as good as its teacher, where not, and what does it cost?"""

from ildistil.study.comparison.build import compare_models
from ildistil.study.comparison.content import Report
from ildistil.study.comparison.document import document, kept_in_words
from ildistil.study.comparison.writing import as_markdown, as_text, write_json, write_markdown

__all__ = [
    "Report",
    "as_markdown",
    "as_text",
    "compare_models",
    "document",
    "kept_in_words",
    "write_json",
    "write_markdown",
]
