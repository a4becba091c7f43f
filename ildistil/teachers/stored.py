"""A teacher whose answers are read from files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ildistil.capture import ModelInfo
from ildistil.errors import TargetsError
from ildistil.teachers.layout import Dtype, TeacherFacts, torch_dtype
from ildistil.teachers.store import SHARD_BYTES, Store

__all__ = ["StoredTeacher"]


class StoredTeacher(nn.Module):
    """Stands in for a teacher, with what it said stored in a folder; takes its place in every module of this library.

    Args:
        folder: the folder of the targets, made by :func:`~ildistil.teachers.precompute` or by a run with ``teacher``.
        teacher: the model itself, to make what isn't stored yet; or what loads it, called when it is needed. Without
            it, a row that isn't stored is an error.
        dtype: precision of the targets, ``"float16"`` by default; of a folder that exists it must be the same.
        tokenizer: hash of the tokenizer (:func:`ildistil.data.tokenizing.tokenizer_digest`), noted in a new folder.
        source: hash of the files the teacher came from, noted in a new folder.
        shard_bytes: how many bytes of targets wait in memory before they are written.

    Raises:
        TargetsError: there are no targets and no teacher, or they are of another teacher or in another precision.

    Rows are found by what the teacher would read: order, padding and number of epochs don't matter. A ``Distiller``
    reads them before a batch goes to its device, and writes what waits at the end of each epoch; who trains otherwise
    with a ``teacher`` calls :meth:`flush` at the end.
    """

    def __init__(
        self,
        folder: str | Path,
        teacher: nn.Module | Callable[[], nn.Module] | None = None,
        *,
        dtype: Dtype | None = None,
        tokenizer: str | None = None,
        source: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        super().__init__()
        self.store = Store(folder, shard_bytes)
        header = self.store.header
        self.tokenizer = None if header is None else header.tokenizer
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        self.dtype: Dtype = (dtype or "float16") if header is None else header.dtype
        torch_dtype(dtype or "float16")
        if dtype is not None and dtype != self.dtype:
            raise TargetsError(f"The targets in {folder} are in {self.dtype}, not in {dtype}. Name another folder.")
        if header is None and teacher is None:
            raise TargetsError(
                f"There are no targets in {folder}. Make them first: ildistil precompute --config run.yaml "
                f"--model.targets {folder}; or give the teacher, to make them along the way."
            )
        self.live: nn.Module | None = None
        self._loader: Callable[[], nn.Module] | None = None
        if isinstance(teacher, nn.Module):
            self.live = teacher
        elif teacher is not None and header is None:
            self.live = teacher()
        else:
            self._loader = teacher
        if header is None:
            assert self.live is not None
            self.facts = TeacherFacts.of(self.live, source)
        else:
            self.facts = header.teacher
            if self.live is not None:
                self.facts.check(self.live)
        self.store.expected = (self.facts, self.dtype)
        self.made = self._made_before = self._new_before = 0  # rows: all, until this epoch, in the epoch before
        self.requires_grad_(False).eval()

    @property
    def sizes(self) -> ModelInfo:
        """The teacher's sizes."""
        return self.facts.sizes

    @property
    def name_or_path(self) -> str:
        """Where the teacher came from."""
        return self.facts.name_or_path or ""

    @property
    def config(self) -> transformers.PreTrainedConfig | None:
        """The teacher's config, if it had one."""
        if self.facts.config is None:
            return None
        said = {key: value for key, value in self.facts.config.items() if key != "model_type"}
        kind = self.facts.config.get("model_type")
        if kind in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.for_model(kind, **said)
        return transformers.PreTrainedConfig.from_dict(said)

    @property
    def grows(self) -> bool:
        """Whether rows that aren't stored yet can be made."""
        return self.live is not None or self._loader is not None

    def load(self) -> nn.Module:
        """Give the teacher itself, loaded if need be.

        Raises:
            TargetsError: it is another one, or it isn't known where to load it from.
        """
        if self.live is None:
            if self._loader is None:
                raise TargetsError(
                    f"The teacher of the targets in {self.store.folder} isn't there. Give it: "
                    "StoredTeacher(folder, teacher=model)."
                )
            rank_zero_info(f"Rows are missing in {self.store.folder}: the teacher is loaded to make their targets.")
            with torch.random.fork_rng(devices=[]):
                model = self._loader()
            self.facts.check(model)
            self.live = model.requires_grad_(False).eval()
        return self.live

    def skeleton(self) -> transformers.PreTrainedModel | None:
        """Give the teacher's model without weights, to know it by; ``None`` where transformers has no such class."""
        kind, config = getattr(transformers, self.sizes.name, None), self.config
        if kind is None or config is None or not isinstance(config, kind.config_class):
            return None
        with torch.device("meta"):
            model: transformers.PreTrainedModel = kind(config)
        return model

    def check_tokenizer(self, digest: str) -> None:
        """Refuse the data of another tokenizer.

        Args:
            digest: hash of the data's tokenizer.

        Raises:
            TargetsError: it differs from that of the targets.
        """
        if self.tokenizer not in (None, digest):
            raise TargetsError(
                f"The targets in {self.store.folder} were made with another tokenizer than the data's, so that the "
                "same ids are other words. Use the teacher's tokenizer, or make the targets anew in another folder."
            )
        self.tokenizer = digest

    def check_data(self, data: Any) -> None:
        """Compare the tokenizer of a data module, where it has one, with that of the targets.

        Raises:
            TargetsError: they differ.
        """
        from ildistil.data.tokenizing import tokenizer_digest  # data sets' libraries take their time to load

        tokenizer = getattr(data, "tokenizer", None)
        if isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            self.check_tokenizer(tokenizer_digest(tokenizer))

    def refresh(self) -> None:
        """Find what other processes wrote."""
        self.store.refresh()

    def flush(self) -> None:
        """Write the rows that wait in memory."""
        self.store.flush()

    def begin(self) -> None:
        """Note that a training starts."""
        self._made_before, self._new_before = self.made, 0

    def end_epoch(self) -> None:
        """Write the rows that wait, and warn if an epoch makes most of the rows anew that the one before made."""
        self.flush()
        new = self.made - self._made_before
        # A few new rows are those that a sampler or drop_last left out before.
        if 0 < self._new_before < 2 * new:
            rank_zero_warn(
                f"{new:,} rows of this epoch were not stored, though it wasn't the first. Rows that are other ones in "
                "each epoch (tokens masked at random, augmentation) fill the disk for nothing: leave model.targets out."
            )
        self._made_before, self._new_before = self.made, new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Have the teacher follow to a device, in its own precision: the targets are those of its weights."""
        if self.live is not None:
            self.live.to(fn(torch.empty(0, device=next(self.live.parameters()).device)).device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: there is no model to run."""
        raise TargetsError("A stored teacher has no forward: a StoredCapture reads its answers.")

    def extra_repr(self) -> str:
        """Say what is stored."""
        return f"{self.sizes.name}, {len(self.store):,} rows in {self.store.folder}"
