"""Which rows, columns and examples count, against loops in float64: causality and windows of both models, numbers of
heads that configs don't say, and correlations that aren't defined."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import exact
import handmade
from ildistil import functional, kernels, mappings, objectives
from ildistil.attention import Attention, Masks, Scores
from ildistil.capture import Activations, Layers, ModelInfo
from ildistil.errors import ObjectiveError
from ildistil.objectives import Objective
from table import CASES

TOKENS, HEADS, SIZE = 6, 2, 3
REAL = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 3 + [True] * 3])
REACHES = [(False, None), (True, None), (False, 2), (True, 3)]


@pytest.fixture(params=["plain", "blockwise"])
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.use(request.param):
        yield


@dataclass
class Side:
    """One model's last layer."""

    parts: dict[str, Tensor]
    causal: bool
    window: int | None

    def sees(self, i: int, j: int) -> bool:
        near = self.window is None or abs(i - j) < self.window
        return near and (j <= i or not self.causal)

    def run(self, depth: int) -> Activations:
        masks = Masks(REAL, REAL, self.causal, self.window)
        query, key, value = (self.parts[part] for part in "qkv")
        record = Attention(Scores(query, key, SIZE**-0.5), masks, value)
        return Activations(Layers({}, depth, "hidden"), Layers({depth: record}, depth, "attention"), REAL, None)


def side(seed: int, reach: tuple[bool, int | None], heads: int = HEADS, scale: float = 1.0) -> Side:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(REAL), heads, TOKENS, SIZE)
    made = {part: scale * torch.randn(shape, generator=generator, dtype=torch.float64) for part in "qkv"}
    return Side(made, *reach)


def built(objective: Objective, heads: tuple[int | None, int | None] = (HEADS, HEADS)) -> Objective:
    objective.build(ModelInfo("student", 2, heads=heads[0]), ModelInfo("teacher", 4, heads=heads[1]))
    return objective


def rows(s: Side, t: Side, b: int) -> Iterator[tuple[int, list[int]]]:
    """The real tokens of a text, and those that they see in both models."""
    tokens = [i for i in range(TOKENS) if REAL[b, i]]
    for i in tokens:
        yield i, [j for j in tokens if s.sees(i, j) and t.sees(i, j)]


def divergence(s: Side, t: Side, b: int, parts: tuple[str, str]) -> float:
    total = 0.0
    for i, seen in rows(s, t, b):
        for h in range(HEADS):
            q, p = (
                scipy.special.softmax([float(m.parts[parts[0]][b, h, i] @ m.parts[parts[1]][b, h, j]) for j in seen]
                                      / np.sqrt(SIZE))
                for m in (s, t)
            )  # fmt: skip
            total += scipy.special.rel_entr(p, q).sum()
    return total / (HEADS * int(REAL[b].sum()))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("teacher", REACHES, ids=str)
@pytest.mark.parametrize("student", REACHES, ids=str)
def test_what_both_models_see_counts(student: tuple[bool, int | None], teacher: tuple[bool, int | None]) -> None:
    s, t = side(0, student), side(1, teacher)
    cases = [
        (objectives.RelationKL(), [("q", "q"), ("k", "k"), ("v", "v")]),
        (objectives.RelationKL(relations=["q-v"]), [("q", "v")]),
        (objectives.ValueRelationKL(), [("v", "v")]),
        (objectives.AttentionKL(mapping=mappings.Last()), [("q", "k")]),
    ]
    for objective, relations in cases:
        found = built(objective).loss(s.run(2), t.run(4), {}).item()
        values = [divergence(s, t, b, parts) for parts in relations for b in range(len(REAL))]
        assert found == pytest.approx(sum(values) / len(values), rel=1e-9)


def distances(s: Side, t: Side, b: int, over: str) -> list[float]:
    """The defined distances of a text, by SciPy."""
    maps = np.full((2, HEADS, TOKENS, TOKENS), np.nan)
    for i, seen in rows(s, t, b):
        for h in range(HEADS):
            for k, m in enumerate((s, t)):
                scores = [float(m.parts["q"][b, h, i] @ m.parts["k"][b, h, j]) / math.sqrt(SIZE) for j in seen]
                maps[k, h, i, seen] = scipy.special.softmax(scores)
    found = []
    for i, seen in rows(s, t, b):
        vectors = [maps[:, h, i, seen] for h in range(HEADS)] if over == "tokens" else [maps[:, :, i, j] for j in seen]
        found += [1 - scipy.stats.pearsonr(q, p).statistic for q, p in vectors if len(q) > 1 and np.ptp(p) > 1e-12]
    return found


@pytest.mark.parametrize("over", ["tokens", "heads"])
def test_examples_without_a_defined_correlation_do_not_count(over: str) -> None:
    """The teacher's maps of the second text are the same everywhere; the first row of each text has a single key."""
    s, t = side(0, (True, None)), side(1, (False, None))
    for part in "qk":
        t.parts[part][1] = 0
    objective = built(objectives.AttentionDIST(over=over, mapping=mappings.Last()))
    student = s.run(2)
    value = objective.loss(student, t.run(4), {})
    by_text = [distances(s, t, b, over) for b in range(len(REAL))]
    assert by_text[1] == []
    wanted = [sum(found) / len(found) for found in by_text if found]
    assert value.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-9)
    assert objective.count(student, {}).number == len(wanted) == 2


