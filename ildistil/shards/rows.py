"""The format of shards: the rows of one split of one part in a file, mapped into memory, and the index of all shards.

A file holds the tokens of all rows, a bit a token that says whether a word starts there (if stored), the bounds of the
rows in tokens (int64, from a multiple of 8 bytes), and a checksum of each row (uint64). The index names how many rows
and tokens each shard has.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from ildistil import storage
from ildistil.errors import DataError, MissingFileError
from ildistil.shards.documents import Part, Texts

__all__ = ["SPLITS", "RowWriter", "Rows", "is_indexed", "shard_folder", "shard_numbers", "write_index"]

SPLITS = ("train", "validation")
#: What a shard's own file of figures is called.
FIGURES = "shard.json"

_INDEX = "index"
# A mapped file keeps a file descriptor open, of which processes often have 1024.
_MAPPED_SHARDS = 256

Figures: TypeAlias = dict[str, Any]


class RowWriter:
    """Writes the rows of one split, as they come, to a file.

    Args:
        path: the file.
        dtype: type of the tokens.
        word_starts: whether rows say where words start.
        shard: number of the shard.
    """

    def __init__(self, path: Path, dtype: str, word_starts: bool, shard: int) -> None:
        self._file = path.open("wb")
        self._dtype, self._shard = np.dtype(dtype), shard
        self._sums: list[int] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._bits: list[NDArray[np.uint8]] | None = [] if word_starts else None
        self._odd = np.zeros(0, bool)

    def write(self, tokens: NDArray[Any], lengths: NDArray[np.int64], starts: NDArray[np.bool_] | None) -> None:
        """Append rows.

        Args:
            tokens: (tokens of all rows), special ones included.
            lengths: (rows), tokens of each.
            starts: (tokens of all rows), or ``None``.
        """
        tokens = tokens.astype(self._dtype, copy=False)
        self._file.write(tokens.tobytes())
        self._lengths.append(lengths)
        ends = np.cumsum(lengths).tolist()
        for start, stop in zip([0, *ends], ends, strict=False):
            row = None if starts is None else starts[start:stop]
            self._sums.append(_row_sum(tokens[start:stop], row, self._shard, len(self._sums)))
        if self._bits is not None and starts is not None:
            starts = np.concatenate([self._odd, starts])
            whole = len(starts) // 8 * 8
            self._bits.append(np.packbits(starts[:whole]))
            self._odd = starts[whole:]

    def close(self) -> Figures:
        """Finish the file; return its numbers of rows and tokens."""
        bounds = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]), dtype=np.int64)
        with self._file as file:
            if self._bits is not None:
                file.write(np.concatenate([*self._bits, np.packbits(self._odd)]).tobytes())
            file.write(bytes(-file.tell() % 8))
            file.write(bounds.tobytes())
            file.write(np.array(self._sums, np.uint64).tobytes())
        return {"rows": len(bounds) - 1, "tokens": int(bounds[-1])}


class Rows:
    """Rows of tokens of one split, mapped into memory: cheap to open, and to send to other processes.

    At most 256 shards are mapped at a time. Sizes are compared when a shard is first touched, and each row with its own
    checksum when it is read, whatever happened to the file since `pack` compared the whole corpus.

    Args:
        folder: What `pack` made of a corpus.
        split: "train" or "validation".

    Attributes:
        lengths: (rows), int32, tokens of every row, special ones included; mapped into memory too.
        tokens: Tokens of all rows.
        digest: Hash of the source's content, the tokenizer, the packing, and the split.

    Raises:
        MissingFileError: There is no packed corpus.
        DataError: It is damaged.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        self.folder, self.split = folder, split
        index = _read_index(folder)
        figures = index["splits"][split]
        self._dtype, self._word_starts = np.dtype(index["dtype"]), bool(index["word_starts"])
        self._rows, self._tokens = figures["rows"], figures["tokens"]
        self._first = np.cumsum([0, *self._rows], dtype=np.int64)
        self.tokens = sum(self._tokens)
        self.digest = f"{index['digest']}-{split}"
        self.lengths: NDArray[np.int32] = _mapped(folder / _INDEX / f"{split}.lengths", 4 * len(self)).view(np.int32)
        self._shard: Callable[[int], _Arrays] = lru_cache(_MAPPED_SHARDS)(self._open)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, row: int) -> dict[str, NDArray[Any]]:
        """Return ``input_ids`` (int64) of a row, and ``word_starts`` (bool) if they are stored.

        Raises:
            DataError: The row isn't what was written.
        """
        row = int(row)
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} rows")
        row %= len(self)
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        tokens, bits, bounds, sums = self._shard(shard)
        at = row - int(self._first[shard])
        start, stop = int(bounds[at]), int(bounds[at + 1])
        ids, starts = tokens[start:stop], None
        if bits is not None:
            unpacked = np.unpackbits(bits[start // 8 : -(-stop // 8)])
            starts = unpacked[start % 8 :][: stop - start].astype(bool)
        if len(ids) != self.lengths[row] or _row_sum(ids, starts, shard, at) != int(sums[at]):
            raise DataError(
                f"{self._path(shard)} is damaged: row {at} isn't what was written. Run again: it is made anew."
            )
        found: dict[str, NDArray[Any]] = {"input_ids": ids.astype(np.int64)}
        if starts is not None:
            found["word_starts"] = starts
        return found

    def __reduce__(self) -> tuple[type["Rows"], tuple[Path, str]]:
        return Rows, (self.folder, self.split)

    def _path(self, shard: int) -> Path:
        return shard_folder(self.folder, shard) / f"{self.split}.rows"

    def _open(self, shard: int) -> "_Arrays":
        return _arrays(self._path(shard), self._rows[shard], self._tokens[shard], self._dtype, self._word_starts)


# Tokens, bits of the starts of words, bounds and checksums.
_Arrays: TypeAlias = tuple[NDArray[Any], NDArray[np.uint8] | None, NDArray[np.int64], NDArray[np.uint64]]


def shard_folder(folder: Path, number: int) -> Path:
    """Return the folder of a shard."""
    return folder / f"{number:06d}"


def shard_numbers(folder: Path) -> list[int]:
    """Return the numbers of the shards that are there."""
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def write_index(folder: Path, shards: int, facts: Figures) -> Figures:
    """Write the index of all shards; return what they hold together.

    Args:
        folder: The packed corpus.
        shards: How many there are.
        facts: ``dtype``, ``word_starts`` and ``digest``.
    """
    all_figures = [_figures(folder, number) for number in range(shards)]
    splits = [split for split in SPLITS if split in all_figures[0]["splits"]]
    columns = {
        split: {unit: [each["splits"][split][unit] for each in all_figures] for unit in ("rows", "tokens")}
        for split in splits
    }
    totals = {name: sum(each["counts"][name] for each in all_figures) for name in all_figures[0]["counts"]}
    totals |= {split: sum(column["rows"]) for split, column in columns.items()}
    with storage.replacing_folder(folder / _INDEX) as draft:
        for split in splits:
            with (draft / f"{split}.lengths").open("wb") as file:
                for lengths in _lengths(folder, split, columns[split], facts):
                    file.write(lengths.tobytes())
        text = json.dumps(facts | {"splits": columns, "counts": totals, "shards": shards})
        (draft / "index.json").write_text(text, encoding="utf-8")
    return totals


def is_indexed(folder: Path, intact: Sequence[int]) -> bool:
    """Return whether there is an index whose shards are all among the intact ones."""
    try:
        if not storage.verify_folder(folder / _INDEX, DataError, "It is made anew."):
            return False
        return set(range(_read_index(folder)["shards"])) <= set(intact)
    except DataError:
        return False


def index_counts(folder: Path) -> Figures:
    """Return what all shards hold together: nothing if there is none."""
    try:
        counts: Figures = _read_index(folder)["counts"]
    except MissingFileError:
        return {}
    return counts


def is_of(folder: Path, number: int, part: Part | Texts) -> bool:
    """Return whether a shard was made of a part; the name of a folder decides that but for streams."""
    return isinstance(part, Part) or _figures(folder, number)["source"] == part.digest


def _figures(folder: Path, number: int) -> Figures:
    figures: Figures = json.loads((shard_folder(folder, number) / FIGURES).read_text(encoding="utf-8"))
    return figures


def _lengths(folder: Path, split: str, columns: Figures, facts: Figures) -> Iterator[NDArray[np.int32]]:
    for number, (rows, tokens) in enumerate(zip(columns["rows"], columns["tokens"], strict=True)):
        path = shard_folder(folder, number) / f"{split}.rows"
        _, _, bounds, _ = _arrays(path, rows, tokens, np.dtype(facts["dtype"]), facts["word_starts"])
        yield np.diff(bounds).astype(np.int32)


def _read_index(folder: Path) -> Figures:
    path = folder / _INDEX / "index.json"
    try:
        index: Figures = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFileError(f"There is no packed corpus in {folder}. Call prepare_data() before setup().") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}). Delete {folder / _INDEX}, run again.") from error
    return index


