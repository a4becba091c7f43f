"""A teacher whose answers are read from files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from ildistil.capture import Activations, Attention, Capture, Layers, Sizes, Tap
from ildistil.capture.inputs import TARGETS, token_mask
from ildistil.capture.taps import Role
from ildistil.targets.errors import TargetsError
from ildistil.targets.layout import Column, Dtype, Header, Layout, TeacherFacts, record_part, recorded, torch_dtype
from ildistil.targets.rows import Rows, Targets
from ildistil.targets.store import SHARD_BYTES, Store

__all__ = ["StoredCapture", "StoredTeacher"]


class StoredTeacher(nn.Module):
    """Stands in for a teacher, with what it said stored in a folder; takes its place in every module of this library.

    Args:
        folder: the folder of the targets, made by :func:`~ildistil.targets.precompute` or by a run with ``teacher``.
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
        self._load: Callable[[], nn.Module] | None = None
        if isinstance(teacher, nn.Module):
            self.live = teacher
        elif teacher is not None and header is None:
            self.live = teacher()
        else:
            self._load = teacher
        if header is None:
            assert self.live is not None
            self.facts = TeacherFacts.of(self.live, source)
        else:
            self.facts = header.teacher
            if self.live is not None:
                self.facts.check(self.live)
        self.made = self._made_before = self._epochs = 0  # rows, in how many epochs
        self.requires_grad_(False).eval()

    @property
    def sizes(self) -> Sizes:
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
        return self.live is not None or self._load is not None

    def capture(self, wanted: Mapping[Tap, str]) -> "StoredCapture":
        """Give what answers for the teacher.

        Args:
            wanted: what may be asked for, see :func:`~ildistil.targets.layout.wanted_targets`.
        """
        return StoredCapture(self, wanted)

    def whole(self) -> nn.Module:
        """Give the teacher itself, loaded if need be.

        Raises:
            TargetsError: it is another one, or it isn't known where to load it from.
        """
        if self.live is None:
            if self._load is None:
                raise TargetsError(
                    f"The teacher of the targets in {self.store.folder} isn't there. Give it: "
                    "StoredTeacher(folder, teacher=model)."
                )
            with torch.random.fork_rng():
                model = self._load()
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

    def end_epoch(self) -> None:
        """Write the rows that wait, and warn if there are new ones in every epoch."""
        self.flush()
        if self._epochs and self.made > self._made_before:
            rank_zero_warn(
                f"{self.made - self._made_before:,} rows of this epoch were not stored, though it wasn't the first. "
                "Rows that are other ones in each epoch (tokens masked at random, augmentation) fill the disk for "
                "nothing: leave model.targets out."
            )
        self._epochs, self._made_before = self._epochs + 1, self.made

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: there is no model to run."""
        raise TargetsError("A stored teacher has no forward: its answers are read by capture(...).")

    def extra_repr(self) -> str:
        """Say what is stored."""
        return f"{self.sizes.name}, {len(self.store):,} rows in {self.store.folder}"


class StoredCapture:
    """Answers as a :class:`~ildistil.capture.Capture` of the teacher does, from its stored targets.

    Args:
        model: the stored teacher.
        wanted: the taps that may be asked for, with the parts of attentions.

    Raises:
        TargetsError: something wanted isn't stored.
    """

    role: Role = "teacher"

    def __init__(self, model: StoredTeacher, wanted: Mapping[Tap, str]) -> None:
        self.model, self.sizes, self.wanted = model, model.sizes, frozenset(wanted)
        self._parts = dict(wanted)
        self._live: Capture | None = None
        self._layout_of_a_try: Layout | None = None
        self._length_of_a_try: int | None = None
        self._check()

    def __call__(
        self, batch: Mapping[str, Any], *, wanted: frozenset[Tap] | None = None, verify: bool = False
    ) -> Activations:
        """Give the stored activations of a batch, on its device; rows that aren't stored are made if they can be.

        Raises:
            TargetsError: rows aren't stored, and there is no teacher to make them.
        """
        taps = self.wanted if wanted is None else wanted
        carried = batch.get(TARGETS)
        if carried is None or not {c.name for c in self._columns(taps)} <= carried.values.keys():
            carried = self.read(batch, taps) or self._made(batch, verify)
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        return self._activations(batch, carried.to(device), taps)

    def close(self) -> None:
        """Give the teacher, if it ran, its plain attention back."""
        if self._live is not None:
            self._live.close()
            self._live = None

    # Reading

    def read(self, batch: Mapping[str, Any], wanted: frozenset[Tap]) -> Targets | None:
        """Read the targets of a batch on any device, on the CPU; ``None`` where the teacher has to run for them.

        Raises:
            TargetsError: rows aren't stored, and there is no teacher to make them.
        """
        store = self.model.store
        if store.header is None:
            return None
        rows = self._rows(batch, store.header.layout)
        found = store.find(rows.keys)
        missing = [i for i in found.missing() if rows.lengths is None or rows.lengths[i] > 0]
        if missing:
            if self.model.grows:
                return None
            raise self._not_stored(rows, missing)
        lengths = torch.tensor(store.lengths(found))
        mask = rows.mask if rows.mask is not None else _all_real(lengths)
        values = store.read(found, self._columns(wanted))
        return Targets(values, _positions(mask), (mask.shape[0], mask.shape[1]))

    def made_up(self, batch: Mapping[str, Any]) -> Targets:
        """Give targets of the right shapes for a batch that isn't data; always the same, and not stored."""
        store, mask = self.model.store, token_mask(batch)
        if store.header is None or (mask is None and not len(store)):
            return self._tried(batch)
        if mask is None:
            rows = len(next(v for v in batch.values() if isinstance(v, Tensor)))
            mask = _all_real(torch.tensor(store.lengths(store.first()) * rows))
        generator = torch.Generator().manual_seed(0)
        positions, size = _positions(mask.cpu()), (mask.shape[0], mask.shape[1])
        counts = {True: len(positions), False: size[0]}
        columns = self._columns(self.wanted)
        values = {c.name: torch.randn(counts[c.per_token], *c.shape, generator=generator) for c in columns}
        return Targets(values, positions, size)

    def _rows(self, batch: Mapping[str, Any], layout: Layout | None) -> Rows:
        rows = Rows.of(batch, self.model.facts.read)
        # A head that reads one position, and rotated queries and keys, know how much padding stands before a row.
        absolute = self.sizes.positions is not None
        columns = [] if layout is None else layout.columns
        placed = "position_ids" in rows.inputs
        turned = any(c.part in ("q", "k") for c in columns)
        by_row = any(not c.per_token for c in columns)
        rows.check_padding(offset_matters=(absolute and (by_row or not placed)) or (turned and not placed))
        if any(c.per_token for c in columns if c.name == "logits"):
            rows.check_labels(batch.get("labels"))
        if layout is not None and rows.names != layout.inputs:
            raise TargetsError(
                f"The targets in {self.model.store.folder} were made from {', '.join(layout.inputs)}; this batch gives "
                f"the teacher {', '.join(rows.names)}. Give it the same, or make targets in another folder."
            )
        return rows

    def _not_stored(self, rows: Rows, missing: list[int]) -> TargetsError:
        which = "" if rows.numbers is None else f" (the first has the row_id {int(rows.numbers[missing[0]])})"
        store = self.model.store
        return TargetsError(
            f"{len(missing)} of the {len(rows)} rows of a batch{which} aren't among the {len(store):,} in "
            f"{store.folder}. They were added or changed since, or are cut or tokenised otherwise: run 'ildistil "
            "precompute' with this configuration, which adds them. Batches that are other ones in each epoch (tokens "
            "masked at random, augmentation) can't be stored: leave model.targets out."
        )

    # Making

    def layout_for(self, batch: Mapping[str, Any]) -> Layout:
        """Tell which tensors are stored; where nothing is stored yet, this is known from a run on a batch."""
        if not len(self.model.store) and self._length_of_a_try is None:
            self._tried(batch)
        return self._layout

    def survey(self, batch: Mapping[str, Any]) -> list[tuple[bytes, int, bool]]:
        """Tell the key of each row with a token, its number of tokens, and whether it isn't stored."""
        rows, store = self._rows(batch, self._layout), self.model.store
        found = store.find(rows.keys)
        missing = set(found.missing())
        if rows.lengths is None:  # all rows have the same number, as those of a first batch
            lengths = [self._length_of_a_try or store.lengths(store.first())[0]] * len(rows)
        else:
            lengths = rows.lengths.tolist()
        return [(key, n, i in missing) for i, (key, n) in enumerate(zip(rows.keys, lengths, strict=True)) if n]

    def _tried(self, batch: Mapping[str, Any]) -> Targets:
        """Run the teacher on a batch without storing anything."""
        _, self._layout_of_a_try, targets = self._run(batch, verify=True)
        self._length_of_a_try = max(targets.lengths())
        return targets

    def fill(self, batch: Mapping[str, Any]) -> int:
        """Store the rows of a batch that aren't stored, and tell how many they were."""
        before = self.model.made
        if self.model.store.header is None or self.read(batch, frozenset()) is None:
            self._made(batch)
        return self.model.made - before

    def _made(self, batch: Mapping[str, Any], verify: bool = False) -> Targets:
        """Run the teacher on a batch, and store those of its rows that aren't stored."""
        store = self.model.store
        rows, layout, targets = self._run(batch, verify)
        if store.header is None:
            store.create(Header(self.model.dtype, self.model.facts, layout, self.model.tokenizer))
        lengths = targets.lengths()
        self.model.made += store.add(rows.keys, lengths, {name: value.cpu() for name, value in targets.values.items()})
        return targets

    def _run(self, batch: Mapping[str, Any], verify: bool) -> tuple[Rows, Layout, Targets]:
        """Run the teacher for all that is stored, whatever a step wants: later steps may want the rest."""
        header = self.model.store.header
        rows = self._rows(batch, None if header is None else header.layout)
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        live = self._running(device)
        # In full precision whatever a step runs in, so that they are what 'precompute' would have stored.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            seen = live(batch, verify=verify)
        layout = Layout.of(self._stored_parts(), seen, rows.names)
        if header is None:
            self._rows(batch, layout)  # now it is known what the padding may not change
        elif header.layout != layout:
            changed = set(header.layout.columns) ^ set(layout.columns)
            names = sorted({column.name for column in changed} or set(layout.scores))
            raise TargetsError(
                f"In this batch {', '.join(names)} of the teacher have other shapes or constants than the targets in "
                f"{self.model.store.folder}. What isn't alike in all batches can't be stored."
            )
        positions, size = _positions(seen.mask), (seen.mask.shape[0], seen.mask.shape[1])
        values = {c.name: self._packed(c, seen, positions) for c in layout.columns}
        return rows, layout, Targets(values, positions, size)

    def _running(self, device: torch.device) -> Capture:
        """Give the capture of the teacher itself, loaded if need be."""
        if self._live is None:
            if self.model.live is None:
                folder = self.model.store.folder
                rank_zero_info(f"Rows are missing in {folder}: the teacher is loaded to make their targets.")
            self._live = Capture(self.model.whole().to(device), self._stored_parts(), "teacher")
        self._live.model.eval()
        return self._live

    def _stored_parts(self) -> dict[Tap, str]:
        """Give what is stored, or, while nothing is, what is wanted."""
        header = self.model.store.header
        if header is None:
            return self._parts
        parts: dict[Tap, str] = {}
        for column in header.layout.columns:
            parts[column.tap] = parts.get(column.tap, "") + column.part
        return parts

    def _packed(self, column: Column, seen: Activations, positions: Tensor) -> Tensor:
        """Take a column out of what was recorded, in the stored precision.

        Raises:
            TargetsError: a number is too large for float16, or there are other tokens than the mask says.
        """
        if column.tap.name == "attention":
            assert column.tap.layer is not None
            value = record_part(seen.attention[column.tap.layer], column.part).transpose(1, 2)
        else:
            value = recorded(column.tap, seen)
        if column.per_token:
            if value.shape[:2] != seen.mask.shape:
                raise TargetsError(
                    f"{column.name} has {value.shape[1]} positions, the batch {seen.mask.shape[1]} tokens. Only what "
                    "has one value for each token of the batch can be stored."
                )
            value = value.flatten(0, 1)[positions]
        stored = value.to(torch_dtype(self.model.dtype))
        if self.model.dtype == "float16" and bool((stored.isinf() & ~value.isinf()).any()):
            raise TargetsError(
                f"{column.name} of the teacher is as large as {value.abs().amax():.3g}, and float16 ends at 65504. "
                "Store bfloat16 or float32 (--model.targets_dtype bfloat16, dtype='bfloat16'), in another folder."
            )
        return stored

    # As activations

    @property
    def _layout(self) -> Layout:
        header = self.model.store.header
        layout = self._layout_of_a_try if header is None else header.layout
        assert layout is not None, "known from the first batch on"
        return layout

    def _columns(self, taps: frozenset[Tap]) -> list[Column]:
        return self._layout.named({tap: self._parts[tap] for tap in taps})

    def _check(self) -> None:
        header, folder = self.model.store.header, self.model.store.folder
        if header is not None and (lacking := header.layout.lacking(self._parts)):
            raise TargetsError(
                f"The targets in {folder} have no {', '.join(lacking)}, which the objectives want; they have "
                f"{', '.join(c.name for c in header.layout.columns)}. Make targets for these objectives, in another "
                "folder: ildistil precompute --config run.yaml --model.targets FOLDER."
            )

    def _activations(self, batch: Mapping[str, Any], targets: Targets, taps: frozenset[Tap]) -> Activations:
        mask = token_mask(batch)
        states: dict[int, Tensor] = {}
        records: dict[int, Attention] = {}
        others: dict[str, Tensor] = {}
        for tap in taps:
            if tap.name == "attention" and tap.layer is not None:
                records[tap.layer] = self._attention(tap, targets, mask)
                continue
            (column,) = self._columns(frozenset({tap}))
            value = targets.padded(column.name) if column.per_token else targets.whole(column.name)
            if tap.layer is not None:
                states[tap.layer] = value
            else:
                others[tap.name] = value
        if mask is None:
            mask = torch.ones(targets.size, dtype=torch.bool, device=targets.positions.device)
        depth = self.sizes.depth
        hidden, attention = Layers(states, depth, "hidden"), Layers(records, depth, "attention")
        return Activations(hidden, attention, mask, {k: v for k, v in others.items() if k == "logits"}, others)

    def _attention(self, tap: Tap, targets: Targets, mask: Tensor | None) -> Attention:
        scores = self._layout.scores[str(tap)]
        parts = {}
        for part, (heads, size) in scores.shapes.items():
            if f"{tap}.{part}" in targets.values:
                parts[part] = targets.padded(f"{tap}.{part}").transpose(1, 2)
            else:  # not a number: who reads it in spite of its attention_parts has no finite loss
                nothing = torch.full((), torch.nan, device=targets.positions.device)
                parts[part] = nothing.expand(targets.size[0], heads, targets.size[1], size)
        return Attention(
            query=parts["q"],
            key=parts["k"],
            value=parts["v"],
            scale=scores.scale,
            causal=scores.causal,
            window=scores.window,
            softcap=scores.softcap,
            key_mask=mask,
            query_mask=mask,
            no_scores=scores.no_scores,
        )


def _positions(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero()[:, 0]


def _all_real(lengths: Tensor) -> Tensor:
    """Give the mask of a batch that has none.

    Raises:
        TargetsError: its rows have different lengths.
    """
    if len(set(lengths.tolist())) != 1:
        raise TargetsError(
            f"The batch has no attention_mask, and its rows have {lengths.tolist()} tokens. Give it the mask."
        )
    return torch.ones(len(lengths), int(lengths[0]), dtype=torch.bool)
