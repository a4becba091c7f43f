"""The rows of a batch: what names them, whatever the padding and the order, and where their tokens stand."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ildistil.capture.inputs import OURS, TARGETS, token_mask
from ildistil.errors import TargetsError
from ildistil.functional.reduction import widened

__all__ = ["KEY_BYTES", "Rows", "Targets", "all_real", "positions_of", "with_and_without_padding"]

KEY_BYTES = 16
# What says where the tokens are or how the model answers, not what it reads.
_NOT_CONTENT = {*OURS, "attention_mask", "src_key_padding_mask", "labels", "use_cache", "return_dict"}


@dataclass(frozen=True)
class Rows:
    """The rows of a batch as the teacher reads them, on the CPU.

    ``inputs`` are the tensors that its ``forward`` gets; ``mask`` is boolean ``(batch, tokens)``, ``None`` where the
    batch has no padding.
    """

    inputs: Mapping[str, Tensor]
    mask: Tensor | None
    numbers: Tensor | None  # the batch's row_id, for messages

    @classmethod
    def of(cls, batch: Mapping[str, Any], read: Collection[str]) -> "Rows":
        """Take the rows of a batch.

        Args:
            batch: the batch, on any device.
            read: the names that the teacher's ``forward`` knows; none where it takes anything.

        Raises:
            TargetsError: an input is no tensor of the batch's rows.
        """
        mask = token_mask(batch)
        given = {k: v for k, v in batch.items() if v is not None and k not in _NOT_CONTENT and (not read or k in read)}
        sizes = {len(v) if isinstance(v, Tensor) and v.ndim else None for v in given.values()}
        if not given or None in sizes or len(sizes | ({len(mask)} if mask is not None else set())) != 1:
            shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in given.items()}
            raise TargetsError(
                "Targets are stored row by row, so what the teacher reads must be tensors whose first dimension is the "
                f"batch; got {shapes}. Leave other inputs out of the batch, or run the teacher in each step."
            )
        numbers = batch.get("row_id")
        return cls(
            {name: given[name].detach().cpu() for name in sorted(given)},
            None if mask is None else mask.cpu(),
            numbers if isinstance(numbers, Tensor) else None,
        )

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return tuple(self.inputs)

    @cached_property
    def lengths(self) -> Tensor | None:
        """The number of real tokens of each row, ``None`` where the batch doesn't say."""
        return None if self.mask is None else self.mask.sum(1)

    def token_width(self) -> int | None:
        """Return the number of token ids of a row, ``None`` where the first input is none."""
        first = next(iter(self.inputs.values()))
        return None if first.ndim != 2 or first.is_floating_point() else first.shape[1]

    @cached_property
    def keys(self) -> list[bytes]:
        """What names each row: a hash of the names, shapes and bytes of its inputs, of its real tokens only."""
        columns = [self._bytes(name, value) for name, value in self.inputs.items()]
        return [
            hashlib.blake2b(b"".join(parts), digest_size=KEY_BYTES).digest() for parts in zip(*columns, strict=True)
        ]

    def _bytes(self, name: str, value: Tensor) -> list[bytes]:
        """The shape and the bytes of an input, row by row; integers of any width count as equal."""
        if not value.is_floating_point():
            value = value.long()
        array = value.contiguous().view(torch.uint8).numpy().reshape(len(value), -1)
        if self.mask is None or value.ndim < 2 or value.shape[1] != self.mask.shape[1]:
            rows = [(tuple(value.shape[1:]), row.tobytes()) for row in array]
        else:
            tokens = array.reshape(*value.shape[:2], -1)
            real = zip(tokens, self.mask.numpy(), strict=True)
            rows = [((int(mask.sum()), *value.shape[2:]), row[mask].tobytes()) for row, mask in real]
        return [f"{name} {value.dtype} {shape}:".encode() + row for shape, row in rows]

    def check_labels(self, labels: Any) -> None:
        """Refuse labels of padding: nothing is stored of it, so there is nothing to learn from.

        Raises:
            TargetsError: a label of padding counts.
        """
        if self.mask is None or not isinstance(labels, Tensor) or labels.shape != self.mask.shape:
            return
        if bool(((labels.cpu() != -100) & ~self.mask).any()):
            raise TargetsError(
                "Some labels of padding aren't -100, so that padding would be learned from, of which nothing is "
                "stored. Let the collate function set them to -100, as transformers' do."
            )

    def rounded(self) -> str:
        """Return a warning where inputs may be others than those stored because the Trainer rounded them."""
        half = {k: v.dtype for k, v in self.inputs.items() if v.dtype in (torch.float16, torch.bfloat16)}
        if not half:
            return ""
        name, dtype = next(iter(half.items()))
        return (
            f" {name} is in {dtype} here: precision='bf16-true' or '16-true' rounds inputs before they are looked up; "
            "use 'bf16-mixed' or '16-mixed', which leaves them as they are, if they were stored otherwise."
        )

    def check_padding(self, *, offset_matters: bool) -> None:
        """Refuse padding that the teacher's values would depend on.

        Args:
            offset_matters: whether values depend on how much padding stands before a row.
        """
        if self.mask is None:
            return
        steps = self.mask.int().diff(dim=1)
        starts = (steps == 1).sum(1) + self.mask[:, 0].int()
        if bool((starts > 1).any()):
            raise TargetsError(
                "The attention mask hides tokens between real ones. What the teacher makes of such a row depends on "
                "the places of the gaps, and can't be stored. Leave these tokens out of the rows."
            )
        if offset_matters and bool((~self.mask[:, 0] & self.mask.any(1)).any()):
            raise TargetsError(
                "The batch is padded on the left, and what the teacher makes of a row depends on its first position, "
                "so stored values would be those of other positions. Pad on the right (tokenizer.padding_side = "
                "'right'), or run the teacher in each step."
            )


