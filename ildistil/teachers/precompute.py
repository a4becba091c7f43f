"""Store the targets of a data set before training, after saying how large they get."""

import copy
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from tqdm import tqdm

from ildistil.capture import ModelInfo, Tap
from ildistil.errors import TargetsError
from ildistil.objectives.base import Objective
from ildistil.teachers.layout import Column, Dtype, Layout
from ildistil.teachers.making import Maker
from ildistil.teachers.rows import KEY_BYTES
from ildistil.teachers.stored import StoredTeacher
from ildistil.teachers.teacher import Batch

__all__ = ["Estimate", "estimate", "precompute"]

Batches = Iterable[Batch]
Device = torch.device | str | None
Objectives = Iterable[Objective] | Mapping[str, Objective]

_ROW_BYTES, _CHECK_BYTES = KEY_BYTES + 8, 8  # its key, and where its tokens start; the checksum of each column of it


@dataclass(frozen=True)
class Estimate:
    """How much there is to store: rows, each counted once, and their tokens; of all, and of those not stored yet."""

    folder: Path
    dtype: Dtype
    layout: Layout
    rows: int
    tokens: int
    missing_rows: int
    missing_tokens: int

    @property
    def bytes(self) -> int:
        """Bytes of the targets of all rows."""
        return self._bytes(self.rows, self.tokens)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be written."""
        return self._bytes(self.missing_rows, self.missing_tokens)

    @property
    def free_bytes(self) -> int:
        """Bytes that are free on the folder's disk."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free

    def check_space(self) -> None:
        """Refuse to fill the disk.

        Raises:
            TargetsError: the disk has less space than is needed.
        """
        if self.missing_bytes > self.free_bytes:
            raise TargetsError(
                f"The targets need {_size(self.missing_bytes)} more, and {_size(self.free_bytes)} are free on the disk "
                f"of {self.folder}. Free some, name a folder on another disk, map fewer layers, or train on fewer rows."
            )

    def __str__(self) -> str:
        """Return it as a table."""
        per_token, per_row = self._bytes_per()
        lines = [
            f"Targets in {self.folder}, in {self.dtype}",
            f"  rows    {self.rows:,} different ones, of which {self.rows - self.missing_rows:,} are stored",
            f"  tokens  {self.tokens:,} at {per_token:,} bytes; {per_row:,} bytes a row beside",
            *(f"  {_told(column)}" for column in self.layout.columns),
            f"  needed  {_size(self.bytes)}, of which {_size(self.missing_bytes)} are to be written; "
            f"{_size(self.free_bytes)} are free",
        ]
        return "\n".join(lines)

    def _bytes(self, rows: int, tokens: int) -> int:
        per_token, per_row = self._bytes_per()
        return tokens * per_token + rows * per_row

    def _bytes_per(self) -> tuple[int, int]:
        """Return the bytes of a token, and those of a row beside its tokens."""
        per_token, per_row = (self.layout.bytes_per(token=token, dtype=self.dtype) for token in (True, False))
        return per_token, per_row + _ROW_BYTES + _CHECK_BYTES * len(self.layout.columns)


def estimate(
    stored: StoredTeacher,
    objectives: Objectives,
    student: nn.Module | ModelInfo,
    batches: Batches,
    *,
    device: Device = None,
) -> Estimate:
    """Count what :func:`precompute` would store. The teacher runs on one batch at most.

    Args:
        stored: the stored teacher, with the teacher itself where nothing is stored yet.
        objectives: what will be trained by.
        student: the student, or its info: layer mappings depend on its depth.
        batches: the training data; gone through once.
        device: where the teacher runs; by default where it is.
    """
    with closing(Maker(stored, _wanted(stored, objectives, student))) as maker:
        return _estimate(maker, batches, device)


