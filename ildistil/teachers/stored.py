"""A teacher whose answers are read from files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ildistil.attention import Attention
from ildistil.capture import Activations, Layers, ModelInfo, Tap, merged
from ildistil.capture.inputs import TARGETS, token_mask
from ildistil.errors import TargetsError
from ildistil.objectives import Objective
from ildistil.teachers.layout import Column, Dtype, Layout, TeacherFacts, torch_dtype
from ildistil.teachers.rows import Rows, Targets, all_real, positions_of
from ildistil.teachers.store import SHARD_BYTES, Store, missing
from ildistil.teachers.teacher import Batch

__all__ = ["StoredTeacher"]


class StoredTeacher:
    """Answers for a teacher with what it said before, stored in a folder by :func:`~ildistil.teachers.precompute`.

    Args:
        folder: the folder of the targets.
        teacher: the model itself, to make what isn't stored yet; or what loads it, called when it is needed. A
            training that finds rows missing is an error either way: call :func:`~ildistil.teachers.precompute` first,
            as ``ildistil fit`` does by itself.
        dtype: precision of the targets, ``"float16"`` by default; of a folder that exists it must be the same.
        tokenizer: hash of the tokenizer (:func:`ildistil.data.tokenizing.tokenizer_digest`), noted in a new folder.
        source: hash of the files the teacher came from, noted in a new folder.
        shard_bytes: how many bytes of targets wait in memory before they are written.

    Raises:
        TargetsError: there are no targets and no teacher, or they are of another teacher or in another precision.

    Rows are found by what the teacher would read: order, padding and number of epochs don't matter. A ``Distiller``
    reads them before a batch goes to its device.
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
                f"--model.targets {folder}; or precompute(StoredTeacher(folder, teacher), ...)."
            )
        self.model = teacher if isinstance(teacher, nn.Module) else None
        self._loader = None if teacher is self.model else teacher
        if header is None and self._loader is not None:
            self.model = self._loader()
        if header is None:
            assert self.model is not None
            self.facts = TeacherFacts.of(self.model, source)
        else:
            self.facts = header.teacher
            if self.model is not None:
                self.facts.check(self.model)
        self.store.expected = (self.facts, self.dtype)
        self._taps: frozenset[Tap] = frozenset()

    @property
    def info(self) -> ModelInfo:
        """What is known of the teacher."""
        return self.facts.info

    # As a teacher

    def accept(self, student: nn.Module) -> None:
        """Accept any student: no model is there to be changed."""

    @property
    def digest(self) -> str:
        """A hash of the teacher's weights."""
        return self.facts.weights

    @property
    def runs(self) -> bool:
        """No: everything is read."""
        return False

    @property
    def prepares(self) -> bool:
        """Whether the model is there, or what loads it, to make what isn't stored."""
        return self.model is not None or self._loader is not None

    def prepare(
        self,
        objectives: Sequence[Objective],
        student: nn.Module,
        batches: Iterable[Batch],
        *,
        tokenizer: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Store the targets of all rows that aren't stored; see :func:`~ildistil.teachers.precompute`.

        Raises:
            TargetsError: they can't be stored, or those there are have another tokenizer.
        """
        from ildistil.teachers.precompute import precompute  # it needs this class

        if tokenizer is not None:
            self.check_tokenizer(tokenizer)
        if any(o.needs_teacher and o.weight != 0 for o in objectives):
            precompute(self, objectives, student, batches, device=device)

    def open(self, taps: Iterable[Tap]) -> None:
        """Check that everything wanted is stored.

        Raises:
            TargetsError: it isn't, or nothing is stored yet.
        """
        self.store.refresh()
        self._taps = merged(taps)
        if lacking := self._layout.lacking(self._taps):
            raise TargetsError(
                f"The targets in {self.store.folder} have no {', '.join(lacking)}, which the objectives want; they "
                f"have {', '.join(c.name for c in self._layout.columns)}. Make targets for these objectives, in "
                "another folder: ildistil precompute --config run.yaml --model.targets FOLDER."
            )

    def prefetch(self, batch: Batch, taps: Iterable[Tap]) -> Batch:
        """Read the targets of a batch, so that they move to its device along with it.

        Raises:
            TargetsError: rows aren't stored.
        """
        return {**batch, TARGETS: self._read(batch, taps)}

    def rehearse(self, batch: Batch) -> Batch:
        """Add targets of the right shapes to a batch that isn't data; always the same."""
        mask = token_mask(batch)
        if mask is None:
            rows = len(next(v for v in batch.values() if isinstance(v, Tensor)))
            mask = all_real(torch.tensor((self.store.lengths(self.store.first()) or [1]) * rows))
        generator = torch.Generator().manual_seed(0)
        positions, size = positions_of(mask.cpu()), (mask.shape[0], mask.shape[1])
        counts = {True: len(positions), False: size[0]}
        columns = self._layout.named(self._taps)
        values = {c.name: torch.randn(counts[c.per_token], *c.shape, generator=generator) for c in columns}
        return {**batch, TARGETS: Targets(values, positions, size)}

    def __call__(self, batch: Batch, taps: Iterable[Tap], *, verify: bool = False) -> Activations:
        """Return the stored activations of a batch, read now unless they were before.

        Raises:
            TargetsError: rows aren't stored.
        """
        columns = self._layout.named(taps)
        targets = batch.get(TARGETS)
        if targets is None or not {c.name for c in columns} <= targets.values.keys():
            targets = self._read(batch, taps)
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        with torch.autocast(device.type, enabled=False):
            return self._activations(columns, targets.to(device), token_mask(batch))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move nothing: targets follow each batch."""

    def compile(self, **options: Any) -> None:
        """Compile nothing: nothing runs."""

    def describe(self) -> str:
        """Return how many rows are stored, and where."""
        return f"stored: {len(self.store):,} rows in {self.store.folder}"

    def close(self) -> None:
        """Leave the files to others."""

    # Reading

    @property
    def _layout(self) -> Layout:
        if self.store.header is None:
            raise TargetsError(
                f"No targets are stored in {self.store.folder} yet. Make them before the training: "
                "precompute(stored, objectives, student, batches), or ildistil precompute."
            )
        return self.store.header.layout

    def _read(self, batch: Batch, taps: Iterable[Tap]) -> Targets:
        rows = self.rows(batch, self._layout)
        places = self.store.find(rows.keys)
        if lacking := [i for i in missing(places) if rows.lengths is None or rows.lengths[i] > 0]:
            raise self._not_stored(rows, lacking)
        mask = rows.mask if rows.mask is not None else all_real(torch.tensor(self.store.lengths(places)))
        values = self.store.read(places, self._layout.named(taps))
        return Targets(values, positions_of(mask), (mask.shape[0], mask.shape[1]))

    def _activations(self, columns: Iterable[Column], targets: Targets, mask: Tensor | None) -> Activations:
        states: dict[int, Tensor] = {}
        parts: dict[Tap, dict[str, Tensor]] = {}
        others: dict[str, Tensor] = {}
        for column in columns:
            value = targets.per_token(column.name) if column.per_token else targets.per_row(column.name)
            if column.part:
                parts.setdefault(column.tap, {})[column.part] = value.transpose(1, 2)
            elif column.tap.layer is not None:
                states[column.tap.layer] = value
            else:
                others[column.tap.name] = value
        records = {tap.layer: self._attention(tap, found, targets, mask) for tap, found in parts.items()}
        if mask is None:
            mask = torch.ones(targets.size, dtype=torch.bool, device=targets.positions.device)
        depth = self.info.depth
        attention = Layers({k: v for k, v in records.items() if k is not None}, depth, "attention")
        return Activations(
            Layers(states, depth, "hidden"),
            attention,
            mask,
            others,
            others,
            traits=self._layout.traits,
            next_token=self._layout.next_token,
        )

    def _attention(self, tap: Tap, parts: Mapping[str, Tensor], targets: Targets, mask: Tensor | None) -> Attention:
        constants = self._layout.attention[str(tap)]
        # Not a number: who reads what isn't stored has no finite loss.
        nothing = torch.full((), torch.nan, device=targets.positions.device)
        rows, tokens = targets.size
        unread = {part: nothing.expand(rows, h, tokens, size) for part, (h, size) in constants.shapes.items()}
        return constants.attention({**unread, **parts}, mask)

    def rows(self, batch: Batch, layout: Layout | None) -> Rows:
        """Return what names the rows of a batch, and refuse those whose targets can't be stored by themselves.

        Args:
            batch: the batch, on any device.
            layout: what is stored; ``None`` while that isn't known.

        Raises:
            TargetsError: the teacher's values would depend on the padding, or it is given other inputs.
        """
        rows = Rows.of(batch, self.facts.read)
        # A head that reads one position knows how much padding stands before a row, and so does every token that
        # isn't told its place.
        columns = [] if layout is None else layout.columns
        by_row = any(not c.per_token for c in columns)
        rows.check_padding(offset_matters=by_row or "position_ids" not in rows.inputs)
        if any(c.per_token for c in columns if c.name == "logits"):
            rows.check_labels(batch.get("labels"))
        if layout is not None and rows.names != layout.inputs:
            raise TargetsError(
                f"The targets in {self.store.folder} were made from {', '.join(layout.inputs)}; this batch gives the "
                f"teacher {', '.join(rows.names)}. Give it the same, or make targets in another folder."
            )
        return rows

    def _not_stored(self, rows: Rows, lacking: list[int]) -> TargetsError:
        which = "" if rows.numbers is None else f" (the first has the row_id {int(rows.numbers[lacking[0]])})"
        return TargetsError(
            f"{len(lacking)} of the {len(rows)} rows of a batch{which} aren't among the {len(self.store):,} in "
            f"{self.store.folder}. They were added or changed since, or are cut or tokenised otherwise: run 'ildistil "
            "precompute' with this configuration, which adds them. Batches that are other ones in each epoch (tokens "
            f"masked at random, augmentation) can't be stored: leave model.targets out.{rows.rounded()}"
        )

    # The model behind it

    def load(self) -> nn.Module:
        """Return the teacher itself, loaded if need be.

        Raises:
            TargetsError: it is another one, or it isn't known where to load it from.
        """
        if self.model is None:
            if self._loader is None:
                raise TargetsError(
                    f"The teacher of the targets in {self.store.folder} isn't there. Give it: "
                    "StoredTeacher(folder, teacher=model)."
                )
            rank_zero_info(f"Rows are missing in {self.store.folder}: the teacher is loaded to make their targets.")
            with torch.random.fork_rng(devices=[]):
                model = self._loader()
            self.facts.check(model)
            self.model = model
        return self.model.requires_grad_(False).eval()

    def skeleton(self) -> transformers.PreTrainedModel | None:
        """Return the teacher's model without weights, to know it by; ``None`` where transformers has no such class."""
        kind, config = getattr(transformers, self.info.name, None), self._config()
        if kind is None or config is None or not isinstance(config, kind.config_class):
            return None
        with torch.device("meta"):
            model: transformers.PreTrainedModel = kind(config)
        return model

    def _config(self) -> transformers.PreTrainedConfig | None:
        if self.facts.config is None:
            return None
        said = {key: value for key, value in self.facts.config.items() if key != "model_type"}
        kind = self.facts.config.get("model_type")
        if kind in transformers.CONFIG_MAPPING:
            return transformers.AutoConfig.for_model(kind, **said)
        return transformers.PreTrainedConfig.from_dict(said)

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
