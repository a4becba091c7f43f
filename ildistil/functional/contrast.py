"""Contrastive losses."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ildistil.functional.checks import Shapes, check_temperature
from ildistil.functional.reduction import full_precision, unit


def info_nce(anchors: Tensor, positives: Tensor, negatives: Tensor, allowed: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of picking each anchor's positive among negatives, by cosine similarity.

    ``-log( exp(a p / T) / (exp(a p / T) + sum_k exp(a n_k / T)) )`` with all vectors divided by their lengths.

    Args:
        anchors: ``(batch, size)``.
        positives: ``(batch, size)``.
        negatives: ``(candidates, size)``.
        allowed: boolean ``(batch, candidates)``, true where a candidate is a negative of an anchor.
        temperature: ``T``, between 0.01 and 1000.

    Returns:
        ``(batch,)``, in nats; 0 for an anchor without negatives.

    Raises:
        ConfigError: the temperature is out of range.
        ObjectiveError: a tensor has another dtype or shape.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018; for distillation
    Sun et al., "Contrastive Distillation on Intermediate Representations for Language Model Compression", 2020.

    >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> info_nce(a, a, n, torch.tensor([[True, False]]), 1.0)
    tensor([0.3133])
    """
    near, far = _similarities(anchors, positives, negatives, allowed, temperature)
    return torch.cat([near.unsqueeze(1), far], dim=1).logsumexp(1) - near


def nce(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    allowed: Tensor,
    temperature: float,
    log_normalizer: Tensor,
) -> Tensor:
    """Binary noise-contrastive loss: tell each anchor's positive, and each of its negatives, for what it is.

    ``-log h(p) - sum_k log(1 - h(n_k))`` over the ``K`` negatives of an anchor ``a``, with
    ``h(x) = exp(a x / T) / (exp(a x / T) + K c)`` and all vectors divided by their lengths. With ``c = Z / N`` this is
    ``h(x) = (exp(a x / T) / Z) / (exp(a x / T) / Z + K / N)`` for a data set of ``N`` texts. Arguments and errors are
    those of :func:`info_nce`, and the scalar ``log c``, for which see :func:`log_normalizer`.

    Returns:
        ``(batch,)``, in nats; 0 for an anchor without negatives.

    Source: Tian et al., "Contrastive Representation Distillation", 2020, and its code, which keeps ``Z`` constant.

    >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> nce(a, a, n, torch.tensor([[True, False]]), 1.0, torch.tensor(0.0))
    tensor([1.0064])
    """
    near, far = _similarities(anchors, positives, negatives, allowed, temperature)
    Shapes().floats("", log_normalizer=log_normalizer)
    count = allowed.sum(1)
    noise = log_normalizer + count.clamp(min=1).to(near.dtype).log()
    values = F.logsigmoid(near - noise) + F.logsigmoid(noise.unsqueeze(1) - far).sum(1)  # 0 of what isn't allowed
    return torch.where(count > 0, -values, 0)


def log_normalizer(
    anchors: Tensor, positives: Tensor, negatives: Tensor, allowed: Tensor, temperature: float
) -> Tensor:
    """Estimate the normaliser of :func:`nce`: ``log`` of the mean of ``exp(a x / T)`` over positives and negatives.

    Arguments and errors are those of :func:`info_nce`.

    Returns:
        A scalar.

    >>> a, n = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> log_normalizer(a, a, n, torch.tensor([[True, False]]), 1.0).exp()
    tensor(1.8591)
    """
    near, far = _similarities(anchors, positives, negatives, allowed, temperature)
    count = len(near) + allowed.sum().to(near.dtype)
    return torch.cat([near, far.flatten()]).logsumexp(0) - count.log()


def _similarities(
    anchors: Tensor, positives: Tensor, negatives: Tensor, allowed: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return ``a p / T``, ``(batch,)``, and ``a n_k / T``, ``(batch, candidates)``, far below 0 where not allowed."""
    shapes = Shapes().floats("batch size", anchors=anchors, positives=positives)
    shapes.floats("candidates size", negatives=negatives).masks("batch candidates", allowed=allowed)
    check_temperature(temperature)
    with full_precision(anchors, positives, negatives) as (a, p, n):
        a, p, n = (unit(x) for x in (a, p, n))
        far = torch.where(allowed, a @ n.T / temperature, torch.finfo(a.dtype).min / 4)
        return (a * p).sum(-1) / temperature, far
