"""The table of all objectives. A new one costs one line here, and inherits every test in test_invariants.py.

The references are written apart from the library: from a hand-run of the model that hooks its query and key layers and
its hidden states, in float64, in loops over examples, heads, tokens and features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ildistil import mappings, objectives
from ildistil.objectives import Objective


class Run(NamedTuple):
    """One model's run on one batch, by hand: lists over layers, in float64."""

    hidden: list[Tensor]  # L + 1 times (batch, tokens, width)
    scores: list[Tensor]  # L times (batch, heads, tokens, tokens)
    logits: Tensor
    vectors: dict[str, list[Tensor]]  # "query", "key", "value": L times (batch, tokens, width)


def run_by_hand(model: PreTrainedModel, batch: dict[str, Tensor]) -> Run:
    model = model.double()
    rows: dict[str, list[Tensor]] = {"query": [], "key": [], "value": []}
    handles = [
        getattr(layer.attention.self, part).register_forward_hook(lambda m, a, out, part=part: rows[part].append(out))
        for layer in model.bert.encoder.layer
        for part in rows
    ]
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")}
    output = model(**inputs, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    heads = model.config.num_attention_heads
    scores = []
    for query, key in zip(rows["query"], rows["key"], strict=True):
        q, k = (x.unflatten(-1, (heads, -1)) for x in (query, key))
        scores.append(torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]))
    return Run(list(output.hidden_states), scores, output.logits, rows)


Reference = Callable[[Run, Run, Tensor, Tensor], Tensor]  # student, teacher, mask, labels -> scalar


def _examples(value: Callable[[int, list[int]], Tensor], mask: Tensor) -> Tensor:
    """Mean over the examples with any token, given the positions of their tokens."""
    real = [(b, [i for i in range(mask.shape[1]) if mask[b, i]]) for b in range(mask.shape[0])]
    values = [value(b, tokens) for b, tokens in real if tokens]
    return sum(values) / len(values)


