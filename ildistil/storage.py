"""Files that are whole or not there, and whose damage is noticed: every room writes and verifies what it keeps here.

A file is written beside its place, synced to the disk, and renamed, so that a kill or a full disk leaves the old one.
Drafts that a killed process left are swept by the next one that writes there: a draft in the making is locked, and the
lock of a process ends with it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import xxhash

from ildistil.errors import IldistilError, writing

__all__ = [
    "CHANGED",
    "DRAFT",
    "MANIFEST",
    "checksum",
    "hold",
    "is_sealed",
    "replacing",
    "replacing_folder",
    "seal",
    "sweep",
    "verify_folder",
    "write_manifest",
    "write_text",
]

#: The file of a folder that names all others with their sizes and checksums.
MANIFEST = "checksums.json"
#: What is to be done about a folder of a model that isn't what was exported.
CHANGED = f"Export it again; if it was changed on purpose, delete {MANIFEST} in its folder."
#: What the names of drafts hold.
DRAFT = ".draft-"
_CHUNK = 1 << 24
_SEAL = b"xxh3_128 "
_SEAL_BYTES = len(_SEAL) + 32


@contextlib.contextmanager
def replacing(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a draft to write; put it in the place of ``path`` when the block ends, and remove it if it fails.

    Args:
        path: the file.
        keep: leave a file that another process put there meanwhile.

    Raises:
        WriteError: there is no space, or no permission.
    """
    with _draft(path, folder=False) as draft:
        yield draft
        _sync(draft)
        if not keep or not _linked(draft, path):
            os.replace(draft, path)
        _sync(path.parent)


@contextlib.contextmanager
def replacing_folder(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Yield a folder to fill; write its manifest and put it in its place when the block ends, or remove it.

    A folder with files is replaced file by file, the manifest first, so that what is neither old nor new is noticed.
    Files that no manifest names stay.

    Args:
        path: the folder.
        keep: leave a folder with files that another process put there meanwhile.

    Raises:
        WriteError: there is no space, or no permission.
    """
    with _draft(path, folder=True) as draft:
        yield draft
        write_manifest(draft)
        mode = draft.stat().st_mode & 0o666
        for file in _files(draft):
            file.chmod(mode)  # some writers hide what they write from everybody else
            _sync(file)
        _sync(draft)
        if not _renamed(draft, path) and not keep:
            _move_files(draft, path)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        WriteError: there is no space, or no permission.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def hold(path: Path) -> int | None:
    """Lock a file until this process ends; return its handle, or ``None`` where another process holds it.

    Raises:
        WriteError: there is no permission.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not flock: processes that this one forks, such as workers of the data, would hold that longer than it lives.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(handle)
        return None
    return handle


def sweep(folder: Path) -> None:
    """Remove the drafts of processes that are gone, as far as this one may."""
    with contextlib.suppress(OSError):
        for draft in folder.glob(f".*{DRAFT}*"):
            with contextlib.suppress(OSError), _opened(draft) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(draft)


def checksum(path: Path, end: int | None = None) -> str:
    """Return the XXH3 checksum (128 bits) of a file, or of its first ``end`` bytes, in hexadecimal digits."""
    digest, left = xxhash.xxh3_128(), path.stat().st_size if end is None else end
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(_CHUNK, left))):
            digest.update(part)
            left -= len(part)
    return digest.hexdigest()


def seal(path: Path) -> None:
    """Write the checksum of a zip archive into its comment, where readers of archives pass over it.

    Args:
        path: an archive without a comment, such as ``torch.save`` writes.
    """
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the last two bytes of such an archive are the length of its comment
        file.write(_SEAL_BYTES.to_bytes(2, "little"))
    digest = checksum(path)
    with path.open("ab") as file:
        file.write(_SEAL + digest.encode())


def is_sealed(path: Path) -> bool:
    """Return whether a file ends with the checksum of all that is before it."""
    end = path.stat().st_size - _SEAL_BYTES
    if end < 0:
        return False
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read()
    return tail.startswith(_SEAL) and tail == _SEAL + checksum(path, end).encode()


def write_manifest(folder: Path) -> None:
    """Write the sizes and checksums of a folder's files."""
    named = [f for f in _files(folder) if f != folder / MANIFEST]
    files = {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "xxh3_128": checksum(f)} for f in named}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")


def verify_folder(folder: Path, error: type[IldistilError], remedy: str, skip: tuple[str, ...] = ()) -> bool:
    """Compare a folder with its manifest; return whether it has one.

    Args:
        folder: what to verify; files that the manifest doesn't name don't count.
        error: what is raised.
        remedy: what the message says is to be done.
        skip: endings of files that aren't going to be read.

    Raises:
        IldistilError: a file is missing, or isn't what was written.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        expected = _named(path)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as caught:
        raise error(f"{path} is damaged ({caught!r}). {remedy}") from caught
    for name, (size, digest) in expected.items():
        file = folder / name
        if name.endswith(skip):
            continue
        if not file.is_file():
            raise error(f"{file} is missing. {remedy}")
        if file.stat().st_size != size or checksum(file) != digest:
            raise error(f"{file} is damaged: it isn't what was written. {remedy}")
    return True


@contextlib.contextmanager
def _draft(path: Path, *, folder: bool) -> Iterator[Path]:
    """Yield a locked draft beside a path, and remove what is left of it."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        draft, handle = _locked(path, folder=folder)
        try:
            yield draft
        finally:
            _remove(draft)
            os.close(handle)


def _locked(path: Path, *, folder: bool) -> tuple[Path, int]:
    """Make a draft, and lock it before another process sweeps it."""
    while True:
        draft = path.with_name(f".{path.name}{DRAFT}{uuid.uuid4().hex[:12]}")
        draft.mkdir() if folder else draft.touch()
        try:
            handle = os.open(draft, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(handle, fcntl.LOCK_EX)
        if draft.exists():
            return draft, handle
        os.close(handle)


def _linked(draft: Path, path: Path) -> bool:
    """Put a draft in its place unless there is a file; return whether there is one now."""
    try:
        os.link(draft, path)  # unlike a rename it fails where there is one
    except FileExistsError:
        return True
    except OSError:  # a file system without links
        return path.exists()
    return True


def _renamed(draft: Path, path: Path) -> bool:
    """Put a folder in its place unless there is one with files; return whether it is there."""
    try:
        draft.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        return False
    return True


def _move_files(draft: Path, path: Path) -> None:
    """Put the files of a folder in the place of another's, and remove those that only the other's manifest names."""
    new, former = _named(draft / MANIFEST), {}
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError, AttributeError):  # it has none, or a damaged one
        former = _named(path / MANIFEST)
    for file in reversed(_files(draft)):
        place = path / file.relative_to(draft)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
        _sync(place.parent)
    for name in former.keys() - new.keys():
        (path / name).unlink(missing_ok=True)


def _named(manifest: Path) -> dict[str, tuple[int, str]]:
    """Return the files that a manifest names, with their sizes and checksums."""
    said = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    if outside := [name for name in said if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{outside[0]} is outside of the folder")
    return {str(name): (int(each["bytes"]), str(each["xxh3_128"])) for name, each in said.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _files(folder: Path) -> list[Path]:
    """Return a folder's files but its manifest first, sorted; drafts and hidden files don't count."""
    found = [f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")]
    return sorted(f for f in found if f != folder / MANIFEST) + [f for f in found if f == folder / MANIFEST]


def _sync(path: Path) -> None:
    with _opened(path) as handle:
        os.fsync(handle)
