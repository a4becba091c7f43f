"""Tokenised data on disk, found by what it was made of; several processes may write the same entry at once."""

import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import datasets

from ildistil.data.files import expanded
from ildistil.errors import DataError, MissingFileError

# Part of every key; to be raised when the same input would be stored in another way.
CACHE_VERSION = 2


def cache_entry(cache_dir: str | None, **made_of: Any) -> Path:
    """Return the folder of one entry; its name is a hash of everything that the entry is made of.

    The cache is ``cache_dir``, else ``$ILDISTIL_CACHE``, else ``~/.cache/ildistil``.
    """
    folder = expanded(cache_dir or os.environ.get("ILDISTIL_CACHE") or "~/.cache/ildistil")
    content = json.dumps({"version": CACHE_VERSION} | made_of, sort_keys=True)
    return folder / "tokenized" / hashlib.sha256(content.encode()).hexdigest()[:32]


def store(rows: datasets.Dataset, entry: Path) -> None:
    """Write an entry as Arrow files; it appears at once and complete, or not at all.

    The rename is atomic. Where another process was faster, its entry is kept: both were made of the same.

    Raises:
        DataError: The folder can't be written to.
    """
    draft = entry.with_name(f".{entry.name}-{uuid.uuid4().hex}")
    try:
        rows.save_to_disk(draft)
        draft.rename(entry)
    except OSError as error:
        if not entry.is_dir():
            raise DataError(
                f"The tokenised data can't be written to {entry.parent}: {error.strerror or error}. Free space there, "
                "or set cache_dir or $ILDISTIL_CACHE to another folder."
            ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(entry: Path) -> datasets.Dataset:
    """Open an entry, mapped into memory rather than read.

    Raises:
        MissingFileError: There is no such entry.
        DataError: The entry is damaged.
    """
    if not entry.is_dir():
        raise MissingFileError(
            f"No tokenised data in {entry}. Call prepare_data() before setup(); a Trainer does both."
        )
    try:
        return datasets.load_from_disk(entry)
    except Exception as error:  # pyarrow, json or datasets: whatever a damaged file makes them raise
        raise DataError(
            f"The tokenised data in {entry} is damaged ({error}). Delete this folder, run again."
        ) from error