def positions_of(mask: Tensor) -> Tensor:
    """Return where the real tokens of a batch are, counted row by row.

    >>> positions_of(torch.tensor([[True, False], [True, True]]))
    tensor([0, 2, 3])
    """
    return mask.flatten().nonzero()[:, 0]


def all_real(lengths: Tensor) -> Tensor:
    """Return the mask of a batch that has none.

    Raises:
        TargetsError: its rows have different lengths.
    """
    if len(set(lengths.tolist())) != 1:
        raise TargetsError(
            f"The batch has no attention_mask, and its rows have {lengths.tolist()} tokens. Give it the mask."
        )
    return torch.ones(len(lengths), int(lengths[0]), dtype=torch.bool)


def with_and_without_padding(batch: Mapping[str, Any], padding: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return a batch with its last two columns made padding, and without them.

    Tokens are taken away rather than padding added, since a model may know no more positions.

    Args:
        batch: the batch.
        padding: the id of a padding token.

    Returns:
        The two batches; ``None`` where it has no mask, no token ids, or no columns to spare.
    """
    mask = token_mask(batch)
    if mask is None or mask.shape[1] < 4:
        return None
    tokens = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.shape[:2] == mask.shape and k not in OURS}
    ids = {k for k, v in tokens.items() if v.ndim == 2 and not v.is_floating_point() and k not in _NOT_CONTENT}
    if not ids:
        return None
    more, less = dict(batch), dict(batch)
    for given in (more, less):
        given.pop("labels", None)
        given.pop(TARGETS, None)
    for name, value in tokens.items():
        if name == "labels":
            continue
        less[name], more[name] = value[:, :-2], value.clone()
        fill = padding if name == "input_ids" else int(name == "src_key_padding_mask")
        more[name][:, -2:] = fill
    return more, less


class Targets:
    """What is read of the store for one batch: values of its rows, and where they belong.

    ``values`` holds, by column, the real tokens of all rows one after the other, or one value for each row;
    ``positions`` are the places of these tokens in ``batch x tokens``, counted row by row; ``size`` is ``(batch,
    tokens)``. A plain class, which is moved to a device with the batch and otherwise left alone.
    """

    def __init__(self, values: Mapping[str, Tensor], positions: Tensor, size: tuple[int, int]) -> None:
        self.values, self.positions, self.size = dict(values), positions, size

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """Move everything to a device."""
        values = {name: value.to(device, non_blocking=non_blocking) for name, value in self.values.items()}
        return Targets(values, self.positions.to(device, non_blocking=non_blocking), self.size)

    def lengths(self) -> list[int]:
        """Return the number of tokens of each row."""
        rows, tokens = self.size
        numbers: list[int] = torch.bincount(self.positions.cpu() // max(tokens, 1), minlength=rows).tolist()
        return numbers

    def per_token(self, name: str) -> Tensor:
        """Return the values of a column per token, ``(batch, tokens, ...)``, with zeros for padding."""
        values = widened(self.values[name])
        rows, tokens = self.size
        whole = values.new_zeros(rows * tokens, *values.shape[1:])
        # Places, not a mask: a mask's number of tokens would have to be waited for on a GPU.
        return whole.index_copy_(0, self.positions, values).view(rows, tokens, *values.shape[1:])

    def per_row(self, name: str) -> Tensor:
        """Return the values of a column that has one for each row."""
        return widened(self.values[name])
