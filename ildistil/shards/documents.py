"""Where a file of text is cut into parts, and how the documents of a part are read."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import xxhash

from ildistil.errors import DataError, MissingFileError, reading

__all__ = ["ENDINGS", "Document", "Part", "Texts", "checked", "cut", "read", "row_name", "scan", "stamp_of"]

#: The endings of files that can be packed.
ENDINGS = (".txt", ".jsonl", ".parquet")
#: The texts of a document, in order: the lines of a text file without their breaks, or the one text of a record.
Document: TypeAlias = list[str]

_BLOCK = 1 << 20
_MARK = "\ufeff".encode()  # some editors begin a file with it
_RECORDS = 256
# White space of ASCII alone: what else Unicode calls so is text.
_BLANK_LINE = re.compile(rb"\n[ \t\r\f\v]*\n\s*")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Part:
    """A range of a file that holds whole documents: bytes of text or JSON lines, or row groups of Parquet."""

    path: Path
    start: int
    stop: int
    size: int  # bytes of text, about
    stamp: tuple[int, int]  # of the file when its content was hashed
    line_each: bool  # every line of text is a document; else blank lines separate them
    column: str


@dataclass(frozen=True)
class Texts:
    """Documents of one text each, which no process can read a second time."""

    texts: list[str]
    size: int
    digest: str


def scan(path: Path) -> tuple[str, bool]:
    """Return a hash of a file's content, and whether blank lines separate its documents."""
    digest, separated, tail = xxhash.xxh3_128(), False, b""
    look = path.suffix.lower() == ".txt"
    with _reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            if look and not separated:
                text = tail + block if tail else block.removeprefix(_MARK).lstrip()
                found = _BLANK_LINE.search(text)
                separated = found is not None and found.end() < len(text)
                tail = text[max(0, len(text.rstrip()) - 1) :]
    return digest.hexdigest(), separated


def cut(path: Path, stamp: tuple[int, int], separated: bool, column: str, part_bytes: int) -> list[Part]:
    """Cut a file into parts of about ``part_bytes`` bytes, between documents.

    Raises:
        DataError: A Parquet file can't be read, or has no such column of strings.
    """
    with _reading(path):
        if path.suffix.lower() == ".parquet":
            return _row_groups(path, stamp, column, part_bytes)
        starts, size = [0], stamp[0]
        with path.open("rb") as file:
            while (target := starts[-1] + part_bytes) < size and (bound := _boundary(file, target, separated)) < size:
                starts.append(bound)
    bounds = zip(starts, [*starts[1:], size], strict=True)
    return [Part(path, a, b, b - a, stamp, not separated, column) for a, b in bounds if a < b]


def read(part: Part | Texts) -> Iterator[Document]:
    """Yield the documents of a part.

    Raises:
        DataError: The file has changed since it was hashed, isn't text in UTF-8, or a record has no text.
    """
    if isinstance(part, Texts):
        yield from ([text] for text in part.texts)
        return
    with _reading(part.path):
        _check_unchanged(part)
        yield from {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}[part.path.suffix.lower()](part)
        _check_unchanged(part)


def checked(text: Any, column: str, where: Callable[[], str]) -> str:
    """Return the text of a record.

    Raises:
        DataError: It isn't a string, or is one that can't be written in UTF-8.
    """
    if not isinstance(text, str):
        shown = "nothing (null)" if text is None else f"{str(text)[:80]!r} ({type(text).__name__})"
        raise DataError(f"{where()}: {column!r} holds {shown}, not a text. Fill it in or remove the row.")
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(f"{where()}: {column!r} holds half of a surrogate pair, which is no character. Remove it.")
    return text


