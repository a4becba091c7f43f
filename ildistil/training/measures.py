"""What is measured on one set, over all rows, whatever the batches and processes they came in."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from ildistil.capture import Activations
from ildistil.capture.head import is_token_labels, labels_of_rows
from ildistil.engine import Terms
from ildistil.functional.reduction import widened
from ildistil.kernels import chunked
from ildistil.metrics import IGNORED

__all__ = ["Predictions", "TermMeans"]


class Predictions(nn.Module):
    """The student's own mean loss, the metrics, and how often each class is predicted.

    Args:
        metrics: of the task; ``None`` where nothing is measured but the loss.
        classes: how many there are; 0 where labels are no classes.
    """

    def __init__(self, metrics: MetricCollection | None, classes: int) -> None:
        super().__init__()
        self.loss = _MeanLoss()
        self.metrics = metrics
        self.seen = _Seen(classes)
        self._has_loss = False

    def update(self, output: Any, predictions: Tensor, labels: Tensor, weight: Tensor) -> None:
        """Take in a batch; ``weight`` is how many things its loss is the mean of."""
        logits, loss = output.logits.detach(), getattr(output, "loss", None)
        if loss is not None:
            self._has_loss = True
            self.loss.update(loss.detach(), weight)
        if self.metrics is not None:
            self.metrics.update(predictions, labels, logits=logits)
        self.seen.update(predictions, labels, logits)

    def logged(self) -> Iterator[tuple[str, Metric]]:
        """Return what is logged of the set, by name."""
        if self._has_loss:
            yield "loss", self.loss
        if self.metrics is not None:
            yield from self.metrics.items(keep_base=True)


class TermMeans(nn.Module):
    """The means of the terms, their weighted sum as the loss, and of labelled tokens perplexity and accuracy.

    Args:
        weights: of the terms, by their names.
    """

    def __init__(self, weights: Mapping[str, float | Tensor]) -> None:
        super().__init__()
        self.loss = _WeightedSum([float(weight) for weight in weights.values()])
        self.terms = nn.ModuleDict({name: _MeanLoss() for name in weights})
        self.tokens = nn.ModuleDict({"perplexity": _Perplexity(), "accuracy": _Share()})

    def update(self, terms: Terms, student: Activations, labels: Tensor | None) -> None:
        """Take in a batch.

        Args:
            terms: what was measured of it.
            student: what the student gave.
            labels: the batch's, if it has any.
        """
        counts = terms.count_values()
        self.loss.update(torch.stack([v.to(counts.dtype) for v in terms.values.values()]), counts)
        means: Any = self.terms
        for (name, value), count in zip(terms.values.items(), counts, strict=True):
            means[name].update(value, count)
        if (found := _of_tokens(student, labels)) is not None:
            entropy, correct, count = found
            means = self.tokens
            means["perplexity"].update(entropy, count)
            means["accuracy"].update(correct, count)

    def logged(self) -> Iterator[tuple[str, Metric]]:
        """Return what is logged of the set, by name."""
        yield "loss", self.loss
        for kept in (self.terms, self.tokens):
            yield from ((name, mean) for name, mean in kept.items() if isinstance(mean, Metric) and mean.update_called)


class _MeanLoss(Metric):
    """The mean over all that counts; NaN where nothing does. torchmetrics' own drops NaN, or else the weights."""

    higher_is_better = False
    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, size: tuple[int, ...] = ()) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(name, torch.zeros(size), dist_reduce_fx="sum")

    def update(self, mean: Tensor, weight: Tensor) -> None:
        """Take in the mean of a batch, which is nothing where its weight is 0."""
        self.total += torch.where(weight > 0, mean.float(), 0) * weight
        self.weight += weight

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        return self.total / self.weight


class _WeightedSum(_MeanLoss):
    """The sum of several means, each with a factor."""

    def __init__(self, factors: Sequence[float]) -> None:
        super().__init__((len(factors),))
        self.factors = factors

    def compute(self) -> Tensor:
        """Return the sum, a scalar."""
        return (super().compute() * self.total.new_tensor(self.factors)).sum()


class _Perplexity(_MeanLoss):
    """The exponential of the mean cross-entropy of tokens."""

    def compute(self) -> Tensor:
        """Return the perplexity, a scalar."""
        return super().compute().exp()


class _Share(_MeanLoss):
    """The share of tokens that were predicted."""

    higher_is_better = True


def _of_tokens(student: Activations, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return mean cross-entropy, share of correct ones and number of the labelled tokens; ``None`` without logits."""
    lazy, known = student.lazy_logits, student.next_token
    if not is_token_labels(labels) or known is None or (lazy is None and student.output is None):
        return None
    targets = labels_of_rows(labels, known)
    chosen = targets != IGNORED
    targets, count = targets[chosen], chosen.sum()
    if lazy is None:
        logits = widened(student.logits[chosen])
        sums = F.cross_entropy(logits, targets, reduction="sum"), (logits.argmax(-1) == targets).sum()
        return sums[0] / count, sums[1] / count, count

    def entropies(made: Tensor, rows: slice) -> Tensor:
        return F.cross_entropy(widened(made), targets[rows], reduction="none")

    def correct(made: Tensor, rows: slice) -> Tensor:
        return (made.argmax(-1) == targets[rows]).float()

    means = [chunked.summed(f, lazy.made, lazy.layer, lazy.states[chosen]) / count for f in (entropies, correct)]
    return means[0], means[1], count


class _Seen(Metric):
    """How many rows were predicted as, and belong to, each class; and how many have logits that are NaN."""

    full_state_update = False
    predicted: Tensor
    true: Tensor
    spoilt: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name, size in (("predicted", classes), ("true", classes), ("spoilt", 1)):
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, logits: Tensor) -> None:
        """Count the rows of a batch."""
        self.spoilt += logits.isnan().flatten(1).any(1).sum()
        numbers = torch.arange(len(self.predicted), device=labels.device)
        if len(numbers):
            self.predicted += ((predictions[:, None] == numbers) & (labels != IGNORED)[:, None]).sum(0)
            self.true += (labels[:, None] == numbers).sum(0)

    def compute(self) -> tuple[list[int], list[int], int]:
        """Return the counts of all processes."""
        return self.predicted.tolist(), self.true.tolist(), int(self.spoilt)
