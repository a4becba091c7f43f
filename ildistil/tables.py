"""Aligned text tables."""

from collections.abc import Iterable, Sequence

__all__ = ["table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right.

    >>> print(table(("name", "value"), [("a", "1.0"), ("long", "-22.5")]))
    name  value
    a       1.0
    long  -22.5
    """
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = [i > 0 and all(_is_number(line[i]) for line in lines[1:]) for i in range(len(header))]
    aligned = ("  ".join(_pad(*cell) for cell in zip(line, widths, right, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def _is_number(text: str) -> bool:
    return text.replace(",", "").removesuffix(" M").removesuffix(" %").lstrip("-+").replace(".", "", 1).isdigit()


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