def precompute(
    stored: StoredTeacher,
    objectives: Objectives,
    student: nn.Module | ModelInfo,
    batches: Batches,
    *,
    device: Device = None,
    report: Callable[[str], object] = rank_zero_info,
) -> Estimate:
    """Report what is needed, and store the targets of all rows that aren't stored yet, with a progress bar.

    Whoever is interrupted goes on by calling it again.

    Args:
        stored: where to, with the teacher: ``StoredTeacher(folder, teacher)``.
        objectives: what will be trained by; terms whose weight is 0 are left out.
        student: the student, or its info: layer mappings depend on its depth.
        batches: the training data, gone through twice: a list or a loader, best with rows of similar length in a
            batch.
        device: where the teacher runs; by default where it is.
        report: takes the estimate as a text, where anything is missing.

    Returns:
        What there was to do.

    Raises:
        TargetsError: the disk hasn't the space, or something wanted can't be stored.

    >>> import tempfile
    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from ildistil import Distillation, init_student, objectives
    >>> tiny = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
    >>> teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=4, **tiny))
    >>> student = init_student(teacher, layers=[2, 4])
    >>> folder, terms = tempfile.mkdtemp(), [objectives.HiddenMSE()]
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    >>> precompute(StoredTeacher(folder, teacher), terms, student, [batch], report=str).rows
    2
    >>> distill = Distillation(student, StoredTeacher(folder), terms)
    >>> bool(distill(batch).total > 0)
    True
    """
    if iter(batches) is batches:
        raise TargetsError("The batches are gone through twice. Give a list or a DataLoader, not an iterator.")
    with closing(Maker(stored, _wanted(stored, objectives, student))) as maker:
        needed = _estimate(maker, batches, device)
        report(str(needed))
        needed.check_space()
        if needed.missing_rows:
            # A terminal shows a bar, a log file a line now and then.
            seconds = 0.2 if sys.stderr.isatty() else 30
            with tqdm(total=needed.missing_rows, desc="Targets", unit=" rows", mininterval=seconds) as bar:
                for batch in batches:
                    bar.update(maker.fill(_moved(batch, stored, device)))
    return needed


def _wanted(stored: StoredTeacher, objectives: Objectives, student: nn.Module | ModelInfo) -> list[Tap]:
    """Return what objectives may read of the teacher."""
    info = student if isinstance(student, ModelInfo) else ModelInfo.of(student)
    given = objectives.values() if isinstance(objectives, Mapping) else objectives
    used = [copy.deepcopy(objective) for objective in given if objective.weight != 0 and objective.needs_teacher]
    with torch.random.fork_rng(devices=[]):  # projections are made, at random, and not used
        for objective in used:  # copies: the caller's own belong to an engine, with what they learn
            objective.projections = nn.ModuleDict()
            objective.build(info, stored.info)
    wanted = [tap for objective in used for tap in objective.may_read("teacher", stored.info)]
    if not wanted:
        raise TargetsError("None of the objectives reads anything of a teacher, so there is nothing to store.")
    return wanted


def _estimate(maker: Maker, batches: Batches, device: Device) -> Estimate:
    stored = maker.stored
    seen: set[bytes] = set()
    tokens = missing_rows = missing_tokens = 0
    layout: Layout | None = None
    for batch in batches:
        if layout is None:
            layout = maker.layout_for(_moved(batch, stored, device))
        for key, length, missing in maker.survey(batch):
            if key not in seen:
                seen.add(key)
                tokens += length
                missing_rows += missing
                missing_tokens += length * missing
    if layout is None:
        raise TargetsError("There is no batch, so there is nothing to store.")
    counts = (len(seen), tokens, missing_rows, missing_tokens)
    return Estimate(stored.store.folder, stored.dtype, layout, *counts)


def _moved(batch: Batch, stored: StoredTeacher, device: Device) -> dict[str, Any]:
    """Bring a batch to where the teacher runs, which follows it."""
    parameters = () if stored.model is None else stored.model.parameters()
    place = device or next((p.device for p in parameters), None)
    return {k: v.to(place) if isinstance(v, Tensor) and place is not None else v for k, v in batch.items()}


def _told(column: Column) -> str:
    per = "token" if column.per_token else "row"
    return f"  {column.name}: {' x '.join(map(str, column.shape))} for each {per}"


def _size(count: int) -> str:
    """Return a number of bytes in words.

    >>> _size(4_200_000_000), _size(12_000)
    ('4.20 GB', '0.01 MB')
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
