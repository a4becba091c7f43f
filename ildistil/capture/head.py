"""Logits of a language model, before they are made: a vocabulary times all tokens is large."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ildistil.functional.reduction import widened


@dataclass(frozen=True)
class LazyLogits:
    """What a language model's logits are made of.

    Attributes:
        states: what its output layer is given, ``(batch, tokens, width)``.
        layer: the output layer, which gives ``(..., vocabulary)``.
        labels: the batch's labels, ``(batch, tokens)``, -100 where there is none.
        next_token: whether the logits at a position predict the token after it; ``None`` if that isn't known.
        autocast: precision that the model ran in under autocast; ``None`` without.
    """

    states: Tensor
    layer: nn.Module
    labels: Tensor | None
    next_token: bool | None
    autocast: torch.dtype | None

    def made(self, states: Tensor) -> Tensor:
        """Make the logits of some states, ``(..., vocabulary)``, in the precision that the model ran in."""
        with torch.autocast(states.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            logits: Tensor = self.layer(states)
            return logits

    def all(self) -> Tensor:
        """Make the logits of all tokens, ``(batch, tokens, vocabulary)``."""
        return self.made(self.states)

    def at(self, chosen: Tensor) -> Tensor:
        """Make the logits of chosen tokens, ``(rows, vocabulary)``; boolean, ``(batch, tokens)``."""
        return self.made(self.states[chosen])

    def labelled(self) -> tuple[Tensor, Tensor]:
        """Return the states of the tokens that have a label to predict, ``(rows, width)``, and these labels."""
        assert self.labels is not None, "wanted only of batches with labels"
        assert self.next_token is not None, "wanted only where the loss is known to be that of these labels"
        labels = labels_of_rows(self.labels, self.next_token)
        chosen = labels != -100
        return self.states[chosen], labels[chosen]

    def loss(self) -> Tensor:
        """Return the mean cross-entropy of the labels."""
        states, labels = self.labelled()
        return F.cross_entropy(widened(self.made(states)), labels)


def labels_of_rows(labels: Tensor, next_token: bool | None) -> Tensor:
    """Return the label that each row of logits predicts, -100 where it predicts none."""
    return F.pad(labels[:, 1:], (0, 1), value=-100) if next_token and labels.ndim == 2 else labels


def is_token_labels(labels: Any) -> TypeGuard[Tensor]:
    """Return whether labels are those of a language model: a class for every token."""
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()


def output_layer(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes logits over the vocabulary; ``None`` where the model has none, or doesn't say."""
    get = getattr(model, "get_output_embeddings", None)
    layer = None if get is None else get()
    return layer if isinstance(layer, nn.Module) else None


def agrees(found: LazyLogits, output: Any, before: Mapping[str, bool]) -> dict[str, bool]:
    """Return whether ``"logits"`` and ``"loss"`` may be made later, as far as this run or one before it tells.

    They may if the output layer really comes last (no softcap, no scale after it), and cross-entropy is the loss. What
    once did not agree never does.
    """
    logits, loss = getattr(output, "logits", None), getattr(output, "loss", None)
    now = dict(before)
    with torch.no_grad():
        if logits is not None:
            same = found.states.ndim == 3 and logits.shape[:-1] == found.states.shape[:-1]
            same = same and torch.equal(found.all(), logits)
            now["logits"] = before.get("logits", True) and same
        if loss is not None and found.labels is not None and bool((found.labels != -100).any()):
            alone = getattr(output, "aux_loss", None) is None  # as of routers to experts
            same = now.get("logits", False) and alone and found.next_token is not None
            same = same and torch.allclose(found.loss().float(), loss.float(), rtol=1e-5)
            now["loss"] = before.get("loss", True) and same
    return now