def _arrays(path: Path, rows: int, tokens: int, dtype: np.dtype[Any], word_starts: bool) -> _Arrays:
    ends = tokens * dtype.itemsize
    bits_end = ends + (-(-tokens // 8) if word_starts else 0)
    first = bits_end + -bits_end % 8
    last = first + 8 * (rows + 1)
    data = _mapped(path, last + 8 * rows)
    bits = data[ends:bits_end] if word_starts else None
    return data[:ends].view(dtype), bits, data[first:last].view(np.int64), data[last:].view(np.uint64)


def _row_sum(ids: NDArray[Any], starts: NDArray[np.bool_] | None, shard: int, row: int) -> int:
    """Return the checksum of a row, which holds at its place alone."""
    content = ids.data if starts is None else ids.tobytes() + starts.tobytes()
    return xxhash.xxh3_64_intdigest(content, seed=shard << 32 | row)


def _mapped(path: Path, size: int) -> NDArray[np.uint8]:
    """Map a file of a known size into memory."""
    try:
        found = path.stat().st_size
        if found == size:
            return np.memmap(path, np.uint8, "r").view(np.ndarray) if size else np.zeros(0, np.uint8)
    except OSError as error:
        raise MissingFileError(f"{path} is missing or can't be read ({error}). Run again: it is made anew.") from error
    raise DataError(f"{path} has {found} bytes, not {size}: it is damaged. Delete its folder, run again.")
