"""What answers for a stored teacher, where a capture answers for one that runs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ildistil.capture import Activations, Attention, Capture, Layers, Tap
from ildistil.capture.inputs import TARGETS, token_mask
from ildistil.capture.taps import Role
from ildistil.errors import TargetsError
from ildistil.teachers.layout import Column, Dtype, Header, Layout, record_part, recorded, torch_dtype
from ildistil.teachers.rows import Rows, Targets, with_and_without_padding
from ildistil.teachers.store import missing
from ildistil.teachers.stored import StoredTeacher

__all__ = ["StoredCapture"]


class StoredCapture:
    """Answers as a :class:`~ildistil.capture.Capture` of the teacher does, from its stored targets.

    Args:
        model: the stored teacher.
        wanted: the taps that may be asked for, with the parts of attentions.

    Raises:
        TargetsError: something wanted isn't stored.
    """

    role: Role = "teacher"
    is_compiled = False

    def __init__(self, model: StoredTeacher, wanted: Mapping[Tap, str]) -> None:
        self.model, self.sizes, self.wanted = model, model.sizes, frozenset(wanted)
        self._parts = dict(wanted)
        self._live: Capture | None = None
        self._trial_layout: Layout | None = None
        self._trial_length: int | None = None
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
        with torch.autocast(device.type, enabled=False):
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
        self._check()  # another process may have begun the folder, for other objectives
        rows = self._rows(batch, store.header.layout)
        places = store.find(rows.keys)
        lacking = [i for i in missing(places) if rows.lengths is None or rows.lengths[i] > 0]
        if lacking:
            if self.model.grows:
                return None
            raise self._not_stored(rows, lacking)
        lengths = torch.tensor(store.lengths(places))
        mask = rows.mask if rows.mask is not None else _all_real(lengths)
        values = store.read(places, self._columns(wanted))
        return Targets(values, _positions(mask), (mask.shape[0], mask.shape[1]))

    def made_up(self, batch: Mapping[str, Any]) -> Targets:
        """Give targets of the right shapes for a batch that isn't data; always the same, and not stored."""
        store, mask = self.model.store, token_mask(batch)
        if store.header is None or (mask is None and not len(store)):
            return self._trial(batch)
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
        # A head that reads one position knows how much padding stands before a row, and so does every token that
        # isn't told its place.
        columns = [] if layout is None else layout.columns
        by_row = any(not c.per_token for c in columns)
        rows.check_padding(offset_matters=by_row or "position_ids" not in rows.inputs)
        if any(c.per_token for c in columns if c.name == "logits"):
            rows.check_labels(batch.get("labels"))
        if layout is not None and rows.names != layout.inputs:
            raise TargetsError(
                f"The targets in {self.model.store.folder} were made from {', '.join(layout.inputs)}; this batch gives "
                f"the teacher {', '.join(rows.names)}. Give it the same, or make targets in another folder."
            )
        return rows

    def _not_stored(self, rows: Rows, lacking: list[int]) -> TargetsError:
        which = "" if rows.numbers is None else f" (the first has the row_id {int(rows.numbers[lacking[0]])})"
        store = self.model.store
        return TargetsError(
            f"{len(lacking)} of the {len(rows)} rows of a batch{which} aren't among the {len(store):,} in "
            f"{store.folder}. They were added or changed since, or are cut or tokenised otherwise: run 'ildistil "
            "precompute' with this configuration, which adds them. Batches that are other ones in each epoch (tokens "
            f"masked at random, augmentation) can't be stored: leave model.targets out.{_rounded(rows)}"
        )

    # Making

    def layout_for(self, batch: Mapping[str, Any]) -> Layout:
        """Tell which tensors are stored; where nothing is stored yet, this is known from a run on a batch."""
        if not len(self.model.store) and self._trial_length is None:
            self._trial(batch)
        return self._layout

    def survey(self, batch: Mapping[str, Any]) -> list[tuple[bytes, int, bool]]:
        """Tell the key of each row with a token, its number of tokens, and whether it isn't stored."""
        rows, store = self._rows(batch, self._layout), self.model.store
        places = store.find(rows.keys)
        lacking = set(missing(places))
        width = rows.token_width()
        if rows.lengths is not None:
            lengths = rows.lengths.tolist()
        elif width is not None:
            lengths = [width] * len(rows)
        else:  # all rows have the same number, as those of a first batch: images of one size
            lengths = [self._trial_length or store.lengths(store.first())[0]] * len(rows)
        return [(key, n, i in lacking) for i, (key, n) in enumerate(zip(rows.keys, lengths, strict=True)) if n]

    def _trial(self, batch: Mapping[str, Any]) -> Targets:
        """Run the teacher on a batch without storing anything."""
        _, layout, targets = self._run(batch, verify=True)
        self._check_padding_is_unread(batch, layout)
        self._trial_layout, self._trial_length = layout, max(targets.lengths())
        return targets

    def _check_padding_is_unread(self, batch: Mapping[str, Any], layout: Layout) -> None:
        """Compare two runs on the same tokens, one of them with two columns of padding more.

        Raises:
            TargetsError: they give different values.
        """
        pair = with_and_without_padding(batch, (self.model.facts.config or {}).get("pad_token_id") or 0)
        if pair is None:
            return
        (_, _, more), (_, _, less) = (self._run(each, verify=False) for each in pair)
        tolerance = _tolerance(self.model.load(), self.model.dtype)
        real = torch.tensor(less.lengths()) > 0
        for column in layout.columns:
            values = [of.values[column.name].flatten(1).cpu().double() for of in (more, less)]
            wide, narrow = values if column.per_token else [v[real] for v in values]
            size = narrow.norm(dim=1)
            if bool(((wide - narrow).norm(dim=1) > tolerance * (size + size.mean())).any()):
                raise TargetsError(
                    f"What this teacher makes of a row depends on its padding: {column.name} of the same tokens "
                    "changes when padding is added, as in models that mix neighbouring tokens without a mask. Run the "
                    "teacher in each step, or give it rows of one length, without padding and attention_mask."
                )

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
            if self._trial_layout is None:
                self._check_padding_is_unread(batch, layout)
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
        # In full precision whatever a step runs in, so that they are what 'precompute' would have stored. A language
        # model's logits are made only when they are asked for, so everything below belongs to the run.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            seen = live(batch, verify=verify)
            layout = Layout.of(self._stored_parts(), seen, rows.names)
            self._check_layout(batch, header, layout)
            positions, size = _positions(seen.mask), (seen.mask.shape[0], seen.mask.shape[1])
            values = {c.name: self._packed(c, seen, positions) for c in layout.columns}
        return rows, layout, Targets(values, positions, size)

    def _check_layout(self, batch: Mapping[str, Any], header: Header | None, layout: Layout) -> None:
        """Refuse a batch of which the teacher gives something else than what is stored."""
        if header is None:
            self._rows(batch, layout)  # now it is known what the padding may not change
        elif header.layout != layout:
            changed = set(header.layout.columns) ^ set(layout.columns)
            names = sorted({column.name for column in changed} or set(layout.scores))
            raise TargetsError(
                f"In this batch {', '.join(names)} of the teacher have other shapes or constants than the targets in "
                f"{self.model.store.folder}. What isn't alike in all batches can't be stored."
            )

    def _running(self, device: torch.device) -> Capture:
        """Give the capture of the teacher itself, loaded if need be."""
        if self._live is None:
            self._live = Capture(self.model.load().to(device), self._stored_parts(), "teacher")
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
            TargetsError: a number is too large for that, or there are other tokens than the mask says.
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
        if bool((stored.isinf() & ~value.isinf()).any()):
            wider = {"float16": "bfloat16", "bfloat16": "float32"}.get(self.model.dtype)
            remedy = "Run the teacher in each step."
            if wider is not None:
                remedy = f"Store {wider} (--model.targets_dtype {wider}, dtype='{wider}'), in another folder."
            raise TargetsError(
                f"{column.name} of the teacher is as large as {value[~value.isinf()].abs().amax():.3g}, and "
                f"{self.model.dtype} ends at {torch.finfo(stored.dtype).max:.5g}. {remedy}"
            )
        return stored

    # As activations

    @property
    def _layout(self) -> Layout:
        header = self.model.store.header
        layout = self._trial_layout if header is None else header.layout
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
        output: dict[str, Tensor] = {}
        modules: dict[str, Any] = {}
        for tap in taps:
            if tap.name == "attention" and tap.layer is not None:
                records[tap.layer] = self._attention(tap, targets, mask)
                continue
            (column,) = self._columns(frozenset({tap}))
            value = targets.per_token(column.name) if column.per_token else targets.per_row(column.name)
            if tap.layer is not None:
                states[tap.layer] = value
            else:
                (output if tap.name == "logits" else modules)[tap.name] = value
        if mask is None:
            mask = torch.ones(targets.size, dtype=torch.bool, device=targets.positions.device)
        depth = self.sizes.depth
        hidden, attention = Layers(states, depth, "hidden"), Layers(records, depth, "attention")
        return Activations(hidden, attention, mask, output, modules)

    def _attention(self, tap: Tap, targets: Targets, mask: Tensor | None) -> Attention:
        scores = self._layout.scores[str(tap)]
        parts = {}
        for part, (heads, size) in scores.shapes.items():
            if f"{tap}.{part}" in targets.values:
                parts[part] = targets.per_token(f"{tap}.{part}").transpose(1, 2)
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


def _rounded(rows: Rows) -> str:
    """Say where inputs may be others because the Trainer rounded them."""
    half = {k: v.dtype for k, v in rows.inputs.items() if v.dtype in (torch.float16, torch.bfloat16)}
    if not half:
        return ""
    name, dtype = next(iter(half.items()))
    return (
        f" {name} is in {dtype} here: precision='bf16-true' or '16-true' rounds inputs before they are looked up; use "
        "'bf16-mixed' or '16-mixed', which leaves them as they are, if they were stored otherwise."
    )


def _tolerance(teacher: nn.Module, stored: Dtype) -> float:
    """How far apart two runs may be that differ in rounding only, relative to the values."""
    live = [torch.finfo(p.dtype).eps for p in teacher.parameters() if p.is_floating_point()]
    if torch.get_float32_matmul_precision() != "highest":
        live.append(torch.finfo(torch.float16).eps)  # TF32 rounds as finely
    return max(1e-4, 16 * max(live, default=0.0)) + 2 * torch.finfo(torch_dtype(stored)).eps


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
