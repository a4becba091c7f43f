"""Files that are whole or not there, and whose damage is noticed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ildistil import storage
from ildistil.errors import DataError, WriteError


def test_a_failure_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    storage.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), storage.replacing(path) as draft:
        draft.write_text("half" * (1 // 0))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    storage.write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"a\.txt can't be written .*No space"):
        storage.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_files_have_the_umask_of_their_user(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        storage.write_text(tmp_path / "a", "x")
        with storage.replacing_folder(tmp_path / "folder") as draft:
            (draft / "b").write_text("y")
            (draft / "b").chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert {(tmp_path / "folder" / n).stat().st_mode & 0o777 for n in ("b", storage.MANIFEST)} == {0o640}


WRITER = """
import sys, time
from pathlib import Path
from ildistil import storage
with storage.replacing(Path(sys.argv[1])) as draft:
    draft.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_only_the_drafts_of_dead_processes_are_swept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    writer.stdout.readline()
    storage.sweep(tmp_path)
    assert len(os.listdir(tmp_path)) == 1  # it is in the making
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    time.sleep(0.05)
    storage.write_text(path, "whole")
    assert os.listdir(tmp_path) == ["a"]


def test_every_flip_in_a_sealed_archive_is_noticed_and_torch_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    tensors = {"a": torch.arange(500.0), "b": [1, 2, {"c": "d"}]}
    torch.save(tensors, path)
    assert not storage.is_sealed(path)
    storage.seal(path)
    assert storage.is_sealed(path)
    assert torch.equal(torch.load(path, weights_only=True)["a"], tensors["a"])
    whole, draw = path.read_bytes(), random.Random(0)
    for place in [*draw.sample(range(len(whole)), 300), *range(len(whole) - 64, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        assert not storage.is_sealed(path), place
    for size in (0, 1, 41, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not storage.is_sealed(path)


def test_every_damage_of_a_folder_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with storage.replacing_folder(folder) as draft:
        (draft / "a").write_bytes(bytes(1000))
        (draft / "sub").mkdir()
        (draft / "sub" / "b").write_bytes(b"text")
    assert storage.verify_folder(folder, DataError, "Delete it.")
    (folder / "sub" / "b").write_bytes(b"texT")
    with pytest.raises(DataError, match=r"sub/b is damaged.* Delete it\."):
        storage.verify_folder(folder, DataError, "Delete it.")
    (folder / "sub" / "b").unlink()
    with pytest.raises(DataError, match=r"sub/b is missing"):
        storage.verify_folder(folder, DataError, "Delete it.")
    for text in ("", "[]", '{"files": {"a": 3}}', json.dumps({"files": {"a": {"bytes": 1}}})):
        (folder / storage.MANIFEST).write_text(text)
        with pytest.raises(DataError, match=r"checksums\.json is damaged"):
            storage.verify_folder(folder, DataError, "Delete it.")


def test_a_folder_is_replaced_or_stays(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()  # an empty one is as good as none
    with storage.replacing_folder(folder) as draft:
        (draft / "a").write_text("1")
        (draft / "b").write_text("1")
    with pytest.raises(ZeroDivisionError), storage.replacing_folder(folder) as draft:
        (draft / "a").write_text("2" * (1 // 0))
    assert (folder / "a").read_text() == "1"
    with storage.replacing_folder(folder) as draft:
        (draft / "a").write_text("3")
    assert (folder / "a").read_text() == "3"
    assert storage.verify_folder(folder, DataError, "")
    assert os.listdir(tmp_path) == ["folder"]


def test_what_is_neither_the_old_nor_the_new_folder_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"

    def write(version: str, *names: str) -> None:
        with storage.replacing_folder(folder) as draft:
            for name in names:
                (draft / name).write_text(version)

    write("1", "a", "b", "old")
    (folder / "mine").write_text("a file that no manifest names")
    real, done = os.replace, 0

    def killed(source: Path, place: Path) -> None:
        nonlocal done
        done += 1
        if done == 3:  # the manifest and a file
            raise KeyboardInterrupt
        real(source, place)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write("2", "a", "b")
    with pytest.raises(DataError, match="is damaged: it isn't what was written"):
        storage.verify_folder(folder, DataError, "")
    write("3", "a", "b")
    assert storage.verify_folder(folder, DataError, "")
    assert {f.name: f.read_text() for f in folder.iterdir() if f.name in ("a", "b", "mine")} == {
        "a": "3", "b": "3", "mine": "a file that no manifest names",
    }  # fmt: skip


def test_files_of_the_former_folder_go(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for names in (("a", "old"), ("a", "new")):
        with storage.replacing_folder(folder) as draft:
            for name in names:
                (draft / name).touch()
    assert sorted(os.listdir(folder)) == ["a", storage.MANIFEST, "new"]
    (folder / storage.MANIFEST).write_text('{"files": {"../a": {"bytes": 0, "xxh3_128": ""}}}')
    (tmp_path / "a").touch()
    with pytest.raises(DataError, match="is damaged"):
        storage.verify_folder(folder, DataError, "")
    with storage.replacing_folder(folder) as draft:
        (draft / "a").touch()
    assert (tmp_path / "a").exists()


def test_what_another_process_wrote_meanwhile_is_kept_if_so_wanted(tmp_path: Path) -> None:
    with storage.replacing(tmp_path / "a", keep=True) as draft:
        (tmp_path / "a").write_text("theirs")
        draft.write_text("mine")
    with storage.replacing_folder(tmp_path / "b", keep=True) as draft:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "c").write_text("theirs")
        (draft / "c").write_text("mine")
    assert ((tmp_path / "a").read_text(), (tmp_path / "b" / "c").read_text()) == ("theirs", "theirs")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
