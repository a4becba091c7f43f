"""The folder: a description and shards, written once and never changed, so that several processes can share it."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ildistil.errors import TargetsError, writing
from ildistil.teachers.layout import Column, Dtype, Header, TeacherFacts, torch_dtype
from ildistil.teachers.rows import KEY_BYTES

__all__ = ["DESCRIPTION", "SHARD_BYTES", "Places", "Store", "missing"]

# What a run that is killed loses at most, and what waits in memory.
SHARD_BYTES = 128 * 2**20
DESCRIPTION = "targets.json"
_KEYS, _STARTS = "row.keys", "row.starts"
Places = NDArray[np.int64]  # the shard of each row and its number there; -1 where it isn't stored
_DAY = 24 * 60 * 60  # seconds
_ELSEWHERE = "Name another folder."
_OF = "targets"  # in a shard's metadata: the digest of its description


class Shard:
    """One file of rows, mapped into memory rather than read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _opened(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                return tensors, file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise self.damaged(str(error)) from error

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file; what isn't looked at isn't read.

        Raises:
            TargetsError: the file is damaged.
        """
        return self._opened[0]

    @cached_property
    def starts(self) -> list[int]:
        """Where the tokens of each row start, and where the last ones end."""
        found: list[int] = self.tensors[_STARTS].tolist()
        return found

    @cached_property
    def keys(self) -> NDArray[Any]:
        """The keys of the rows."""
        return self.tensors[_KEYS].numpy().view(f"S{KEY_BYTES}")[:, 0]

    def check(self, header: Header) -> None:
        """Refuse a file whose tensors aren't those of the description.

        Raises:
            TargetsError: the file is damaged, or of another folder.
        """
        shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        if not {_KEYS, _STARTS} <= shapes.keys():
            raise self.damaged("it has no rows")
        rows, tokens = len(self.tensors[_KEYS]), int(self.tensors[_STARTS][-1])
        expected = {c.name: (tokens if c.per_token else rows, c.width) for c in header.layout.columns}
        if shapes != {_KEYS: (rows, KEY_BYTES), _STARTS: (rows + 1,), **expected}:
            raise self.damaged(f"it holds {shapes}, the description says {expected}")
        dtypes = {self.tensors[name].dtype for name in expected} - {torch_dtype(header.dtype)}
        if dtypes:
            raise self.damaged(f"it is in {', '.join(map(str, dtypes))}, the description says {header.dtype}")
        if self._opened[1].get(_OF) != header.digest:
            raise self.damaged(f"it was written for another {DESCRIPTION} than the one beside it")

    def damaged(self, why: str) -> TargetsError:
        """Make the error for a file that can't be used."""
        return TargetsError(
            f"The targets in {self.path} can't be read: {why}. Delete this file and run 'ildistil precompute' again, "
            "which makes what is missing."
        )


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
        draft = self.folder / f".{DESCRIPTION}-{uuid.uuid4().hex[:12]}"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft.write_text(header.to_json(), encoding="utf-8")
            try:
                os.link(draft, self.folder / DESCRIPTION)  # unlike a rename it fails where there is one
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                draft.rename(self.folder / DESCRIPTION)
            finally:
                draft.unlink(missing_ok=True)
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
            row |= {_STARTS: torch.tensor([lengths[i]])}
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
            tensors[_STARTS] = torch.cat([torch.zeros(1, dtype=torch.long), tensors[_STARTS].cumsum(0)])
            tensors[_KEYS] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
            self._check_space()
            name = f"shard-{uuid.uuid4().hex[:12]}.safetensors"
            draft = self.folder / f".{name}"
            with writing(self.folder):
                try:
                    # save_file would hide it from all other users
                    draft.write_bytes(save(tensors, {_OF: self.header.digest}))
                    draft.rename(self.folder / name)
                finally:
                    draft.unlink(missing_ok=True)
            self._open, self._open_keys, self._open_bytes = [], set(), 0
        self.refresh()

    def tidy(self) -> None:
        """Delete drafts of shards that a killed run left a day ago or before; a younger one may be in the making."""
        for draft in self.folder.glob(".shard-*"):
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if time.time() - draft.stat().st_mtime > _DAY:
                    draft.unlink()

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