def stamp_of(path: Path) -> tuple[int, int]:
    """Return the size of a file and when it was changed, in ns."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _text(part: Part) -> Iterator[Document]:
    lines: Document = []
    for at, raw in _lines(part):
        if not raw.strip():
            if lines:
                yield lines
            lines = []
            continue
        line = _decoded(raw, part.path, at).removesuffix("\n").removesuffix("\r")
        if part.line_each:
            yield [line]
        else:
            lines.append(line)
    if lines:
        yield lines


def _json_lines(part: Part) -> Iterator[Document]:
    for at, raw in _lines(part):
        if not raw.strip():
            continue
        where = partial(_record_at, part.path, at)
        line = _decoded(raw, part.path, at)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where()}: not valid JSON: {error}. Write one object a line.") from error
        if not isinstance(record, dict):
            raise DataError(f"{where()} is {str(record)[:80]!r}, not an object with named columns.")
        if part.column not in record:
            raise DataError(f"{where()} has no column {part.column!r}. {_columns(part.column, record)}")
        yield [checked(record[part.column], part.column, where)]


def _parquet(part: Part) -> Iterator[Document]:
    with _opened_parquet(part.path) as file:
        number = sum(file.metadata.row_group(i).num_rows for i in range(part.start))
        groups = range(part.start, part.stop)
        for batch in file.iter_batches(_RECORDS, groups, columns=[part.column], use_threads=False):
            for text in batch.column(0).to_pylist():
                yield [checked(text, part.column, partial(row_name, part.path, number))]
                number += 1


def _lines(part: Part) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a part, each with the byte it starts at."""
    with part.path.open("rb", buffering=_BLOCK) as file:
        begins_with_mark = part.start == 0 and file.read(len(_MARK)) == _MARK
        at = file.seek(len(_MARK) if begins_with_mark else part.start)
        while at < part.stop and (raw := file.readline()):
            yield at, raw
            at += len(raw)


def _decoded(raw: bytes, path: Path, at: int) -> str:
    if b"\0" in raw:
        raise DataError(f"{path} is not text: byte {at + raw.index(0)} is zero. Name files of text in UTF-8.")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {at + error.start}"
        raise DataError(f"{path} is not UTF-8 ({where}). Save it as UTF-8.") from error


def row_name(where: object, number: int) -> str:
    """Return how messages name a record."""
    return f"{where}, row {number} (rows count from 0)"


def _record_at(path: Path, at: int) -> str:
    number = 0
    with path.open("rb") as file:
        while file.tell() < at:
            number += bool(file.readline().strip())
    return row_name(path, number)


def _columns(column: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(column, list(names), n=1)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}Its columns: {', '.join(map(repr, names))}. Set text_column to the one of the texts."


def _boundary(file: IO[bytes], target: int, separated: bool) -> int:
    """Return the first byte at or after ``target`` that a document, or the blank lines before it, begins at."""
    file.seek(target - 1)
    line = file.readline()
    while separated and (line := file.readline()) and line.strip():
        pass
    return file.tell()


def _row_groups(path: Path, stamp: tuple[int, int], column: str, part_bytes: int) -> list[Part]:
    """Join row groups to parts of about ``part_bytes`` bytes of text."""
    parts, start, size = [], 0, 0
    with _opened_parquet(path) as file:
        _check_column(path, file.schema_arrow, column)
        last = file.metadata.num_row_groups - 1
        for i in range(last + 1):
            group = file.metadata.row_group(i)
            chunks = (group.column(j) for j in range(group.num_columns))
            size += sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column)
            if size >= part_bytes or i == last:
                parts.append(Part(path, start, i + 1, size, stamp, True, column))
                start, size = i + 1, 0
    return parts


def _check_column(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise DataError(f"{path} has no column {column!r}. {_columns(column, schema.names)}")
    kind = str(schema.field(column).type)
    if "string" not in kind or kind.startswith(("list", "large_list", "struct", "map")):
        others = [name for name in schema.names if name != column]
        raise DataError(f"{path}: column {column!r} holds {kind}, not texts. {_columns(column, others)}")


@contextmanager
def _opened_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped]  # only those who need it wait for it

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BLOCK) as file:
            yield file
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read here: {error}") from error


def _check_unchanged(part: Part) -> None:
    if stamp_of(part.path) != part.stamp:
        raise DataError(f"{part.path} was changed while it was packed. Run again when it is complete.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an error of this library."""
    with reading(path):
        try:
            yield
        except FileNotFoundError as error:
            if isinstance(error, MissingFileError):
                raise
            raise MissingFileError(f"{path} does not exist any more. Put it back, or take it off the list.") from error
