"""What attention scores are made of, which of them count, and the scores as whole maps."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Masks", "Scores", "allowed_map", "pairs", "real_queries", "score_map", "seen", "spans", "zeroed"]


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
        query, key = widened(self.query), widened(self.key)
        return self._replace(query=query, key=key, bias=None if self.bias is None else widened(self.bias))

    def to(self, dtype: torch.dtype) -> "Scores":
        """Convert all tensors."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return self._replace(query=self.query.to(dtype), key=self.key.to(dtype), bias=bias)

    def detach(self) -> "Scores":
        """Cut the gradients off."""
        bias = None if self.bias is None else self.bias.detach()
        return self._replace(query=self.query.detach(), key=self.key.detach(), bias=bias)


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


def widened(x: Tensor) -> Tensor:
    """Widen half precision to float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def zeroed(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Put zeros for padding, which may hold anything: 0 times NaN is NaN."""
    return vectors if mask is None else torch.where(mask[:, None, :, None], vectors, 0)


def score_map(parts: Scores, masks: Masks) -> Tensor:
    """Give all scores, ``(batch, heads, queries, keys)``, at least in float32; padding gives some finite number."""
    query, key, scale, bias, softcap = parts.full_precision()
    with torch.autocast(query.device.type, enabled=False):
        key = zeroed(key, masks.key_mask).repeat_interleave(parts.groups, dim=1)
        scores = zeroed(query, masks.query_mask) * scale @ key.mT
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        return scores if bias is None else scores + bias


def seen(masks: Masks, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
    """Tell which keys at these positions the queries at these look at, whether real or not: boolean, two dimensions.

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


def spans(mask: Tensor | None, vectors: Tensor) -> tuple[list[slice], Tensor | None]:
    """Give the span of every example's real tokens, and the mask if any is left to do within the spans."""
    tokens = vectors.shape[2]
    if mask is None or mask.device.type != "cpu":  # on a GPU the host would have to wait for the answer
        return [slice(0, tokens)] * len(vectors), mask
    counts = mask.sum(1).tolist()
    first, after = mask.int().argmax(1).tolist(), (tokens - mask.flip(1).int().argmax(1)).tolist()
    spans = [slice(i, j if count else i) for i, j, count in zip(first, after, counts, strict=True)]
    whole = all(span.stop - span.start == count for span, count in zip(spans, counts, strict=True))
    return spans, None if whole else mask


def allowed_map(parts: Scores, masks: Masks) -> Tensor:
    """Tell which keys a query may attend to: boolean, ``(batch, 1, queries, keys)``."""
    batch, (queries, keys) = len(parts.query), (parts.query.shape[2], parts.key.shape[2])
    allowed = seen(masks, slice(0, queries), slice(0, keys), parts.query.device)
    if allowed is None:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=parts.query.device)
    allowed = allowed.expand(batch, 1, queries, keys)
    return allowed if masks.key_mask is None else allowed & masks.key_mask[:, None, None, :]


def real_queries(parts: Scores, masks: Masks) -> Tensor:
    """Tell which queries are real tokens: boolean, ``(batch, queries)``."""
    if masks.query_mask is not None:
        return masks.query_mask
    return torch.ones(len(parts.query), parts.query.shape[2], dtype=torch.bool, device=parts.query.device)


def pairs(parts: Scores, masks: Masks) -> Tensor:
    """Count the pairs of a real query and a real key that it may attend to: ``(batch,)``."""
    real, device = real_queries(parts, masks), parts.query.device
    queries, keys = parts.query.shape[2], parts.key.shape[2]
    key_mask = torch.ones(1, keys, dtype=torch.bool, device=device) if masks.key_mask is None else masks.key_mask
    before = F.pad(key_mask.cumsum(1), (1, 0))  # how many real keys stand before each position
    position = torch.arange(queries, device=device)
    reach = keys + queries if masks.window is None else masks.window
    start = (position - reach + 1).clamp(0, keys)
    stop = (position + (1 if masks.causal else reach)).clamp(0, keys)
    return ((before[:, stop] - before[:, start]) * real).sum(1)
