"""Where the real tokens of a batch lie, and how many pairs of them count."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ildistil.attention import Masks, Scores, real_tokens


def spans(mask: Tensor | None, vectors: Tensor) -> tuple[list[slice], Tensor | None]:
    """Return the span of every example's real tokens, and the mask if any is left to do within the spans."""
    tokens = vectors.shape[2]
    if mask is None or mask.device.type != "cpu":  # on a GPU the host would have to wait for the answer
        return [slice(0, tokens)] * len(vectors), mask
    counts = mask.sum(1).tolist()
    first, after = mask.int().argmax(1).tolist(), (tokens - mask.flip(1).int().argmax(1)).tolist()
    spans = [slice(i, j if count else i) for i, j, count in zip(first, after, counts, strict=True)]
    whole = all(span.stop - span.start == count for span, count in zip(spans, counts, strict=True))
    return spans, None if whole else mask


def pairs(parts: Scores, masks: Masks) -> Tensor:
    """Count the pairs of a real query and a real key that it may attend to: ``(batch,)``."""
    real, device = real_tokens(masks.query_mask, parts.query), parts.query.device
    queries, keys = parts.query.shape[2], parts.key.shape[2]
    key_mask = torch.ones(1, keys, dtype=torch.bool, device=device) if masks.key_mask is None else masks.key_mask
    before = F.pad(key_mask.cumsum(1), (1, 0))  # how many real keys stand before each position
    position = torch.arange(queries, device=device)
    reach = keys + queries if masks.window is None else masks.window
    start = (position - reach + 1).clamp(0, keys)
    stop = (position + (1 if masks.causal else reach)).clamp(0, keys)
    return ((before[:, stop] - before[:, start]) * real).sum(1)
