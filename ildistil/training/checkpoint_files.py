"""The files of checkpoints: written whole and with a checksum, read from this machine and as plain values only."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ildistil import storage
from ildistil.errors import CheckpointError, WriteError
from ildistil.training.checkpoint import KEY, Saved

__all__ = ["CheckpointFiles", "load", "newest"]


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file: tensors and plain values only, since a foreign file must not be able to run code.

    Raises:
        CheckpointError: there is no such file, or it isn't a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise CheckpointError(f"There is no file {str(path)!r}. Checkpoints beside it: {', '.join(near) or 'none'}.")
    try:
        sealed = storage.is_sealed(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{str(path)!r} can't be read: {error.strerror}.") from error
    except Exception as error:  # whatever a damaged or foreign file makes zipfile, pickle or torch raise
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint that can be read: it is damaged, or holds other things than tensors and "
            "plain values. Name another."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(content).__name__}, not a checkpoint. Name another.")
    said = content.get(KEY)
    if not sealed and isinstance(said, Mapping) and said.get("sealed"):
        raise CheckpointError(f"{str(path)!r} is damaged: it isn't what was written. Delete it, and name another.")
    for name, value in _tensors(content.get("state_dict")):
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{name} in {str(path)!r} holds NaN or infinite values: the training had failed. Name an earlier one."
            )
    return content


def newest(folder: Path) -> Path | None:
    """Return the newest good checkpoint of a folder, others than ``last`` and ``previous`` only where these are none.

    Returns:
        Its path; ``None`` where there is none, or none that was written between two steps.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    files, damaged = {path: path.stat().st_mtime_ns for path in folder.glob("*.ckpt")}, []
    found = sorted(files, key=lambda path: (path.stem in ("last", "previous"), files[path]), reverse=True)
    for path in found:
        try:
            content = load(path)
            # One that was written within a step, or holds weights alone, can't be gone on from.
            if not Saved.read(content, repr(str(path))).waiting and "optimizer_states" in content:
                return path
        except CheckpointError as error:
            damaged.append(path)
            rank_zero_warn(f"{error} Going on from an earlier one.")
    if damaged:
        raise CheckpointError(f"All checkpoints in {str(folder)!r} are damaged. Delete them, and start a new run.")
    return None


def _save(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:  # torch writes in C++, where a full disk is one
        raise WriteError(
            f"{path.parent} can't be written to ({str(error).splitlines()[0][:120]}); most often the disk is full. "
            "Free some space, or name a folder on another disk."
        ) from error


class CheckpointFiles(TorchCheckpointIO):
    """How a Trainer with a Distiller writes and reads checkpoints: whole or not at all, synced, with a checksum.

    A Distiller puts it in the place of Lightning's own, which moves files between file systems and reads pickles. What
    is to be written to another place than a local file (``s3://...``) is left to Lightning, and can't be read here.
    """

    def __init__(self) -> None:
        self._failures: list[WriteError] | None = None

    @contextmanager
    def collecting(self, failures: list[WriteError]) -> Iterator[None]:
        """Collect what could not be written, instead of raising it in the one process that writes."""
        self._failures = failures
        try:
            yield
        finally:
            self._failures = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            WriteError: there is no space, or no permission; the file that was there stays.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if KEY in checkpoint:
            checkpoint[KEY]["sealed"] = True
        try:
            with storage.replacing(Path(path)) as draft:
                _save(checkpoint, draft)
                storage.seal(draft)
        except WriteError as error:
            if self._failures is None:
                raise
            self._failures.append(error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint: a local file, of tensors and plain values only.

        Raises:
            CheckpointError: it can't be read, is damaged, or holds weights that aren't finite.
        """
        return load(path)


def _tensors(weights: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(weights, Mapping):
        yield from ((str(name), value) for name, value in weights.items() if isinstance(value, Tensor))
