"""What an attention is made of: its scores, which of them count, and its values; and the scores as whole maps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ildistil.errors import CaptureError
from ildistil.functional.reduction import for_each_head, widened

__all__ = ["Attention", "Masks", "Scores", "allowed_map", "real_tokens", "score_map", "visible", "zeroed"]


class Scores(NamedTuple):
    """What the scores ``softcap * tanh(scale q k^T / softcap) + bias`` of an attention are made of.

    Attributes:
        query: ``(batch, heads, queries, size)``.
        key: ``(batch, key heads, keys, size)``; fewer heads than the queries' are shared by consecutive ones.
        scale: factor of the product.
        bias: added after the softcap; broadcastable to ``(batch, heads, queries, keys)``.
        softcap: bound of the product; ``None`` for none.
    """

    query: Tensor
    key: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    softcap: float | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[1]

    @property
    def groups(self) -> int:
        """Number of query heads to a key head."""
        return self.query.shape[1] // self.key.shape[1]

    def full_precision(self) -> "Scores":
        """Widen half-precision tensors to float32."""
        return self._each(widened)

    def to(self, dtype: torch.dtype) -> "Scores":
        """Convert all tensors."""
        return self._each(lambda x: x.to(dtype))

    def detach(self) -> "Scores":
        """Cut the gradients off."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Scores":
        bias = None if self.bias is None else change(self.bias)
        return self._replace(query=change(self.query), key=change(self.key), bias=bias)


class Masks(NamedTuple):
    """Which scores count.

    Attributes:
        query_mask: boolean ``(batch, queries)``, true where the query is a real token; ``None`` if all are.
        key_mask: boolean ``(batch, keys)``, true where the key is a real token; ``None`` if all are.
        causal: queries attend to no later position.
        window: queries attend to fewer than this many positions away.
    """

    query_mask: Tensor | None = None
    key_mask: Tensor | None = None
    causal: bool = False
    window: int | None = None

    def both(self, other: "Masks") -> "Masks":
        """Return what both allow; padding is the same for two models that read the same tokens."""
        windows = [masks.window for masks in (self, other) if masks.window is not None]
        return self._replace(causal=self.causal or other.causal, window=min(windows, default=None))


def zeroed(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Return vectors with zeros for padding, which may hold anything: 0 times NaN is NaN."""
    return vectors if mask is None else torch.where(mask[:, None, :, None], vectors, 0)


def score_map(parts: Scores, masks: Masks) -> Tensor:
    """Return all scores, ``(batch, heads, queries, keys)``, at least in float32; those of padding are finite."""
    query, key, scale, bias, softcap = parts.full_precision()
    with torch.autocast(query.device.type, enabled=False):
        key = for_each_head(zeroed(key, masks.key_mask), parts.heads)
        scores = zeroed(query, masks.query_mask) * scale @ key.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores if bias is None else scores + bias


def visible(masks: Masks, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
    """Return which keys at these positions the queries at these look at, real or not: boolean ``(queries, keys)``.

    ``None`` if causality and window leave out none.
    """
    if not masks.causal and masks.window is None:
        return None
    i, j = (torch.arange(x.start, x.stop, device=device) for x in (rows, columns))
    distance = i[:, None] - j
    if masks.window is None:
        return distance >= 0
    near = distance.abs() < masks.window
    return near & (distance >= 0) if masks.causal else near


def allowed_map(query: Tensor, key: Tensor, masks: Masks) -> Tensor:
    """Return which keys a query may attend to: boolean, ``(batch, 1, queries, keys)``."""
    queries, keys = query.shape[2], key.shape[2]
    allowed = visible(masks, slice(0, queries), slice(0, keys), query.device)
    if allowed is None:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    allowed = allowed.expand(len(query), 1, queries, keys)
    return allowed if masks.key_mask is None else allowed & masks.key_mask[:, None, None, :]


def real_tokens(mask: Tensor | None, vectors: Tensor) -> Tensor:
    """Return which tokens of the vectors are real, given the mask if there is any: boolean, ``(batch, tokens)``."""
    if mask is not None:
        return mask
    return torch.ones(len(vectors), vectors.shape[2], dtype=torch.bool, device=vectors.device)


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, in one form whatever the model and its implementation.

    Attributes:
        raw: what the scores are made of, also where the model makes them otherwise; see :attr:`scores`.
        masks: which of them count.
        value: ``(batch, value heads, keys, size)``; fewer heads than the queries' are shared by consecutive ones.
        unknown: why the model's scores are not known, though its queries, keys and values are; ``None`` if they are.
    """

    raw: Scores
    masks: Masks
    value: Tensor
    unknown: str | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.raw.heads

    @property
    def query(self) -> Tensor:
        """Queries, ``(batch, heads, queries, size)``."""
        return self.raw.query

    @property
    def key(self) -> Tensor:
        """Keys, ``(batch, key heads, keys, size)``."""
        return self.raw.key

    @property
    def scores(self) -> Scores:
        """What the scores are made of.

        Raises:
            CaptureError: the model makes its scores otherwise.
        """
        if self.unknown is not None:
            raise CaptureError(
                f"The scores of this attention aren't known: {self.unknown}. Use RelationKL, which compares queries, "
                "keys and values, or a hidden-state objective."
            )
        return self.raw

    def vectors(self, part: str) -> Tensor:
        """Return the vectors ``"q"``, ``"k"`` or ``"v"`` of every head, padding included.

        They are of the shape ``(batch, heads, tokens, size)``: what heads share (grouped-query attention) is repeated.
        """
        return for_each_head({"q": self.query, "k": self.key, "v": self.value}[part], self.heads)

    def score_map(self) -> Tensor:
        """Return the scores before softmax and masks, ``(batch, heads, queries, keys)``, at least in float32."""
        return score_map(self.scores, self.masks)

    def allowed_map(self) -> Tensor:
        """Return which keys a query may attend to: boolean, ``(batch, 1, queries, keys)``."""
        return allowed_map(self.query, self.key, self.masks)

    def real(self, part: str = "q") -> Tensor:
        """Return which tokens of queries, keys or values are real: boolean, ``(batch, tokens)``."""
        mask = self.masks.query_mask if part == "q" else self.masks.key_mask
        return real_tokens(mask, self.query if part == "q" else self.key)
