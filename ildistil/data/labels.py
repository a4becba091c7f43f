"""Labels as people write them (words or numbers) to what a model is trained on, with errors that name the row."""

import math
from collections.abc import Sequence
from numbers import Number
from typing import Any

import torch

from ildistil.data.files import ROWS_FROM_ZERO, quoted, similar
from ildistil.errors import DataError

#: How data sets mark a label that is kept secret (GLUE's test sets).
HIDDEN = -1


def derive_label_names(values: Sequence[Any], where: str) -> list[str]:
    """Return the distinct labels of a train file, sorted: by number if all are whole numbers, else as words.

    Args:
        values: The label column.
        where: Name of column and file in messages.

    Raises:
        DataError: A label is missing, marks a missing value or is no word or number; there is only one; two differ in
            case or blanks only; or they look like numbers on a scale.

    >>> derive_label_names(["no", "yes", "no"], "label")
    ['no', 'yes']
    >>> derive_label_names([10, 2, 2.0], "label")
    ['2', '10']
    """
    words = set(_words(values, where))
    if len(words) < 2:
        raise DataError(f"{where}: all rows have the label {next(iter(words))!r}. Two different labels are needed.")
    if all(_whole(word) is not None for word in words):
        return sorted(words, key=int)
    by_letters: dict[str, str] = {}
    for word in sorted(words):
        like = by_letters.setdefault(word.strip().casefold(), word)
        if word != like or like.casefold() in ("nan", "null"):
            doubt = f"is {like!r} but for case or blanks" if word != like else "marks a missing value in many files"
            raise DataError(f"{where}: the label {word!r} {doubt}. Correct the file, or set label_names.")
    if all(_number(word) is not None for word in words):
        raise DataError(f"{where}: labels such as {min(words)!r} are numbers. For a regression set regression: true.")
    return sorted(words)


def encode_classes(values: Sequence[Any], names: Sequence[str], where: str) -> list[int]:
    """Return the index of every label in the label names.

    A value is a label name, or the index of one. Indices are not accepted where a label name is itself a whole number
    (names 1, 2, 3: is a 1 the first or the second?). A truth value is the name "true" or "false" if there is one.

    Raises:
        DataError: A value is missing or neither; the message names the row and the labels that are known.

    >>> encode_classes(["yes", "no"], ["no", "yes"], "label"), encode_classes(["1", 0.0], ["no", "yes"], "label")
    ([1, 0], [1, 0])
    """
    index = {name: i for i, name in enumerate(names)}
    if not any(_whole(name) is not None for name in names):
        index |= {str(i): i for i in range(len(names))}
    truth = {name.lower(): i for i, name in enumerate(names) if name.lower() in ("true", "false")}
    codes = [
        truth.get(str(value).lower(), HIDDEN) if truth and isinstance(value, bool) else index.get(word, HIDDEN)
        for value, word in zip(values, _words(values, where), strict=True)
    ]
    if HIDDEN in codes:
        row = codes.index(HIDDEN)
        raise DataError(_unknown_label(row, values[row], names, where))
    return codes


def encode_numbers(values: Sequence[Any], where: str) -> list[float]:
    """Return regression targets as floats.

    Raises:
        DataError: A value is missing, not a number, or not finite in float32; the message names the row.

    >>> encode_numbers(["3.800", 5], "label")
    [3.8, 5.0]
    """
    numbers = [_number(value) for value in values]
    for row, number in enumerate(numbers):
        if number is None or not abs(number) <= torch.finfo(torch.float32).max:
            raise DataError(
                f"{where}: row {row} ({ROWS_FROM_ZERO}) has the label {values[row]!r:.80}; a regression needs a finite "
                "number in every row. Correct or remove the row."
            )
    return [number for number in numbers if number is not None]


def all_hidden(values: Sequence[Any]) -> bool:
    """Return whether every label is missing or the mark of a secret one, as in GLUE's test sets."""
    return all(_missing(value) or _number(value) == HIDDEN for value in values)


def _unknown_label(row: int, value: Any, names: Sequence[str], where: str) -> str:
    secret = " -1 marks a hidden label, which only a test set has, and then in every row."
    return (
        f"{where}: row {row} ({ROWS_FROM_ZERO}) has the unknown label {value!r:.80}."
        f"{secret if _number(value) == HIDDEN else similar(str(value), names)} Known labels, in order: {quoted(names)} "
        "(or their numbers from 0). Correct the row, or label_names where you set them."
    )


def _words(values: Sequence[Any], where: str) -> list[str]:
    """Return labels as words, or refuse the first that is missing, or a list or another value that is no label."""
    for row, value in enumerate(values):
        if _missing(value):
            raise DataError(f"{where}: row {row} ({ROWS_FROM_ZERO}) has no label. Fill it in or remove the row.")
        if not isinstance(value, str | Number):
            raise DataError(
                f"{where}: row {row} ({ROWS_FROM_ZERO}) has the label {value!r:.80}, not one word or number. Rows with "
                "several labels need a data module of your own."
            )
    return [_word(value) for value in values]


def _missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _word(value: Any) -> str:
    """Return a label as a word; 1.0 and True, as JSON or Parquet may hold them, are 1."""
    if isinstance(value, bool | float) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _whole(word: str) -> int | None:
    """Read a whole number in its plain form; "01" or "1_0" are words."""
    short = len(word) < 20 and word.removeprefix("-").isdecimal()
    return int(word) if short and str(int(word)) == word else None


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, str) and "_" in value else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
