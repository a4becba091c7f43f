"""Losses on logits."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ildistil.functional.checks import Shapes, check_choice, check_count, check_number, check_temperature
from ildistil.functional.correlation import Total, pearson_distance, unchanged
from ildistil.functional.reduction import full_precision, kl

Divergence = Literal["forward", "reverse", "jensen-shannon"]


def logits_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    top_k: int | None = None,
) -> Tensor:
    """Divergence of the class distributions, times the squared temperature.

    With ``p = softmax(z_T / T)`` and ``q = softmax(z_S / T)``: forward ``T^2 KL(p || q)``, reverse ``T^2 KL(q || p)``,
    or the generalised Jensen-Shannon divergence ``T^2 (beta KL(p || m) + (1 - beta) KL(q || m))`` with
    ``m = beta p + (1 - beta) q``. The factor keeps the size of the gradient independent of ``T``.

    Args:
        student: logits ``(batch, classes)``.
        teacher: logits ``(batch, classes)``.
        temperature: softening ``T``, between 0.01 and 1000.
        divergence: ``"forward"``, ``"reverse"`` or ``"jensen-shannon"``.
        beta: weight of the teacher in the mixture, ``0 < beta < 1``; for Jensen-Shannon only.
        top_k: keep the teacher's ``k`` most likely classes apart and count all others as one class.

    Returns:
        ``(batch,)``, in nats.

    Raises:
        ConfigError: the temperature, ``beta`` or ``top_k`` is out of range, or the divergence unknown.
        ObjectiveError: a tensor has another dtype or shape.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015; reverse and Jensen-Shannon:
    Agarwal et al., "On-Policy Distillation of Language Models", 2024.

    >>> logits_kl(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]).log().clamp(min=-1e9))
    tensor([0.6931])
    """
    Shapes().floats("batch classes", student=student, teacher=teacher)
    check_divergence(temperature, divergence, beta, top_k)
    with full_precision(student, teacher) as (s, t):
        log_s, log_t = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
        if top_k is not None and top_k < t.shape[-1]:
            kept = t.topk(top_k, -1).indices
            log_s, log_t = (_rest_as_one(x, kept) for x in (log_s, log_t))
        if divergence == "forward":
            value = kl(log_s, log_t)
        elif divergence == "reverse":
            value = kl(log_t, log_s)
        else:
            mixture = torch.logaddexp(log_t + math.log(beta), log_s + math.log(1 - beta))
            value = beta * kl(mixture, log_t) + (1 - beta) * kl(mixture, log_s)
        return temperature**2 * value


def check_divergence(
    temperature: float, divergence: Divergence, beta: float, top_k: int | None, whose: str = ""
) -> None:
    """Check the settings of :func:`logits_kl`, of which messages say ``whose`` they are."""
    check_temperature(temperature, f"{whose}temperature")
    check_choice(f"{whose}divergence", divergence, get_args(Divergence))
    limits = "between 0 and 1, both left out (its limits are the divergences 'forward' and 'reverse')"
    check_number(f"{whose}beta", beta, limits, lambda share: 0 < share < 1)
    if top_k is not None:
        check_count(f"{whose}top_k", top_k)


def _rest_as_one(log_p: Tensor, kept: Tensor) -> Tensor:
    """Log-probabilities of the kept classes, and of all others together."""
    rest = log_p.scatter(-1, kept, torch.finfo(log_p.dtype).min / 4).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, kept), rest], -1)


def logits_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the logits.

    ``1/C ||z_S - z_T||^2``

    Args:
        student: logits ``(batch, classes)``.
        teacher: logits ``(batch, classes)``.

    Returns:
        ``(batch,)``.

    Raises:
        ObjectiveError: a tensor has another dtype or shape.

    Source: Ba, Caruana, "Do Deep Nets Really Need to be Deep?", 2014.

    >>> logits_mse(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
    tensor([5.])
    """
    Shapes().floats("batch classes", student=student, teacher=teacher)
    with full_precision(student, teacher) as (s, t):
        return (s - t).square().mean(-1)


def logits_dist(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Pearson distance of each example's class probabilities ("inter-class").

    ``T^2 (1 - corr_c(softmax(z_S / T)_c, softmax(z_T / T)_c))``; not defined where the teacher's probabilities are all
    equal.

    Args:
        student: logits ``(batch, classes)``.
        teacher: logits ``(batch, classes)``.
        temperature: softening ``T``, between 0.01 and 1000.

    Returns:
        The distances, ``(batch,)``, between 0 and ``2 T^2`` (0 where not defined), and where they are defined, boolean
        ``(batch,)``. Of two classes the correlation is always 1 or -1, and its gradient zero.

    Raises:
        ConfigError: the temperature is out of range.
        ObjectiveError: a tensor has another dtype or shape.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022.

    >>> distance, defined = logits_dist(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]]))
    >>> distance.round(decimals=4), defined
    (tensor([1.8671]), tensor([True]))
    """
    Shapes().floats("batch classes", student=student, teacher=teacher)
    check_temperature(temperature)
    with full_precision(student, teacher) as (s, t):
        p, q = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
        distance, defined = pearson_distance(p, q, torch.ones_like(p, dtype=torch.bool), -1)
        return temperature**2 * distance, defined


def logits_dist_over_batch(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0, total: Total = unchanged
) -> Tensor:
    """Pearson distance of each class's probabilities over the batch ("intra-class"), mean over the classes.

    ``T^2 1/C sum_c (1 - corr_b(softmax(z_S,b / T)_c, softmax(z_T,b / T)_c))`` over the classes whose probability the
    teacher varies. Arguments and errors are those of :func:`logits_dist`, a boolean mask ``(batch,)``, true where an
    example counts, and ``total``, which extends a sum over the batch over further processes.

    Returns:
        A scalar, between 0 and ``2 T^2``.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022.

    >>> z = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]])
    >>> logits_dist_over_batch(-z, z, torch.tensor([True, True, True])).round(decimals=4)
    tensor(2.)
    """
    Shapes().floats("batch classes", student=student, teacher=teacher).masks("batch", mask=mask)
    check_temperature(temperature)
    with full_precision(student, teacher) as (s, t):
        p, q = (torch.where(mask[:, None], x / temperature, 0).softmax(-1) for x in (s, t))
        distance, defined = pearson_distance(p, q, mask[:, None], 0, total)
        return temperature**2 * distance.sum() / defined.sum().clamp(min=1)
