"""Tokenised data on disk, found by what it was made of; several processes may write the same entry at once."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_warn

from ildistil import storage
from ildistil.data.files import expanded
from ildistil.errors import DataError, MissingFileError, WriteError

# Part of every key; to be raised when the same input would be stored in another way.
CACHE_VERSION = 3


def cache_folder(cache_dir: str | None) -> Path:
    """Return the folder of the cache: ``cache_dir``, else ``$ILDISTIL_CACHE``, else ``~/.cache/ildistil``."""
    return expanded(cache_dir or os.environ.get("ILDISTIL_CACHE") or "~/.cache/ildistil")


def cache_entry(cache_dir: str | None, **made_of: Any) -> Path:
    """Return the folder of one entry; its name is a hash of everything that the entry is made of."""
    content = json.dumps({"version": CACHE_VERSION} | made_of, sort_keys=True)
    return cache_folder(cache_dir) / "tokenized" / hashlib.sha256(content.encode()).hexdigest()[:32]


def store(rows: datasets.Dataset, entry: Path) -> None:
    """Write an entry as Arrow files; it appears at once and complete, or not at all.

    Where another process was faster, its entry is kept: both were made of the same.

    Raises:
        DataError: The folder can't be written to.
    """
    try:
        with storage.replacing_folder(entry, keep=True) as draft:
            rows.save_to_disk(draft)
    except WriteError as error:
        why = getattr(error.__cause__, "strerror", None) or error.__cause__
        raise DataError(
            f"The tokenised data can't be written to {entry.parent}: {why}. Free space there, or set cache_dir or "
            "$ILDISTIL_CACHE to another folder."
        ) from error


def stored(entry: Path) -> bool:
    """Return whether an entry is there; one that is damaged is removed with a warning, since it can be made anew.

    Raises:
        DataError: It is damaged and can't be removed.
    """
    if not entry.is_dir():
        return False
    try:
        _verify(entry)
    except DataError as error:
        try:
            shutil.rmtree(entry)
        except OSError:
            raise error from None
        rank_zero_warn(f"{error} (It is made anew.)", category=UserWarning)
        return False
    return True


def load(entry: Path) -> datasets.Dataset:
    """Open an entry, mapped into memory, after comparing it with its checksums.

    Raises:
        MissingFileError: There is no such entry.
        DataError: The entry is damaged.
    """
    if not entry.is_dir():
        raise MissingFileError(
            f"No tokenised data in {entry}. Call prepare_data() before setup(); a Trainer does both."
        )
    _verify(entry)
    try:
        return datasets.load_from_disk(entry)
    except Exception as error:  # pyarrow, json or datasets: whatever another version of them makes of the files
        raise DataError(
            f"The tokenised data in {entry} can't be read ({error}). Delete this folder, run again."
        ) from error


def _verify(entry: Path) -> None:
    if not storage.verify_folder(entry, DataError, f"Delete this folder of tokenised data ({entry}), run again."):
        raise DataError(f"The tokenised data in {entry} is damaged: its checksums are gone. Delete this folder.")
