"""Where the texts of a corpus come from: files, or a data set of the hub; hashed, and cut into parts."""

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import xxhash

from ildistil.data.files import expanded, files_near, quoted, similar
from ildistil.errors import DataError, IldistilError, MissingFileError, reading
from ildistil.shards.documents import ENDINGS, Part, Texts, checked, cut, row_name, scan, stamp_of

# Parts grow with a corpus of more than 4 GiB, so that there are no more than some thousand shards.
_PART, _LARGEST_PART, _PARTS = 4 << 20, 64 << 20, 1024
_PROBES = 3


@dataclass(frozen=True)
class Plan:
    """A source as it is now; the sizes of a stream are not known before it is read."""

    content: str  # hash of all texts; of a stream, of what it is a stream of
    size: int | None  # bytes of text, about
    number: int | None  # of parts
    parts: Callable[[], Iterator[Part | Texts]]
    probes: Sequence[Part | Texts]  # a few of the parts


@dataclass(frozen=True)
class TextFiles:
    """Files of text in UTF-8: ``.txt``, JSON lines, or Parquet.

    In a text file blank lines separate documents of one or more lines; without a blank line between two others, each
    line is a document. In JSON lines and Parquet each record is a document.

    Args:
        paths: A file, a folder, which is searched with all folders in it, a pattern such as ``"wiki/*.txt"``, or
            several of these.
        text_column: The column of the text in JSON lines and Parquet.
    """

    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    text_column: str = "text"

    def __str__(self) -> str:
        paths = [self.paths] if isinstance(self.paths, str | os.PathLike) else self.paths
        return ", ".join(map(str, paths))

    def address(self) -> str:
        """Return what finds the packed rows again without reading the files: names, sizes and times.

        Raises:
            MissingFileError: There is no such file.
            DataError: A file can't be packed.
        """
        return json.dumps([self.text_column, [(str(path.resolve()), *stamp_of(path)) for path in self.files()]])

    def plan(self, processes: int) -> Plan:
        """Read all files once, ``processes`` at a time, and cut them into parts.

        Raises:
            MissingFileError: There is no such file.
            DataError: A file can't be read, or isn't of the kind its ending says.
        """
        files = self.files()
        with reading(files[0].parent), ThreadPoolExecutor(processes) as pool:
            stamps = [stamp_of(path) for path in files]
            scans = list(pool.map(scan, files))
            part_bytes = min(max(_PART, sum(size for size, _ in stamps) // _PARTS), _LARGEST_PART)
            separated = [found for _, found in scans]
            columns, sizes = [self.text_column] * len(files), [part_bytes] * len(files)
            parts = [part for found in pool.map(cut, files, stamps, separated, columns, sizes) for part in found]
        # The same content under other names, or in another folder, is the same corpus.
        content = [[path.suffix.lower() for path in files], scans, self.text_column, part_bytes]
        probes = parts[:: max(1, len(parts) // _PROBES)]
        return Plan(_hash(content), sum(p.size for p in parts), len(parts), lambda: iter(parts), probes)

    def files(self) -> list[Path]:
        """Return all files, each once, in order.

        Raises:
            MissingFileError: There is no such file, or a folder or pattern has none.
            DataError: A file has an ending that isn't known.
        """
        paths = [self.paths] if isinstance(self.paths, str | os.PathLike) else list(self.paths)
        if not paths:
            raise DataError("The corpus has no files: name a file, a folder, or a pattern such as 'wiki/*.txt'.")
        return list(dict.fromkeys(file for path in paths for file in _files(expanded(path))))


@dataclass(frozen=True)
class HubText:
    """A data set of the hub, or in a local folder: whatever `datasets.load_dataset` reads without code of its own.

    Args:
        name: Its name on the hub, or the folder.
        config: Its configuration, if it has several.
        split: The split to read.
        text_column: The column of the text.
        streaming: Read it once, from the network, without keeping a copy. Such a data set is known by its name and
            revision; others are known by their texts.
    """

    name: str
    config: str | None = None
    split: str = "train"
    text_column: str = "text"
    streaming: bool = False

    def __str__(self) -> str:
        return f"data set {self.name!r}, {self.split},"

    def address(self) -> str:
        """Return what finds the packed rows again without reading the data set: its name and the like."""
        folder = expanded(self.name)
        name = str(folder.resolve()) if folder.is_dir() else self.name
        return json.dumps([name, self.config, self.split, self.text_column, self.streaming])

    def plan(self, processes: int) -> Plan:
        """Load the data set, and read it once unless it is a stream.

        Raises:
            MissingFileError: It can't be loaded.
            DataError: It has no such column.
        """
        with self._loading():
            rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=self.streaming)
        if rows.column_names is not None and self.text_column not in rows.column_names:
            raise DataError(
                f"The {self} has no column {self.text_column!r}.{similar(self.text_column, rows.column_names)} Its "
                f"columns: {quoted(rows.column_names)}. Set text_column to one of them."
            )
        parts = partial(self._parts, rows)
        if not self.streaming:
            digests: list[str] = []
            first: list[Texts] = []
            size = 0
            for part in parts():
                digests.append(part.digest)
                size += part.size
                first = first or [part]
            return Plan(_hash(digests), size, len(digests), parts, first)
        if (folder := expanded(self.name)).is_dir():
            content: object = [scan(path)[0] for path in sorted(folder.rglob("*")) if path.is_file()]
        else:  # the names of the files on the hub have the revision in them
            with self._loading():
                builder = datasets.load_dataset_builder(self.name, self.config)
            content = [builder.hash, str(builder.config.data_files)]
        return Plan(_hash([self.address(), content]), None, None, parts, [])

    @contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except IldistilError:
            raise
        except Exception as error:  # many libraries deep: connection, permission, cache and parsing errors
            raise MissingFileError(
                f"The {self} can't be loaded: {error}\nCheck its name, configuration ({self.config}), split and "
                "the network connection, or use files that you have. A run that broke off goes on where it was."
            ) from error

    def _next(self, batches: Iterator[dict[str, list[Any]]]) -> dict[str, list[Any]] | None:
        with self._loading():
            return next(batches, None)

    def _parts(self, rows: Any) -> Iterator[Texts]:
        texts: list[str] = []
        size, number = 0, 0
        digest = xxhash.xxh3_128()
        batches = rows.select_columns([self.text_column]).iter(batch_size=256)
        while batch := self._next(batches):
            for value in batch[self.text_column]:
                text = checked(value, self.text_column, partial(row_name, self, number))
                raw = text.encode()
                digest.update(len(raw).to_bytes(8, "little") + raw)
                texts.append(text)
                size, number = size + len(raw), number + 1
                if size >= _PART:
                    yield Texts(texts, size, digest.hexdigest())
                    texts, size, digest = [], 0, xxhash.xxh3_128()
        if texts:
            yield Texts(texts, size, digest.hexdigest())


def _files(path: Path) -> Iterable[Path]:
    """Return the files that a file, folder or pattern stands for, sorted."""
    with reading(path):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not found:
                raise MissingFileError(f"{path} has no file that ends in {quoted(ENDINGS)}. {files_near(path)}")
            return found
        if path.is_file():
            return [_checked_ending(path)]
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
    if not found:
        raise MissingFileError(f"{path} does not exist. {files_near(path.parent)}")
    return map(_checked_ending, found)


def _checked_ending(path: Path) -> Path:
    if path.suffix.lower() not in ENDINGS:
        remedy = "Unpack it (gunzip) first." if path.suffix.lower() == ".gz" else "Rename it if it is one of these."
        raise DataError(f"{path}: files of a corpus end in {quoted(ENDINGS)}. {remedy}")
    return path


def _hash(content: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
