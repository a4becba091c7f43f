"""The folder: a description and shards, written once and never changed, so that several processes can share it."""

import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from ildistil import storage
from ildistil.errors import TargetsError
from ildistil.teachers.layout import Column, Dtype, Header, TeacherFacts, torch_dtype
from ildistil.teachers.rows import KEY_BYTES
from ildistil.teachers.shard import CHECKS, INDEX, KEYS, OF, STARTS, Shard, checks, index_digest

__all__ = ["DESCRIPTION", "SHARD_BYTES", "Places", "Store", "missing"]

# What a run that is killed loses at most, and what waits in memory.
SHARD_BYTES = 128 * 2**20
DESCRIPTION = "targets.json"
Places = NDArray[np.int64]  # the shard of each row and its number there; -1 where it isn't stored
_ELSEWHERE = "Name another folder."


def missing(places: Places) -> list[int]:
    """Return the numbers of the rows that aren't there.

    >>> missing(np.array([[0, 3], [-1, -1]]))
    [1]
    """
    numbers: list[int] = np.flatnonzero(places[:, 0] < 0).tolist()
    return numbers


class Store:
    """Reads rows by their keys, and adds rows.

    Args:
        folder: the folder; it needs not exist.
        shard_bytes: rows are written when they are as many bytes.
        expected: the teacher and the precision that the description must name, where one turns up later.

    A shard gets its name when it is complete, so that whoever is interrupted leaves whole shards only. Processes that
    write at the same time write shards of their own; :meth:`refresh` finds those of the others.
    """

    def __init__(
        self, folder: str | Path, shard_bytes: int = SHARD_BYTES, expected: tuple[TeacherFacts, Dtype] | None = None
    ) -> None:
        self.folder, self.shard_bytes, self.expected = Path(folder).expanduser(), shard_bytes, expected
        self.header: Header | None = None
        self._shards: list[Shard] = []
        self._keys: NDArray[Any] = np.empty(0, f"S{KEY_BYTES}")
        self._places: Places = np.empty((0, 2), np.int64)  # shard and row in it, in the order of the keys
        self._open: list[tuple[bytes, Mapping[str, Tensor]]] = []  # rows that aren't written yet
        self._open_keys: set[bytes] = set()
        self._open_bytes = 0
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        """Make copies open the files themselves: copying or pickling what is mapped would read all of it."""
        return Store, (self.folder, self.shard_bytes, self.expected)

    def __len__(self) -> int:
        return len(self._keys)

    # Reading

    def _read_header(self) -> Header | None:
        """Read the description, if there is one.

        Raises:
            TargetsError: it is damaged, or of something else than is expected here.
        """
        found = self._parsed_header()
        if found is None or self.expected is None:
            return found
        teacher, dtype = self.expected
        found.teacher.compare(teacher.info.name, teacher.weights, teacher.config)
        if found.dtype != dtype:
            raise TargetsError(f"The targets in {self.folder} are in {found.dtype}, not in {dtype}. {_ELSEWHERE}")
        return found

    def _parsed_header(self) -> Header | None:
        path = self.folder / DESCRIPTION
        if not path.is_file():
            return None
        try:
            return Header.from_json(path.read_text(encoding="utf-8"))
        except (KeyError, TypeError, ValueError) as error:
            raise TargetsError(
                f"{path} is damaged ({error!r}), so nobody knows what the targets beside it are. Delete the folder and "
                "run 'ildistil precompute' again."
            ) from error

    def _refuse_other_files(self) -> None:
        """Refuse to begin in a folder that somebody uses for something else."""
        if self.folder.is_file():
            raise TargetsError(f"{self.folder} is a file. Targets need a folder of their own.")
        ours = (DESCRIPTION, "shard-*.safetensors")
        others = sorted(x.name for x in self.folder.glob("[!.]*") if not any(x.match(name) for name in ours))
        if others:
            raise TargetsError(
                f"{self.folder} holds no targets but other files, such as {others[0]}. Name a folder that is empty or "
                "doesn't exist yet."
            )

    def refresh(self) -> None:
        """Find the shards that were written since, also by other processes."""
        self.header = self.header or self._read_header()
        known = {shard.path for shard in self._shards}
        new = [Shard(path) for path in sorted(self.folder.glob("shard-*.safetensors")) if path not in known]
        if self.header is None:
            self._refuse_other_files()
        if not new:
            return
        if self.header is None:
            raise TargetsError(
                f"{self.folder} has shards but no {DESCRIPTION} that says what they are. Name another folder, or "
                "delete this one."
            )
        for shard in new:
            shard.check(self.header)
        first, self._shards = len(self._shards), self._shards + new
        places = [np.stack([np.full(len(s.keys), i), np.arange(len(s.keys))], 1) for i, s in enumerate(new, first)]
        # A row that two processes made is there twice; either will do.
        self._keys, order = np.unique(np.concatenate([self._keys, *(s.keys for s in new)]), return_index=True)
        self._places = np.concatenate([self._places, *places])[order]

    def find(self, keys: Sequence[bytes]) -> Places:
        """Look rows up."""
        wanted = np.array(keys, self._keys.dtype)
        if not len(self._keys):
            return np.full((len(wanted), 2), -1)
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.where((self._keys[at] == wanted)[:, None], self._places[at], -1)

    def first(self) -> Places:
        """Return the first row."""
        return self._places[:1]

    def lengths(self, places: Places) -> list[int]:
        """Return the number of tokens of each row; 0 for one that isn't there."""
        starts = ((self._shards[s].starts, r) if s >= 0 else ([0, 0], 0) for s, r in places.tolist())
        return [of[row + 1] - of[row] for of, row in starts]

    def read(self, places: Places, columns: Sequence[Column]) -> dict[str, Tensor]:
        """Read columns: the tokens of all rows one after the other, or a value for each row.

        A row that isn't there has no tokens, and the value 0.

        Raises:
            TargetsError: a row isn't what was written.
        """
        assert self.header is not None
        there = [(self._shards[shard], row) for shard, row in places.tolist() if shard >= 0]
        spans = {
            True: [(shard, shard.starts[row], shard.starts[row + 1]) for shard, row in there],
            False: [(shard, row, row + 1) for shard, row in there],
        }
        dtype, values = torch_dtype(self.header.dtype), {}
        for column in columns:
            name = column.name
            for shard, row in there:
                shard.verify(row, name)
            parts = [shard.tensors[name][begin:end] for shard, begin, end in spans[column.per_token]]
            joined = _joined(parts) if parts else torch.zeros(0, column.width, dtype=dtype)
            if not column.per_token and len(there) < len(places):
                whole = torch.zeros(len(places), column.width, dtype=dtype)
                whole[torch.from_numpy(places[:, 0] >= 0)] = joined
                joined = whole
            values[name] = joined.view(len(joined), *column.shape)
        return values

    # Writing

    def create(self, header: Header) -> None:
        """Write the description, unless another process was faster with the same.

        Raises:
            TargetsError: another process wrote another one.
            WriteError: the folder can't be written to.
        """
        with storage.replacing(self.folder / DESCRIPTION, keep=True) as draft:
            draft.write_text(header.to_json(), encoding="utf-8")
        found = self._read_header()
        if found != header:
            raise TargetsError(f"Another run has just begun to write other targets into {self.folder}. {_ELSEWHERE}")
        self.header = found

    def add(self, keys: Sequence[bytes], lengths: Sequence[int], values: Mapping[str, Tensor]) -> int:
        """Add those rows with a token that aren't there, and write a shard when there are enough of them.

        Args:
            keys: of all rows.
            lengths: their numbers of tokens.
            values: all columns, on the CPU in the stored precision: the tokens of all rows one after the other, or a
                value for each row.

        Returns:
            How many rows were added.
        """
        assert self.header is not None
        ends = np.cumsum([0, *lengths]).tolist()
        added = 0
        for i in missing(self.find(keys)):
            if keys[i] in self._open_keys or not lengths[i]:
                continue
            row = {
                column.name: values[column.name][ends[i] : ends[i + 1]].flatten(1)
                if column.per_token
                else values[column.name][i : i + 1].flatten(1)
                for column in self.header.layout.columns
            }
            row |= {STARTS: torch.tensor([lengths[i]])}
            self._open.append((keys[i], {name: value.clone() for name, value in row.items()}))
            self._open_keys.add(keys[i])
            self._open_bytes += sum(value.nbytes for value in row.values()) + KEY_BYTES
            added += 1
        if self._open_bytes >= self.shard_bytes:
            self.flush()
        return added

    def flush(self) -> None:
        """Write the rows that wait, and find them and those of other processes."""
        if self._open:
            assert self.header is not None
            keys, rows = zip(*self._open, strict=True)
            tensors = {name: _joined([row[name] for row in rows]) for name in rows[0]}
            tensors[STARTS] = torch.cat([torch.zeros(1, dtype=torch.long), tensors[STARTS].cumsum(0)])
            tensors[KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
            tensors[CHECKS] = checks(tensors, self.header.layout.columns)
            self._check_space()
            with storage.replacing(self.folder / f"shard-{uuid.uuid4().hex[:12]}.safetensors") as draft:
                # save_file would hide it from all other users
                draft.write_bytes(save(tensors, {OF: self.header.digest, INDEX: index_digest(tensors)}))
            self._open, self._open_keys, self._open_bytes = [], set(), 0
        self.refresh()

    def _check_space(self) -> None:
        """Refuse to fill the disk to its last byte, which harms everyone on it.

        Raises:
            TargetsError: there is no space for the rows that wait.
        """
        free = shutil.disk_usage(self.folder).free
        if self._open_bytes > free:
            raise TargetsError(
                f"The disk of {self.folder} is full: {free / 1e6:,.0f} MB are free, {self._open_bytes / 1e6:,.0f} MB "
                "are to be written. Free some, and run again: what is written stays."
            )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join in the stored precision, which a run's autocast would change, or fail at."""
    with torch.autocast("cpu", enabled=False):
        return torch.cat(list(parts))
