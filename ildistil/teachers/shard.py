"""One file of targets: rows, and the checksum of every value of a row, which is compared when it is first read."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ildistil.errors import TargetsError
from ildistil.teachers.layout import Column, Header, torch_dtype
from ildistil.teachers.rows import KEY_BYTES

__all__ = ["CHECKS", "INDEX", "KEYS", "OF", "STARTS", "Shard", "checks", "index_digest"]

KEYS, STARTS, CHECKS = "row.keys", "row.starts", "row.checks"
OF, INDEX = "targets", "index"  # in the metadata: the digests of the description, and of the three tensors above


class Shard:
    """One file of rows, mapped into memory rather than read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: dict[str, _Hashed] = {}
        self._verified: dict[str, bytearray] = {}  # by column, a byte for each row

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
        found: list[int] = self.tensors[STARTS].tolist()
        return found

    @cached_property
    def keys(self) -> NDArray[Any]:
        """The keys of the rows."""
        return self.tensors[KEYS].numpy().view(f"S{KEY_BYTES}")[:, 0]

    @cached_property
    def checks(self) -> NDArray[np.int64]:
        """The checksum of each row of each column."""
        found: NDArray[np.int64] = self.tensors[CHECKS].numpy()
        return found

    def check(self, header: Header) -> None:
        """Refuse a file whose tensors aren't those of the description, or whose rows are other ones than were written.

        Raises:
            TargetsError: the file is damaged, or of another folder.
        """
        shapes = {name: tuple(value.shape) for name, value in self.tensors.items()}
        if not {KEYS, STARTS, CHECKS} <= shapes.keys() or self._opened[1].get(INDEX) != index_digest(self.tensors):
            raise self.damaged("its list of rows isn't what was written")
        columns, rows, tokens = header.layout.columns, len(self.tensors[KEYS]), int(self.tensors[STARTS][-1])
        expected = {c.name: (tokens if c.per_token else rows, c.width) for c in columns}
        index = {KEYS: (rows, KEY_BYTES), STARTS: (rows + 1,), CHECKS: (rows, len(columns))}
        if shapes != index | expected:
            raise self.damaged(f"it holds {shapes}, the description says {expected}")
        dtypes = {self.tensors[name].dtype for name in expected} - {torch_dtype(header.dtype)}
        if dtypes:
            raise self.damaged(f"it is in {', '.join(map(str, dtypes))}, the description says {header.dtype}")
        if self._opened[1].get(OF) != header.digest:
            raise self.damaged("it was written for another targets.json than the one beside it")
        self._columns = {c.name: _Hashed(self.tensors, c, number) for number, c in enumerate(columns)}
        self._verified = {column.name: bytearray(rows) for column in columns}

    def verify(self, row: int, column: str) -> None:
        """Compare a row of a column with its checksum, the first time.

        Raises:
            TargetsError: it isn't what was written.
        """
        verified = self._verified[column]
        if verified[row]:
            return
        hashed = self._columns[column]
        if hashed(row, self.starts) != self.checks[row, hashed.number]:
            raise self.damaged(f"{column} of row {row} isn't what was written")
        verified[row] = True

    def damaged(self, why: str) -> TargetsError:
        """Make the error for a file that can't be used."""
        return TargetsError(
            f"The targets in {self.path} can't be read: {why}. Delete this file and run 'ildistil precompute' again, "
            "which makes what is missing."
        )


class _Hashed:
    """Makes the checksums of a column; the same values have another in another row or column."""

    def __init__(self, tensors: Mapping[str, Tensor], column: Column, number: int) -> None:
        self.number, self.per_token = number, column.per_token
        self.values, self.keys = _bytes(tensors[column.name]), _bytes(tensors[KEYS])
        self.seed = xxhash.xxh3_64_intdigest(column.name.encode())

    def __call__(self, row: int, starts: Sequence[int]) -> int:
        begin, end = (starts[row], starts[row + 1]) if self.per_token else (row, row + 1)
        seed = self.seed ^ xxhash.xxh3_64_intdigest(self.keys[row].data)
        return int.from_bytes(xxhash.xxh3_64_digest(self.values[begin:end].data, seed), "big", signed=True)


def checks(tensors: Mapping[str, Tensor], columns: Sequence[Column]) -> Tensor:
    """Return the checksum of each row of each column, ``(rows, columns)``."""
    starts: list[int] = tensors[STARTS].tolist()
    hashed = [_Hashed(tensors, column, number) for number, column in enumerate(columns)]
    return torch.tensor([[each(row, starts) for each in hashed] for row in range(len(starts) - 1)])


def index_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the checksum of what says which rows there are."""
    digest = xxhash.xxh3_128()
    for name in (KEYS, STARTS, CHECKS):
        digest.update(_bytes(tensors[name]).data)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = tensor.view(torch.uint8).numpy()
    return found
