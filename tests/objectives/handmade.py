"""Captured activations made by hand, without a model: a student of 2 layers, a teacher of 4."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ildistil.attention import Attention, Masks, Scores
from ildistil.capture import Activations, Layers, ModelInfo
from ildistil.objectives import Objective
from table import Case

STUDENT, TEACHER = 2, 4
WIDTH, HEADS, CLASSES = 4, 2, 3


def built(case: Case, dtype: torch.dtype) -> Objective:
    """The objective, its projections made for these sizes."""
    objective = case.make()
    known = {"width": WIDTH, "heads": HEADS, "labels": CLASSES, "attention_width": WIDTH}
    known["value_width"] = WIDTH
    objective.build(ModelInfo("student", STUDENT, **known), ModelInfo("teacher", TEACHER, **known))
    objective.projections.to(dtype)
    return objective


def batch(examples: int) -> dict[str, Tensor]:
    return {"row_id": torch.arange(examples), "labels": torch.tensor([0, 2, 1, 0])[:examples]}


def shapes(depth: int, examples: int = 2, tokens: int = 3) -> list[tuple[int, ...]]:
    """Of all that activations() takes: hidden states, queries and keys by turns, logits."""
    heads = (examples, HEADS, tokens, WIDTH // HEADS)
    return [(examples, tokens, WIDTH)] * (depth + 1) + [heads] * (2 * depth) + [(examples, CLASSES)]


def activations(tensors: Sequence[Tensor], depth: int, mask: Tensor) -> Activations:
    """Values are the keys."""
    left: Iterator[Tensor] = iter(tensors)
    hidden = {i: next(left) for i in range(depth + 1)}
    attention = {}
    for i in range(1, depth + 1):
        query, key = next(left), next(left)
        attention[i] = Attention(Scores(query, key, 0.7), Masks(mask, mask), key)
    output = {"logits": next(left)}
    return Activations(Layers(hidden, depth, "hidden"), Layers(attention, depth, "attention"), mask, output)
