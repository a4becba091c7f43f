"""Reading the user's tables: TSV, CSV, JSON, JSON lines and Parquet, into columns, with errors that name the row."""

import csv
import difflib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from ildistil.errors import DataError, MissingFileError, reading

#: Column name -> the values, one per row, in the file's order.
Table = dict[str, list[Any]]

# How every message names a row: like ``row_id`` in the batches, so that both can be compared.
ROWS_FROM_ZERO = "rows count from 0, the header not counted"


@dataclass(frozen=True)
class Source:
    """Where the rows of a split come from: its name in messages, all columns, and a hash of the content."""

    where: str
    read: Callable[[], Table]
    fingerprint: Callable[[], str]


def file_source(path: str | os.PathLike[str]) -> Source:
    """Return the source of a split that is one file, for `read_table`."""
    file = expanded(path)
    return Source(str(file), partial(read_table, file), partial(file_digest, file))


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` replaced; unlike `Path.expanduser`, leave the name of an unknown user as it is."""
    return Path(os.path.expanduser(path))


def read_table(path: Path) -> Table:
    """Read one file into columns; the ending of its name decides the format.

    TSV is UTF-8 with a header and **no quoting**: a quote character is ordinary text, and neither a tab nor a line
    break can occur inside a field. CSV follows the usual quoting rules. JSON is a list of objects, or an object a line.

    Args:
        path: The file, ending in ``.tsv``, ``.csv``, ``.json``, ``.jsonl`` or ``.parquet``.

    Raises:
        MissingFileError: There is no such file.
        DataError: The ending is unknown, the file is unreadable, damaged or empty, or a row does not fit the header.
    """
    with reading(path):
        table = READERS[_ending(path)](path)
    if not table or not next(iter(table.values())):
        raise DataError(f"{path} is empty: it holds no row of data. Give a file with a header and at least one row.")
    return table


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, after its ending, which decides how the content is read."""
    with reading(path):
        ending = _ending(path)
        with path.open("rb") as file:
            return f"{ending}:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def find_table(folder: Path, stem: str) -> Path | None:
    """Return the one table ``<stem>.<ending>`` in a folder, or None.

    Raises:
        DataError: Several tables have this stem, or only a file with an unknown ending has it.
    """
    with reading(folder):
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
        raise DataError(f"{where} has no column {name!r}.{similar(name, table)} Its columns: {quoted(table)}.")
    return table[name]


def similar(word: str, known: Iterable[str]) -> str:
    """Return a sentence with the known word that is closest to a wrong one, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def quoted(words: Iterable[str]) -> str:
    """Return words as messages list them."""
    return ", ".join(map(repr, words))


def files_near(folder: Path) -> str:
    """Return a sentence on which files and folders there are, for messages about a missing one."""
    with reading(folder):
        while not folder.is_dir() and folder != folder.parent:
            folder = folder.parent
        found = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir() if not p.name.startswith("."))
    listed = ", ".join(found[:20]) + (" ..." if len(found) > 20 else "")
    return f"{folder} holds: {listed or 'nothing'}."


def _ending(path: Path) -> str:
    """Return the ending of a file that can be read; refuse one that does not exist, or has another ending."""
    ending = path.suffix.lower()
    if ending not in READERS:
        raise DataError(f"{path}: unknown file ending {path.suffix!r}. Use one of {', '.join(READERS)}.")
    if path.is_dir():
        raise DataError(f"{path} is a folder, not a file. {files_near(path)} Name one of them.")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist. {files_near(path.parent)}")
    return ending


def _tsv(path: Path) -> Table:
    # Split at "\n" only: str.splitlines() would also cut at U+2028, U+0085 and others, which occur inside real text.
    lines = _text(path).removesuffix("\n").split("\n")
    return _columns(path, (line.removesuffix("\r").split("\t") for line in lines))


def _csv(path: Path) -> Table:
    # The csv module's limit of 128 KB a field is a process-wide setting; a longer field raises, and we say what to do.
    try:
        return _columns(path, list(csv.reader(io.StringIO(_text(path), newline=""), strict=True)))
    except csv.Error as error:
        raise DataError(f"{path} is not well-formed CSV: {error}. Check its quotes, or use JSON lines.") from error


def _columns(path: Path, rows: Iterable[list[str]]) -> Table:
    """Turn rows of fields into columns; the first row is the header."""
    iterator = iter(rows)
    header = next(iterator, [])
    columns: list[list[str]] = [[] for _ in header]
    for number, row in enumerate(iterator):
        if len(row) != len(header):
            raise DataError(
                f"{path}: row {number} ({ROWS_FROM_ZERO}) has {len(row)} fields, the header has {len(header)} "
                f"({', '.join(header)}). Its start: {str(row)[:80]}. Remove extra separators or add what is missing."
            )
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return _table(path, header, columns)


def _table(path: Path, header: Sequence[str], columns: Iterable[list[Any]]) -> Table:
    if len(set(header)) < len(header):
        raise DataError(f"{path}: the header names a column twice: {header}. Give every column its own name.")
    return dict(zip(header, columns, strict=True))


def _json(path: Path) -> Table:
    text = _text(path)
    return _records(path, _parsed(text, str(path))) if text.lstrip().startswith("[") else _json_lines(path)


def _json_lines(path: Path) -> Table:
    lines = enumerate(_text(path).removesuffix("\n").split("\n"), start=1)
    return _records(path, [_parsed(line, f"{path}, line {number}") for number, line in lines if line.strip()])


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # numbers of more digits than Python reads are ValueErrors
        raise DataError(f"{where}: not valid JSON: {error}. Write a list of objects, or one object a line.") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"an object has a key twice: {quoted(name for name, _ in pairs)}")
    return found


def _records(path: Path, records: list[Any]) -> Table:
    """Turn objects into columns; a key that an object lacks becomes None and is reported where it is needed."""
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(f"{path}: row {number} is {str(record)[:80]!r}, not an object with named columns.")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _parquet(path: Path) -> Table:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:  # read_table() adds columns for folders named "key=value"
            table = file.read()
        columns = [column.to_pylist() for column in table.columns]
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read here: {error}") from error
    return _table(path, table.column_names, columns)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8-sig")


READERS: dict[str, Callable[[Path], Table]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