def hidden_mse(pairs: list[tuple[int, int]]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.hidden[pair[0]][b], t.hidden[pair[1]][b]
            return sum((a[i, k] - c[i, k]) ** 2 for i in tokens for k in range(a.shape[1])) / (len(tokens) * a.shape[1])

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def hidden_cosine(pairs: list[tuple[int, int]]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.hidden[pair[0]][b], t.hidden[pair[1]][b]
            cosines = [(a[i] @ c[i]) / math.sqrt(c[i] @ c[i]) / torch.sqrt(a[i] @ a[i]) for i in tokens]
            return sum(1 - x for x in cosines) / len(tokens)

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def cls_mse(pairs: list[tuple[int, int]], normalize: bool) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.hidden[pair[0]][b, tokens[0]], t.hidden[pair[1]][b, tokens[0]]
            if normalize:
                a, c = a / torch.sqrt(a @ a), c / math.sqrt(c @ c)
            return sum((a[k] - c[k]) ** 2 for k in range(len(a))) / (1 if normalize else len(a))

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def relation_kl(pairs: list[tuple[int, int]], relations: list[tuple[str, str]], heads: int) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
        def row(run: Run, layer: int, b: int, h: int, i: int, tokens: list[int], parts: tuple[str, str]) -> Tensor:
            x, y = (run.vectors[part][layer - 1][b] for part in parts)
            size = x.shape[1] // heads
            cut = slice(h * size, (h + 1) * size)
            e = torch.stack([torch.exp((x[i, cut] @ y[j, cut]) / math.sqrt(size)) for j in tokens])
            return e / e.sum()

        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for parts in relations:
                for h in range(heads):
                    for i in tokens:
                        q, p = row(s, pair[0], b, h, i, tokens, parts), row(t, pair[1], b, h, i, tokens, parts)
                        total = total + (p * torch.log(p / q)).sum()
            return total / (len(relations) * heads * len(tokens))

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def attention_mse(pairs: list[tuple[int, int]]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.scores[pair[0] - 1][b], t.scores[pair[1] - 1][b]
            return sum((a[h, i, j] - c[h, i, j]) ** 2 for h in range(a.shape[0]) for i in tokens for j in tokens) / (
                a.shape[0] * len(tokens) ** 2
            )

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def attention_kl(pairs: list[tuple[int, int]]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
        def row(a: Tensor, c: Tensor) -> Tensor:
            p, q = torch.exp(c) / torch.exp(c).sum(), torch.exp(a) / torch.exp(a).sum()
            return sum(p[j] * torch.log(p[j] / q[j]) for j in range(len(p)))

        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.scores[pair[0] - 1][b], t.scores[pair[1] - 1][b]
            heads = a.shape[0]
            return sum(row(a[h, i, tokens], c[h, i, tokens]) for h in range(heads) for i in tokens) / (
                heads * len(tokens)
            )

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def logits_kl(temperature: float) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
        def value(b: int, tokens: list[int]) -> Tensor:
            a, c = torch.exp(s.logits[b] / temperature), torch.exp(t.logits[b] / temperature)
            p, q = c / c.sum(), a / a.sum()
            return temperature**2 * sum(p[k] * torch.log(p[k] / q[k]) for k in range(len(p)))

        return _examples(value, mask)

    return reference


def logits_mse(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
    classes = s.logits.shape[1]
    return _examples(lambda b, _: sum((s.logits[b, k] - t.logits[b, k]) ** 2 for k in range(classes)) / classes, mask)


def task_loss(s: Run, t: Run, mask: Tensor, labels: Tensor) -> Tensor:
    return _examples(lambda b, _: -torch.log(torch.exp(s.logits[b]) / torch.exp(s.logits[b]).sum())[labels[b]], mask)


@dataclass(frozen=True)
class Case:
    """An objective, its reference, and whether it is zero for identical models."""

    make: Callable[[], Objective]
    reference: Reference | None
    zero: bool = True


PAIRS = [(1, 2), (2, 4)]  # Uniform, from a student of 2 layers to a teacher of 4
CASES = {
    "TaskLoss": Case(objectives.TaskLoss, task_loss, zero=False),
    "LogitsKL": Case(lambda: objectives.LogitsKL(temperature=2.5), logits_kl(2.5)),
    "LogitsMSE": Case(objectives.LogitsMSE, logits_mse),
    "HiddenMSE": Case(objectives.HiddenMSE, hidden_mse(PAIRS)),
    "HiddenMSE-embedding": Case(
        lambda: objectives.HiddenMSE(mapping=mappings.Explicit([[0, 0], [-1, 3]])), hidden_mse([(0, 0), (2, 3)])
    ),
    "HiddenMSE-projected": Case(lambda: objectives.HiddenMSE(projection="always"), None, zero=False),
    "HiddenCosine": Case(objectives.HiddenCosine, hidden_cosine(PAIRS)),
    "CLSMSE": Case(objectives.CLSMSE, cls_mse(PAIRS, normalize=False)),
    "CLSMSE-normalised": Case(lambda: objectives.CLSMSE(normalize=True), cls_mse(PAIRS, normalize=True)),
    "ValueRelationKL": Case(objectives.ValueRelationKL, relation_kl([(2, 4)], [("value", "value")], 4)),
    "RelationKL": Case(
        lambda: objectives.RelationKL(mapping=mappings.Uniform()),
        relation_kl(PAIRS, [("query", "query"), ("key", "key"), ("value", "value")], 4),
    ),
    "RelationKL-heads": Case(
        lambda: objectives.RelationKL(relations=["q-k"], heads=2), relation_kl([(2, 4)], [("query", "key")], 2)
    ),
    "AttentionMSE": Case(objectives.AttentionMSE, attention_mse(PAIRS)),
    "AttentionMSE-last": Case(lambda: objectives.AttentionMSE(mapping=mappings.Last()), attention_mse([(2, 4)])),
    "AttentionKL": Case(objectives.AttentionKL, attention_kl(PAIRS)),
    "AttentionKL-many": Case(
        lambda: objectives.AttentionKL(mapping=mappings.Explicit([[1, 1], [1, 2], [2, 2]])),
        attention_kl([(1, 1), (1, 2), (2, 2)]),
    ),
}
