"""Contrastive losses."""

import torch
from torch import Tensor

from ildistil.functional.reduction import full_precision, unit

__all__ = ["info_nce"]


def info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of picking each anchor's positive among negatives, by cosine similarity.

    ``-log( exp(a p / T) / (exp(a p / T) + sum_k exp(a n_k / T)) )`` with all vectors divided by their lengths.

    Args:
        anchors: ``(batch, size)``.
        positives: ``(batch, size)``.
        negatives: ``(candidates, size)``.
        allowed: boolean ``(batch, candidates)``, true where a candidate is a negative of an anchor.
        temperature: ``T > 0``.

    Returns:
        ``(batch,)``, in nats; 0 for an anchor without negatives.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; Tian et al.,
    "Contrastive Representation Distillation", 2020.

    >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> info_nce(a, a, n, torch.tensor([[True, False]]), 1.0)
    tensor([0.3133])
    """
    with full_precision(anchors, positives, negatives) as (a, p, n):
        a, p, n = (unit(x) for x in (a, p, n))
        near = (a * p).sum(-1, keepdim=True) / temperature
        far = torch.where(allowed, a @ n.T / temperature, torch.finfo(a.dtype).min / 4)
        return torch.cat([near, far], dim=1).logsumexp(1) - near.squeeze(1)
