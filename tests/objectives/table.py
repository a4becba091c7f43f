"""The table of all objectives. A new one costs one line here, and inherits every test in test_invariants.py.

The references are written apart from the library: from a hand-run of the model that hooks its query and key layers and
its hidden states, in float64, in loops over examples, heads, tokens and features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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


# student, teacher, mask, labels, learned maps -> scalar
Reference = Callable[[Run, Run, Tensor, Tensor, nn.ModuleDict], Tensor]


def _examples(value: Callable[[int, list[int]], Tensor], mask: Tensor) -> Tensor:
    """Mean over the examples with any token, given the positions of their tokens."""
    real = [(b, [i for i in range(mask.shape[1]) if mask[b, i]]) for b in range(mask.shape[0])]
    values = [value(b, tokens) for b, tokens in real if tokens]
    return sum(values) / len(values)


def hidden_mse(pairs: list[tuple[int, int]]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.hidden[pair[0]][b], t.hidden[pair[1]][b]
            if f"{pair[0]}_{pair[1]}" in learned:
                own = learned[f"{pair[0]}_{pair[1]}"]
                a = torch.stack([own.weight @ a[i] + own.bias for i in range(len(a))])
            return sum((a[i, k] - c[i, k]) ** 2 for i in tokens for k in range(a.shape[1])) / (len(tokens) * a.shape[1])

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def hidden_cosine(pairs: list[tuple[int, int]]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.hidden[pair[0]][b], t.hidden[pair[1]][b]
            cosines = [(a[i] @ c[i]) / math.sqrt(c[i] @ c[i]) / torch.sqrt(a[i] @ a[i]) for i in tokens]
            return sum(1 - x for x in cosines) / len(tokens)

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def cls_mse(pairs: list[tuple[int, int]], normalize: bool, pool: str = "first") -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            chosen = {"first": tokens[:1], "last": tokens[-1:], "mean": tokens}[pool]
            a, c = (
                sum(run.hidden[layer][b, i] for i in chosen) / len(chosen)
                for run, layer in zip((s, t), pair, strict=True)
            )
            if normalize:
                a, c = a / torch.sqrt(a @ a), c / math.sqrt(c @ c)
            return sum((a[k] - c[k]) ** 2 for k in range(len(a))) / (1 if normalize else len(a))

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def relation_kl(pairs: list[tuple[int, int]], relations: list[tuple[str, str]], heads: int) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
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
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int]) -> Tensor:
            a, c = s.scores[pair[0] - 1][b], t.scores[pair[1] - 1][b]
            return sum((a[h, i, j] - c[h, i, j]) ** 2 for h in range(a.shape[0]) for i in tokens for j in tokens) / (
                a.shape[0] * len(tokens) ** 2
            )

        return sum(_examples(lambda b, n, p=p: value(b, n, p), mask) for p in pairs) / len(pairs)

    return reference


def attention_kl(pairs: list[tuple[int, int]]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
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
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int]) -> Tensor:
            a, c = torch.exp(s.logits[b] / temperature), torch.exp(t.logits[b] / temperature)
            p, q = c / c.sum(), a / a.sum()
            return temperature**2 * sum(p[k] * torch.log(p[k] / q[k]) for k in range(len(p)))

        return _examples(value, mask)

    return reference


def logits_mse(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
    classes = s.logits.shape[1]
    return _examples(lambda b, _: sum((s.logits[b, k] - t.logits[b, k]) ** 2 for k in range(classes)) / classes, mask)


def divergence(kind: str, temperature: float, beta: float = 0.5, top_k: int | None = None) -> Reference:
    def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
        return sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))

    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int]) -> Tensor:
            q, p = (
                list(torch.exp(x[b] / temperature) / torch.exp(x[b] / temperature).sum()) for x in (s.logits, t.logits)
            )
            if top_k is not None:
                best = sorted(range(len(p)), key=lambda c: -float(p[c]))
                p, q = ([x[c] for c in best[:top_k]] + [sum(x[c] for c in best[top_k:])] for x in (p, q))
            m = [beta * x + (1 - beta) * y for x, y in zip(p, q, strict=True)]
            found = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}
            return temperature**2 * found[kind]

        return _examples(value, mask)

    return reference


def _correlation(x: list[Tensor], y: list[Tensor]) -> Tensor:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / torch.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def logits_dist(temperature: float) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        rows = [b for b in range(len(mask)) if mask[b].any()]
        q, p = ([torch.softmax(x[b] / temperature, 0) for b in rows] for x in (s.logits, t.logits))
        inter = sum(1 - _correlation(list(a), list(b)) for a, b in zip(q, p, strict=True)) / len(rows)
        classes = range(s.logits.shape[1])
        intra = sum(1 - _correlation([a[c] for a in q], [b[c] for b in p]) for c in classes) / len(classes)
        return temperature**2 * (inter + intra)

    return reference


def hidden_concat(layers_s: list[int], layers_t: list[int]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        weight, bias = learned["all"].weight, learned["all"].bias

        def value(b: int, tokens: list[int]) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for i in tokens:
                own = [s.hidden[layer][b, i, k] for layer in layers_s for k in range(s.hidden[0].shape[2])]
                theirs = [t.hidden[layer][b, i, k] for layer in layers_t for k in range(t.hidden[0].shape[2])]
                mapped = weight @ torch.stack(own) + bias
                total = total + sum((x - y) ** 2 for x, y in zip(mapped, theirs, strict=True)) / len(theirs)
            return total / len(tokens)

        return _examples(value, mask)

    return reference


def cls_attentive(layers: list[int], among: list[int]) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int], layer: int) -> Tensor:
            own = s.hidden[layer][b, tokens[0]]
            states = [t.hidden[k][b, tokens[0]] for k in among]
            e = [torch.exp((own @ x) / math.sqrt(len(own))) for x in states]
            target = sum(a * x for a, x in zip(e, states, strict=True)) / sum(e)
            return sum((own[k] - target[k]) ** 2 for k in range(len(own))) / len(own)

        return sum(_examples(lambda b, n, x=x: value(b, n, x), mask) for x in layers) / len(layers)

    return reference


def hidden_cka(pairs: list[tuple[int, int]]) -> Reference:
    """By Gram matrices of size tokens x tokens and a centring matrix: HSIC as it is defined."""

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        n = len(k)
        centre = torch.eye(n, dtype=k.dtype) - 1 / n
        return torch.trace(k @ centre @ m @ centre)

    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(pair: tuple[int, int]) -> Tensor:
            x, y = (
                torch.stack([h[b, i] for b in range(len(mask)) for i in range(mask.shape[1]) if mask[b, i]])
                for h in (s.hidden[pair[0]], t.hidden[pair[1]])
            )
            k, m = x @ x.T, y @ y.T
            return 1 - hsic(k, m) / torch.sqrt(hsic(k, k) * hsic(m, m))

        return sum(value(pair) for pair in pairs) / len(pairs)

    return reference


def _unit(x: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum())


def _contrast_vectors(run: Run, layers: list[int], mask: Tensor, learned: nn.Module) -> dict[int, Tensor]:
    vectors = {}
    for b in range(len(mask)):
        tokens = [i for i in range(mask.shape[1]) if mask[b, i]]
        if tokens:
            joined = torch.cat([run.hidden[layer][b, tokens[0]] for layer in layers])
            vectors[b] = _unit(learned.weight @ joined + learned.bias)
    return vectors


def _info_nce(anchor: Tensor, positive: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    e = [torch.exp((anchor @ x) / temperature) for x in (positive, *negatives)]
    return -torch.log(e[0] / sum(e))


def _nce(anchor: Tensor, positive: Tensor, negatives: list[Tensor], temperature: float, z: float) -> Tensor:
    """As in the code of CRD, with Z and N, of a data set of 1000 texts."""
    texts = 1000

    def h(x: Tensor) -> Tensor:
        p = torch.exp((anchor @ x) / temperature) / (z * texts)
        return p / (p + len(negatives) / texts)

    return -torch.log(h(positive)) - sum(torch.log(1 - h(x)) for x in negatives)


BANK_CLASSES = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])


def _bank() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    vectors = {
        role: torch.nn.functional.normalize(torch.randn(8, 6, generator=generator, dtype=torch.float64), dim=1)
        for role in ("student", "teacher")
    }
    more = {"row_ids": torch.arange(90, 98), "waiting": [], "log_normalizers": torch.tensor([1.5, 0.6]).log().double()}
    return vectors | {"classes": BANK_CLASSES} | more


def with_bank(**options: Any) -> Objective:
    objective = objectives.CLSContrast(size=6, temperature=0.5, **options)
    objective.load_state_dict(_bank())
    return objective


def cls_contrast(loss: str) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        own = _contrast_vectors(s, [1, 2], mask, learned["student"])
        theirs = _contrast_vectors(t, [1, 2, 3, 4], mask, learned["teacher"])
        bank = _bank()

        def one_way(anchor: Tensor, positive: Tensor, role: str, b: int, z: float) -> Tensor:
            others = [bank[role][k] for k in range(8) if BANK_CLASSES[k] != labels[b]]
            if loss == "nce":
                return _nce(anchor, positive, others, 0.5, z)
            return _info_nce(anchor, positive, others, 0.5)

        def value(b: int, tokens: list[int]) -> Tensor:
            forth = one_way(own[b], theirs[b], "teacher", b, float(bank["log_normalizers"][0].exp()))
            back = one_way(theirs[b], own[b], "student", b, float(bank["log_normalizers"][1].exp()))
            return (forth + back) / 2

        return _examples(value, mask)

    return reference


def cls_in_batch_contrast(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
    own = _contrast_vectors(s, [1, 2], mask, learned["student"])
    theirs = _contrast_vectors(t, [1, 2, 3, 4], mask, learned["teacher"])

    def value(b: int, tokens: list[int]) -> Tensor:
        forth = _info_nce(own[b], theirs[b], [theirs[k] for k in theirs if k != b], 0.5)
        back = _info_nce(theirs[b], own[b], [own[k] for k in own if k != b], 0.5)
        return (forth + back) / 2

    return _examples(value, mask)


def attention_dist(pairs: list[tuple[int, int]], over: str) -> Reference:
    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        real = {b: [i for i in range(mask.shape[1]) if mask[b, i]] for b in range(len(mask)) if mask[b].any()}

        def maps(run: Run, layer: int) -> dict[tuple[int, ...], Tensor]:
            """Probabilities by example, head, query and key, both counted among the real tokens."""
            found = {}
            for b, tokens in real.items():
                for h in range(run.scores[0].shape[1]):
                    for i, query in enumerate(tokens):
                        e = torch.exp(run.scores[layer - 1][b, h, query, tokens])
                        for j in range(len(tokens)):
                            found[b, h, i, j] = e[j] / e.sum()
            return found

        def mean(values: list[Tensor]) -> Tensor:
            return sum(values) / len(values)

        def value(pair: tuple[int, int]) -> Tensor:
            q, p = maps(s, pair[0]), maps(t, pair[1])
            dropped = {"tokens": 3, "heads": 1, "sentences": 0}[over]
            groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
            for key in q:
                groups.setdefault(key[:dropped] + key[dropped + 1 :], []).append(key)
            distances = {
                group: 1 - _correlation([q[k] for k in keys], [p[k] for k in keys])
                for group, keys in groups.items()
                if len(keys) > 1
            }
            if over == "sentences":
                return mean(list(distances.values()))
            by_example: dict[int, list[Tensor]] = {b: [] for b in real}
            for group, distance in distances.items():
                by_example[group[0]].append(distance)
            return mean([mean(found) for found in by_example.values() if found])

        return mean([value(pair) for pair in pairs])

    return reference


def attention_states(pairs: list[tuple[int, int]], parts: list[str]) -> Reference:
    """Of queries, keys, values, or of what attention gives ("context")."""

    def state(run: Run, layer: int, b: int, i: int, tokens: list[int], part: str) -> Tensor:
        if part != "context":
            return run.vectors[part][layer - 1][b, i]
        heads = run.scores[0].shape[1]
        values = run.vectors["value"][layer - 1][b].unflatten(-1, (heads, -1))
        mixed = []
        for h in range(heads):
            e = torch.exp(run.scores[layer - 1][b, h, i, tokens])
            mixed.append(sum(e[k] * values[j, h] for k, j in enumerate(tokens)) / e.sum())
        return torch.cat(mixed)

    def reference(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
        def value(b: int, tokens: list[int], pair: tuple[int, int], part: str) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for i in tokens:
                x, y = state(s, pair[0], b, i, tokens, part), state(t, pair[1], b, i, tokens, part)
                total = total + sum((x[k] - y[k]) ** 2 for k in range(len(x))) / len(x)
            return total / len(tokens)

        values = [_examples(lambda b, n, p=p, a=a: value(b, n, p, a), mask) for p in pairs for a in parts]
        return sum(values) / len(values)

    return reference


def task_loss(s: Run, t: Run, mask: Tensor, labels: Tensor, learned: nn.ModuleDict) -> Tensor:
    return _examples(lambda b, _: -torch.log(torch.exp(s.logits[b]) / torch.exp(s.logits[b]).sum())[labels[b]], mask)


@dataclass(frozen=True)
class Case:
    """An objective, its reference, and whether it is zero for identical models."""

    make: Callable[[], Objective]
    reference: Reference
    zero: bool = True


PAIRS = [(1, 2), (2, 4)]  # Uniform, from a student of 2 layers to a teacher of 4
CASES = {
    "TaskLoss": Case(objectives.TaskLoss, task_loss, zero=False),
    "LogitsKL": Case(lambda: objectives.LogitsKL(temperature=2.5), logits_kl(2.5)),
    "LogitsKL-reverse": Case(lambda: objectives.LogitsKL(divergence="reverse"), divergence("reverse", 2.0)),
    "LogitsKL-jensen-shannon": Case(
        lambda: objectives.LogitsKL(divergence="jensen-shannon", beta=0.3), divergence("jsd", 2.0, 0.3)
    ),
    "LogitsKL-top": Case(lambda: objectives.LogitsKL(top_k=1), divergence("forward", 2.0, top_k=1)),
    "LogitsDIST": Case(lambda: objectives.LogitsDIST(temperature=3.0), logits_dist(3.0)),
    "LogitsMSE": Case(objectives.LogitsMSE, logits_mse),
    "HiddenMSE": Case(objectives.HiddenMSE, hidden_mse(PAIRS)),
    "HiddenMSE-embedding": Case(
        lambda: objectives.HiddenMSE(mapping=mappings.Explicit([[0, 0], [-1, 3]])), hidden_mse([(0, 0), (2, 3)])
    ),
    "HiddenMSE-projected": Case(lambda: objectives.HiddenMSE(projection="always"), hidden_mse(PAIRS), zero=False),
    "HiddenMSE-drawn": Case(
        lambda: objectives.HiddenMSE(mapping=mappings.Random(seed=1)), hidden_mse(mappings.Random(seed=1)(2, 4))
    ),
    "EmbeddingMSE": Case(objectives.EmbeddingMSE, hidden_mse([(0, 0)])),
    "HiddenConcatMSE": Case(objectives.HiddenConcatMSE, hidden_concat([1, 2], [1, 2, 3, 4])),
    "HiddenCKA": Case(objectives.HiddenCKA, hidden_cka(PAIRS)),
    "CLSAttentiveMSE": Case(objectives.CLSAttentiveMSE, cls_attentive([1, 2], [1, 2, 3, 4])),
    "CLSContrast": Case(with_bank, cls_contrast("info_nce"), zero=False),
    "CLSContrast-nce": Case(lambda: with_bank(estimator="nce"), cls_contrast("nce"), zero=False),
    "CLSInBatchContrast": Case(
        lambda: objectives.CLSInBatchContrast(size=6, temperature=0.5), cls_in_batch_contrast, zero=False
    ),
    "HiddenCosine": Case(objectives.HiddenCosine, hidden_cosine(PAIRS)),
    "CLSMSE": Case(objectives.CLSMSE, cls_mse(PAIRS, normalize=False)),
    "CLSMSE-normalised": Case(lambda: objectives.CLSMSE(normalize=True), cls_mse(PAIRS, normalize=True)),
    "CLSMSE-last": Case(lambda: objectives.CLSMSE(pool="last"), cls_mse(PAIRS, normalize=False, pool="last")),
    "CLSMSE-mean": Case(lambda: objectives.CLSMSE(pool="mean"), cls_mse(PAIRS, normalize=False, pool="mean")),
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
    "AttentionDIST": Case(objectives.AttentionDIST, attention_dist(PAIRS, "tokens")),
    "AttentionDIST-heads": Case(lambda: objectives.AttentionDIST(over="heads"), attention_dist(PAIRS, "heads")),
    "AttentionDIST-sentences": Case(
        lambda: objectives.AttentionDIST(over="sentences"), attention_dist(PAIRS, "sentences")
    ),
    "AttentionOutputMSE": Case(objectives.AttentionOutputMSE, attention_states(PAIRS, ["context"])),
    "QKVMSE": Case(objectives.QKVMSE, attention_states(PAIRS, ["query", "key", "value"])),
    "AttentionKL-many": Case(
        lambda: objectives.AttentionKL(mapping=mappings.Explicit([[1, 1], [1, 2], [2, 2]])),
        attention_kl([(1, 1), (1, 2), (2, 2)]),
    ),
}
