"""Reading the user's tables: TSV, CSV, JSON, JSON lines and Parquet, into columns, with errors that name the row."""

import csv
import difflib
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from ildistil.errors import DataError, MissingFileError

#: Column name -> the values, one per row, in the file's order.
Table = dict[str, list[Any]]

# How every message names a row: like ``row_id`` in the batches, so that both can be compared.
ROWS_FROM_ZERO = "rows count from 0, the header not counted"


def read_table(path: Path) -> Table:
    """Read one file into columns; the ending of its name says the format.

    TSV is UTF-8 with a header and **no quoting**: a quote character is ordinary text, and neither a tab nor a line
    break can occur inside a field. CSV follows the usual quoting rules. JSON is a list of objects, or an object a line.

    Args:
        path: The file, ending in ``.tsv``, ``.csv``, ``.json``, ``.jsonl`` or ``.parquet``.

    Raises:
        MissingFileError: There is no such file.
        DataError: The ending is unknown, the file is empty, or a row does not fit the header.
    """
    check_file(path)
    try:
        table = READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    if not table or not next(iter(table.values())):
        raise DataError(f"{path} is empty: it holds no row of data. Give a file with a header and at least one row.")
    return table


def check_file(path: Path) -> None:
    """Refuse a file that does not exist or cannot be read.

    Raises:
        MissingFileError: There is no such file.
        DataError: Its ending is unknown.
    """
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: unknown file ending {path.suffix!r}. Use one of {', '.join(READERS)}.")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist. {files_near(path.parent)}")


def find_table(folder: Path, stem: str) -> Path | None:
    """Return the one table ``<stem>.<ending>`` in a folder, or None.

    Raises:
        DataError: Several tables have this stem, or only a file with an unknown ending has it.
    """
    candidates = sorted(p for p in folder.glob(f"{stem}.*") if p.is_file())
    known = [p for p in candidates if p.suffix.lower() in READERS]
    if len(known) > 1:
        names = ", ".join(p.name for p in known)
        raise DataError(f"{folder} holds several files for {stem!r}: {names}. Keep one (or name it: train_file=...).")
    if candidates and not known:
        raise DataError(f"{candidates[0]}: unknown file ending. Use one of {', '.join(READERS)}.")
    return known[0] if known else None


def table_column(table: Table, name: str, where: str) -> list[Any]:
    """Return a column.

    Raises:
        DataError: There is none of this name; the message lists those there are.
    """
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise DataError(f"{where} has no column {name!r}.{hint} Its columns: {', '.join(map(repr, table))}.")
    return table[name]


def files_near(folder: Path) -> str:
    """Say which files and folders there are, for messages about a missing one."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    found = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    listed = ", ".join(found[:20]) + (" ..." if len(found) > 20 else "")
    return f"{folder} holds: {listed or 'nothing'}."


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tsv(path: Path) -> Table:
    # Split at "\n" only: str.splitlines() would also cut at U+2028, U+0085 and others, which occur inside real text.
    lines = _text(path).removesuffix("\n").split("\n")
    return _columns(path, (line.removesuffix("\r").split("\t") for line in lines))


def _csv(path: Path) -> Table:
    # The csv module's limit of 128 KB a field is a process-wide setting; a longer field raises, and we say what to do.
    try:
        return _columns(path, list(csv.reader(io.StringIO(_text(path), newline=""), strict=True)))
    except csv.Error as error:
        raise DataError(
            f"{path} is not well-formed CSV: {error}. Check the quotes, or use TSV or JSON lines."
        ) from error


def _columns(path: Path, rows: Iterable[list[str]]) -> Table:
    """Turn rows of fields into columns; the first row is the header."""
    iterator: Iterator[list[str]] = iter(rows)
    header = next(iterator, [])
    if len(set(header)) < len(header):
        raise DataError(f"{path}: the header names a column twice: {header}. Give every column its own name.")
    table: Table = {name: [] for name in header}
    for number, row in enumerate(iterator):
        if len(row) != len(header):
            raise DataError(
                f"{path}: row {number} ({ROWS_FROM_ZERO}) has {len(row)} fields, the header has {len(header)} "
                f"({', '.join(header)}). Its start: {str(row)[:80]}. Remove extra separators or add what is missing."
            )
        for column, value in zip(table.values(), row, strict=True):
            column.append(value)
    return table


def _json(path: Path) -> Table:
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    try:
        return _records(path, json.loads(text))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from error


def _json_lines(path: Path) -> Table:
    records = []
    for number, line in enumerate(_text(path).removesuffix("\n").split("\n")):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number + 1}: not valid JSON: {error}. Write one object a line.") from error
    return _records(path, records)


def _records(path: Path, records: list[Any]) -> Table:
    """Turn objects into columns; a key that an object lacks becomes None and is reported where it is needed."""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}: row {number} is {str(record)[:80]!r}, not an object with named columns.")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _parquet(path: Path) -> Table:
    try:
        table: Table = pyarrow.parquet.read_table(path).to_pydict()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a Parquet file: {error}") from error
    return table


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


READERS: dict[str, Callable[[Path], Table]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
