"""Errors of this library: one base, which the commands and the dry run catch, and a kind for each place to look.

A message says what is wrong, what was got, and the remedy. Each kind is also the builtin exception that a caller
without this library in mind would expect. Whatever is none of these is a bug, in this library or in code it was given,
and is never swallowed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "IldistilError",
    "KernelError",
    "MissingFileError",
    "ModelError",
    "ModelRunError",
    "NotFiniteError",
    "ObjectiveError",
    "ProcessError",
    "Stopped",
    "TargetsError",
    "WriteError",
    "writing",
]


class IldistilError(Exception):
    """Base of all errors that this library raises on purpose."""


class ConfigError(IldistilError, ValueError):
    """A setting is out of range, or settings contradict each other."""


class DataError(IldistilError, ValueError):
    """Data, or a batch of it, that can't be used."""


class MissingFileError(DataError, FileNotFoundError):
    """A file or folder that isn't there."""


class ModelError(IldistilError, ValueError):
    """A model that can't be loaded or made, or two that don't go together."""


class CaptureError(IldistilError, RuntimeError):
    """A model did not give what was wanted of it."""


class ModelRunError(CaptureError):
    """A model's own forward failed on a batch."""


class KernelError(IldistilError, RuntimeError):
    """A backend that doesn't exist, or can't run here."""


class ObjectiveError(IldistilError, ValueError):
    """An objective can't work with these two models, or this batch."""


class TargetsError(CaptureError):
    """Stored targets that are missing, damaged, or of something else."""


class CheckpointError(IldistilError, ValueError):
    """A checkpoint that can't be read, or isn't of this run."""


class ProcessError(IldistilError, RuntimeError):
    """Another process of the run, or a worker of its data, is gone; or there is no memory left."""


class Stopped(IldistilError, SystemExit):  # noqa: N818 - nothing failed
    """A training that was told to stop by a signal, after it was saved; ends a script with 128 + the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.code = 128 + signum


class WriteError(IldistilError, OSError):
    """A file that can't be written."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a `DataError` where the operating system or the decoder refuses a file.

    Raises:
        DataError: it can't be read, or is no text in UTF-8.
    """
    try:
        yield
    except IldistilError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}. Check its permissions and disk.") from error


@contextmanager
def writing(where: object) -> Iterator[None]:
    """Raise a `WriteError` where a file can't be written, for want of space or of permission.

    Raises:
        WriteError: the operating system refuses.
    """
    try:
        yield
    except IldistilError:
        raise
    except (OSError, SafetensorError) as error:
        raise WriteError(
            f"{where} can't be written ({error}). Free some space, or name a folder that is yours."
        ) from error


class NotFiniteError(IldistilError, FloatingPointError):
    """A loss or gradient that is NaN or infinite."""
