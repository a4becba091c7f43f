"""Make targets: run the teacher on rows that aren't stored, and store what is wanted of it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ildistil.capture import Activations, Capture, Tap, merged
from ildistil.errors import TargetsError
from ildistil.teachers.layout import Column, Dtype, Header, Layout, record_part, recorded, torch_dtype
from ildistil.teachers.rows import Rows, Targets, positions_of, with_and_without_padding
from ildistil.teachers.store import missing
from ildistil.teachers.stored import StoredTeacher
from ildistil.teachers.teacher import Batch

__all__ = ["Maker"]


class Maker:
    """Runs the teacher behind a stored one, and adds rows to its store.

    Args:
        stored: the stored teacher.
        taps: what is wanted; of a folder that exists, all that it stores is made, of which this must be a part.

    Raises:
        TargetsError: the folder's targets have something else.
    """

    def __init__(self, stored: StoredTeacher, taps: Iterable[Tap]) -> None:
        self.stored, self.store, self._taps = stored, stored.store, merged(taps)
        self._capture: Capture | None = None
        self._layout: Layout | None = None
        self._length: int | None = None
        if self.store.header is not None:
            stored.open(self._taps)
            self._layout = self.store.header.layout
            self._taps = self._layout.taps

    def close(self) -> None:
        """Write the rows that wait, and leave the teacher as it was."""
        self.store.flush()
        if self._capture is not None:
            self._capture.close()
            self._capture = None

    def layout_for(self, batch: Batch) -> Layout:
        """Return which tensors are stored; where nothing is stored yet, this is known from a run on a batch.

        Raises:
            TargetsError: what the teacher makes of a row depends on its padding, or can't be stored.
        """
        if self._layout is None or (not len(self.store) and self._length is None):
            _, self._layout, targets = self._run(batch, verify=True)
            self._check_padding_is_unread(batch, self._layout)
            self._length = max(targets.lengths())
        return self._layout

    def survey(self, batch: Batch) -> list[tuple[bytes, int, bool]]:
        """Return the key of each row with a token, its number of tokens, and whether it isn't stored."""
        rows = self.stored.rows(batch, self._layout)
        lacking = set(missing(self.store.find(rows.keys)))
        width = rows.token_width()
        if rows.lengths is not None:
            lengths = rows.lengths.tolist()
        elif width is not None:
            lengths = [width] * len(rows)
        else:  # all rows have the same number, as those of a first batch: images of one size
            lengths = [self._length or self.store.lengths(self.store.first())[0]] * len(rows)
        return [(key, n, i in lacking) for i, (key, n) in enumerate(zip(rows.keys, lengths, strict=True)) if n]

    def fill(self, batch: Batch) -> int:
        """Store the rows of a batch that aren't stored, and return how many they were."""
        if self.store.header is None:
            layout, stored = self.layout_for(batch), self.stored
            self.store.create(Header(stored.dtype, stored.facts, layout, stored.tokenizer))
        if not any(lacks for _, _, lacks in self.survey(batch)):
            return 0
        rows, _, targets = self._run(batch)
        return self.store.add(rows.keys, targets.lengths(), {n: value.cpu() for n, value in targets.values.items()})

    def _run(self, batch: Batch, verify: bool = False) -> tuple[Rows, Layout, Targets]:
        rows = self.stored.rows(batch, self._layout)
        device = next(v.device for v in batch.values() if isinstance(v, Tensor))
        if self._capture is None:
            self._capture = Capture(self.stored.load().to(device), self._taps, "teacher")
        # In full precision whatever a training runs in. A language model's logits are made only when they are asked
        # for, so everything below belongs to the run.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            seen = self._capture(batch, verify=verify)
            layout = Layout.of(self._taps, seen, rows.names)
            self._check_layout(batch, layout)
            positions, size = positions_of(seen.mask), (seen.mask.shape[0], seen.mask.shape[1])
            values = {c.name: self._packed(c, seen, positions) for c in layout.columns}
        return rows, layout, Targets(values, positions, size)

    def _check_layout(self, batch: Batch, layout: Layout) -> None:
        """Refuse a batch of which the teacher gives something else than what is stored."""
        if self._layout is None:
            self.stored.rows(batch, layout)  # now it is known what the padding may not change
        elif self._layout != layout:
            changed = set(self._layout.columns) ^ set(layout.columns)
            names = sorted({column.name for column in changed} or set(layout.attention))
            raise TargetsError(
                f"In this batch {', '.join(names)} of the teacher have other shapes or constants than the targets in "
                f"{self.store.folder}. What isn't alike in all batches can't be stored."
            )

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
        dtype = self.stored.dtype
        packed = value.to(torch_dtype(dtype))
        if bool((packed.isinf() & ~value.isinf()).any()):
            wider = {"float16": "bfloat16", "bfloat16": "float32"}.get(dtype)
            remedy = "Run the teacher in each step."
            if wider is not None:
                remedy = f"Store {wider} (--model.targets_dtype {wider}, dtype='{wider}'), in another folder."
            raise TargetsError(
                f"{column.name} of the teacher is as large as {value[~value.isinf()].abs().amax():.3g}, and {dtype} "
                f"ends at {torch.finfo(packed.dtype).max:.5g}. {remedy}"
            )
        return packed

    def _check_padding_is_unread(self, batch: Batch, layout: Layout) -> None:
        """Compare two runs on the same tokens, one of them with two columns of padding more.

        Raises:
            TargetsError: they give different values.
        """
        pair = with_and_without_padding(batch, (self.stored.facts.config or {}).get("pad_token_id") or 0)
        if pair is None:
            return
        (_, _, more), (_, _, less) = (self._run(each) for each in pair)
        tolerance = _tolerance(self.stored.load(), self.stored.dtype)
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


def _tolerance(teacher: nn.Module, stored: Dtype) -> float:
    """Return how far apart two runs may be that differ in rounding only, relative to the values."""
    live = [torch.finfo(p.dtype).eps for p in teacher.parameters() if p.is_floating_point()]
    if torch.get_float32_matmul_precision() != "highest":
        live.append(torch.finfo(torch.float16).eps)  # TF32 rounds as finely
    return max(1e-4, 16 * max(live, default=0.0)) + 2 * torch.finfo(torch_dtype(stored)).eps
