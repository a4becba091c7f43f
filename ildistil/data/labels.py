"""Labels as people write them (words or numbers) to what a model is trained on, with errors that name the row."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

from ildistil.data.files import ROWS_FROM_ZERO
from ildistil.errors import DataError

#: How data sets mark a label that is kept secret (GLUE's test sets).
HIDDEN = -1


def derive_label_names(values: Sequence[Any], where: str) -> list[str]:
    """Return the distinct labels of a train file, sorted: by number if all are whole numbers, else as words.

    Args:
        values: The label column.
        where: How messages name the column and the file.

    Raises:
        DataError: A label is missing, there is only one, or they look like numbers on a scale.

    >>> derive_label_names(["no", "yes", "no"], "label")
    ['no', 'yes']
    >>> derive_label_names([10, 2, 2.0], "label")
    ['2', '10']
    """
    for row, value in enumerate(values):
        if _missing(value) or value == "":
            raise DataError(f"{where}: row {row} ({ROWS_FROM_ZERO}) has no label. Fill it in or remove the row.")
    words = {_word(value) for value in values}
    if len(words) < 2:
        raise DataError(f"{where}: all rows have the label {next(iter(words))!r}. Two different labels are needed.")
    if all(_whole(word) is not None for word in words):
        return sorted(words, key=int)
    if all(_number(word) is not None for word in words):
        raise DataError(f"{where}: labels such as {min(words)!r} are numbers. For a regression set regression: true.")
    return sorted(words)


def encode_classes(values: Sequence[Any], names: Sequence[str], where: str) -> list[int]:
    """Return the index of every label in the label names.

    A value is a label name, or the index of one. Indices are not accepted where a label name is itself a whole number
    (names 1, 2, 3: is a 1 the first or the second?).

    Raises:
        DataError: A value is neither; the message names the row and the labels that are known.

    >>> encode_classes(["yes", "no"], ["no", "yes"], "label"), encode_classes(["1", 0.0], ["no", "yes"], "label")
    ([1, 0], [1, 0])
    """
    index = {name: i for i, name in enumerate(names)}
    if not any(_whole(name) is not None for name in names):
        index |= {str(i): i for i in range(len(names))}
    codes = [index.get(_word(value), HIDDEN) for value in values]
    if HIDDEN in codes:
        row = codes.index(HIDDEN)
        raise DataError(_unknown_label(row, values[row], names, where))
    return codes


def encode_numbers(values: Sequence[Any], where: str) -> list[float]:
    """Return regression targets as floats.

    Raises:
        DataError: A value is missing, not a number, NaN or infinite; the message names the row.

    >>> encode_numbers(["3.800", 5], "label")
    [3.8, 5.0]
    """
    numbers = [_number(value) for value in values]
    for row, number in enumerate(numbers):
        if number is None or not math.isfinite(number):
            raise DataError(
                f"{where}: row {row} ({ROWS_FROM_ZERO}) has the label {values[row]!r}; a regression needs a finite "
                "number in every row. Correct or remove the row."
            )
    return [number for number in numbers if number is not None]


def all_hidden(values: Sequence[Any]) -> bool:
    """Say whether every label is the mark of a secret one, as in GLUE's test sets."""
    return all(_number(value) == HIDDEN for value in values)


def _unknown_label(row: int, value: Any, names: Sequence[str], where: str) -> str:
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"{where}: row {row} ({ROWS_FROM_ZERO}) has the unknown label {value!r}.{hint} Known labels, in order: "
        f"{', '.join(map(repr, names))} (or their numbers from 0). Correct the row, or label_names where you set them."
    )


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _word(value: Any) -> str:
    """Write a label as a word; 1.0 and True, as JSON or Parquet may give them, are 1."""
    if isinstance(value, bool | float) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _whole(word: str) -> int | None:
    """Read a whole number in its plain form; "01" or "1_0" are words."""
    return int(word) if word.removeprefix("-").isdecimal() and str(int(word)) == word else None


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