def test_a_pair_of_layers_without_a_correlation_leaves_the_others() -> None:
    """An example's distance is the mean over those of its layer pairs that have one."""
    s, flat, t = side(0, (False, None)), side(1, (False, None)), side(2, (False, None))
    for part in "qk":
        flat.parts[part][1:] = 0
        t.parts[part][1] = 0
    teacher = t.run(4)
    teacher.attention._records[3] = flat.run(4).attention[4]
    objective = built(objectives.AttentionDIST())
    objective.pairs = [(2, 3), (2, 4)]
    student = s.run(2)
    value = objective.loss(student, teacher, {})
    whole = [[np.mean(d) for d in (distances(s, m, b, "tokens") for m in (flat, t)) if d] for b in range(3)]
    assert [len(found) for found in whole] == [2, 0, 1]
    assert value.item() == pytest.approx(np.mean([np.mean(found) for found in whole if found]), rel=1e-9)
    assert objective.count(student, {}).number == 2


def test_logits_dist_leaves_out_rows_without_a_correlation() -> None:
    objective = objectives.LogitsDIST(temperature=2.0, intra=0.0)
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    t[1], t[3] = 3.0, 7.0
    found = objective.compare(s, t, torch.ones(4, dtype=torch.bool)).item()
    q, p = (scipy.special.softmax(x.numpy() / 2, axis=1) for x in (s, t))
    wanted = [4 * (1 - scipy.stats.pearsonr(q[b], p[b]).statistic) for b in (0, 2)]
    assert found == pytest.approx(sum(wanted) / 2, rel=1e-9)
    values, defined = functional.logits_dist(s, t, 2.0)
    assert defined.tolist() == [True, False, True, False]
    assert values[~defined].tolist() == [0.0, 0.0]


def test_texts_of_one_token_count_in_no_batch() -> None:
    """Accumulated batches with such texts are one batch: of four batches one has nothing that counts."""
    data = exact.rows()
    for number in (2, 4, 5):
        data[number]["attention_mask"][1:] = 0
    whole = exact.step([objectives.AttentionDIST()], data, exact.models(), 8)
    parts = exact.step([objectives.AttentionDIST()], data, exact.models(), 2, accumulate_grad_batches=4)
    without = [row for number, row in enumerate(data) if number not in (2, 4, 5)]
    alone = exact.step([objectives.AttentionDIST()], without, exact.models(), 8)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-8, atol=1e-10, msg=name)
        torch.testing.assert_close(alone[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (2, 6), (4, 6), (2, 3)])
def test_numbers_of_heads_that_differ_are_merged_in_the_kernels(heads: tuple[int, int], causal: bool) -> None:
    """As averages after the softmax, by loops; every backend takes them."""
    s, t = side(0, (causal, None), heads[0]), side(1, (False, None), heads[1])
    for part in "qk":
        s.parts[part].requires_grad_()
    masks = Masks(REAL, REAL, causal)
    values = kernels.attention_kl(*(Scores(m.parts["q"], m.parts["k"], SIZE**-0.5) for m in (s, t)), masks)
    common = math.gcd(*heads)
    for b in range(len(REAL)):
        total = 0.0
        for i, seen in rows(s, t, b):
            p = []
            for m, number in zip((s, t), heads, strict=True):
                each = [
                    scipy.special.softmax(
                        [(m.parts["q"][b, h, i] @ m.parts["k"][b, h, j]).item() / SIZE**0.5 for j in seen]
                    )
                    for h in range(number)
                ]
                p.append(np.array(each).reshape(common, -1, len(seen)).mean(1))
            total += scipy.special.rel_entr(p[1], p[0]).sum() / common
        assert values[b].item() == pytest.approx(total / int(REAL[b].sum()), rel=1e-9)
    gradients = torch.autograd.grad(values.sum(), [s.parts["q"], s.parts["k"]])
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("heads", [(None, None), (2, None), (None, 4)])
@pytest.mark.parametrize("name", ["AttentionKL", "AttentionMSE", "AttentionDIST", "RelationKL", "ValueRelationKL"])
def test_heads_that_no_config_says_are_never_merged_unasked(name: str, heads: tuple[int | None, int | None]) -> None:
    objective = getattr(objectives, name)(mapping=mappings.Last())
    with pytest.raises(ObjectiveError, match="student has 2 heads, the teacher 4"):
        built(objective, heads).loss(side(0, (False, None)).run(2), side(1, (False, None), 4).run(4), {})


def test_relation_heads_must_divide_what_is_there() -> None:
    objective = built(objectives.RelationKL(heads=4), (None, None))
    with pytest.raises(ObjectiveError, match="heads=4 must divide the width of all heads, which for 'q' is 6"):
        objective.loss(side(0, (False, None)).run(2), side(1, (False, None)).run(4), {})


def test_relations_of_parts_of_different_sizes_are_refused() -> None:
    s, t = side(0, (False, None)), side(1, (False, None))
    for m in (s, t):
        m.parts["v"] = torch.randn(len(REAL), HEADS, TOKENS, 5, dtype=torch.float64)
    built(objectives.RelationKL()).loss(s.run(2), t.run(4), {})
    with pytest.raises(ObjectiveError, match="'q' have 3 features for each head, those of 'v' 5"):
        built(objectives.RelationKL(relations=["q-v"])).loss(s.run(2), t.run(4), {})


def test_states_of_another_width_than_the_config_says_are_refused() -> None:
    objective = handmade.built(CASES["HiddenMSE-projected"], torch.float64)
    made = [torch.randn(s, dtype=torch.float64) for s in handmade.shapes(handmade.STUDENT)]
    wide = [torch.cat([x, x], dim=-1) if x.ndim == 3 else x for x in made]
    teacher = [torch.randn(s, dtype=torch.float64) for s in handmade.shapes(handmade.TEACHER)]
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ObjectiveError, match="states are 8 wide; by its config it would be 4"):
        objective.loss(handmade.activations(wide, 2, mask), handmade.activations(teacher, 4, mask), {})
