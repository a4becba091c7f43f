"""What the losses must hold by their mathematics, over random shapes, masks and dtypes; and against SciPy."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import handmade
from ildistil import Balance, functional, mappings, schedules
from ildistil.functional.correlation import pearson_distance
from ildistil.functional.logits import Divergence
from ildistil.functional.reduction import unit
from table import CASES

checked = settings(derandomize=True, deadline=None, max_examples=25)
Generator = torch.Generator

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def rounding(dtype: torch.dtype) -> float:
    """Of a loss near 0: half precision is computed in float32."""
    return 1e-10 if dtype == torch.float64 else 1e-4


@dataclass
class Draw:
    """Shapes, a mask and a source of numbers."""

    batch: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    mask: Tensor
    generator: Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def order(self, length: int) -> Tensor:
        return torch.randperm(length, generator=self.generator)

    @property
    def allowed(self) -> Tensor:
        return self.mask[:, None, None, :]


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    batch, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    row = st.one_of(
        st.integers(1, tokens).map(lambda n: [True] * n + [False] * (tokens - n)),  # padding right
        st.integers(1, tokens).map(lambda n: [False] * (tokens - n) + [True] * n),  # padding left
        st.lists(st.booleans(), min_size=tokens, max_size=tokens),  # holes, all of it at worst
    )
    mask = torch.tensor(draw(st.lists(row, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    heads, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return Draw(batch, tokens, heads, width, draw(st.sampled_from(DTYPES)), mask, generator)


# student, teacher, what says which of their entries count -> values
Loss = Callable[[Tensor, Tensor, Draw], Tensor]


@dataclass(frozen=True)
class Law:
    """A loss, the shape of what it compares, its bound, and whether it is about each example alone."""

    loss: Loss
    shape: str
    most: float = math.inf
    alone: bool = True
    least: float = 0.0  # of a loss of two equal inputs
    tokens: bool = True  # does the order of tokens not matter?

    def inputs(self, d: Draw) -> tuple[Tensor, Tensor]:
        sizes = {
            "hidden": (d.batch, d.tokens, d.width),
            "scores": (d.batch, d.heads, d.tokens, d.tokens),
            "logits": (d.batch, d.width + 1),
        }[self.shape]
        return d.normal(*sizes), d.normal(*sizes)

    def counted(self, d: Draw) -> Tensor:
        """Which entries count, of the inputs' shape."""
        if self.shape == "hidden":
            return d.mask[:, :, None].expand(-1, -1, d.width)
        if self.shape == "scores":
            return (d.allowed & d.mask[:, None, :, None]).expand(-1, d.heads, -1, -1)
        return d.mask.any(1, keepdim=True).expand(-1, d.width + 1)


def _relation(loss: Callable[..., Tensor], *more: object) -> Loss:
    return lambda s, t, d: loss(s, t, d.allowed, d.mask, *more)


def _values(loss: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    return lambda *arguments: loss(*arguments)[0]


def _on_logits(divergence: Divergence, top_k: int | None = None) -> Loss:
    return lambda s, t, d: functional.logits_kl(s, t, 2.0, divergence, 0.3, top_k) * d.mask.any(1)


LAWS = {
    "hidden_mse": Law(lambda s, t, d: functional.hidden_mse(s, t, d.mask), "hidden"),
    "hidden_cosine": Law(lambda s, t, d: functional.hidden_cosine(s, t, d.mask), "hidden", 2),
    "hidden_cka": Law(lambda s, t, d: functional.hidden_cka(s, t, d.mask), "hidden", 1, alone=False),
    "cls_mse": Law(lambda s, t, d: functional.cls_mse(s, t, d.mask), "hidden", tokens=False),
    "cls_mse normalised": Law(lambda s, t, d: functional.cls_mse(s, t, d.mask, True), "hidden", 4, tokens=False),
    "attention_mse": Law(_relation(functional.attention_mse), "scores"),
    "attention_kl": Law(_relation(functional.attention_kl), "scores"),
    "attention_dist over tokens": Law(_relation(_values(functional.attention_dist), "tokens"), "scores", 2),
    "attention_dist over heads": Law(_relation(_values(functional.attention_dist), "heads"), "scores", 2),
    "attention_dist over sentences": Law(
        _relation(functional.attention_dist_over_batch), "scores", 2, alone=False, tokens=False
    ),
    "logits_kl": Law(_on_logits("forward"), "logits"),
    "logits_kl reverse": Law(_on_logits("reverse"), "logits"),
    # Of two distributions it is at most the entropy of the mixture's weights.
    "logits_kl jensen-shannon": Law(_on_logits("jensen-shannon"), "logits", 4 * scipy.stats.entropy([0.3, 0.7])),
    "logits_kl of the best": Law(_on_logits("forward", 1), "logits"),
    "logits_mse": Law(lambda s, t, d: functional.logits_mse(s, t) * d.mask.any(1), "logits"),
    "logits_dist": Law(lambda s, t, d: functional.logits_dist(s, t, 3.0)[0] * d.mask.any(1), "logits", 18),
    "logits_dist over the batch": Law(
        lambda s, t, d: functional.logits_dist_over_batch(s, t, d.mask.any(1), 3.0), "logits", 18, alone=False
    ),
}
everywhere = pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)


@everywhere
@checked
@given(d=draws())
def test_bounds(law: Law, d: Draw) -> None:
    student, teacher = law.inputs(d)
    value = law.loss(student, teacher, d)
    assert value.shape == ((d.batch,) if law.alone else ())
    assert value.dtype == (torch.float64 if d.dtype == torch.float64 else torch.float32)
    assert (value >= -rounding(d.dtype)).all()
    assert (value <= law.most + rounding(d.dtype)).all()


@everywhere
@checked
@given(d=draws())
def test_zero_at_equality(law: Law, d: Draw) -> None:
    _, teacher = law.inputs(d)
    value = law.loss(teacher, teacher, d)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=rounding(d.dtype))


@everywhere
@checked
@given(d=draws())
def test_masked_entries_change_nothing(law: Law, d: Draw) -> None:
    """Not a bit of the value, nor of the gradient; and the gradient in masked entries is exactly 0."""
    student, teacher = law.inputs(d)
    counted = law.counted(d)
    if law.shape == "logits" and law.alone:
        assume(counted.all())  # these take no mask
    found = []
    for junk in (1.0, 1e4, math.nan):
        s, t = (torch.where(counted, x, junk * d.normal(*x.shape)) for x in (student, teacher))
        s.requires_grad_()
        value = law.loss(s, t, d)
        (gradient,) = torch.autograd.grad(value.sum(), s)
        assert (gradient[~counted] == 0).all()
        found.append((value, gradient))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@everywhere
@checked
@given(d=draws())
def test_examples_in_any_order(law: Law, d: Draw) -> None:
    student, teacher = law.inputs(d)
    value = law.loss(student, teacher, d)
    order = d.order(d.batch)
    d.mask = d.mask[order]
    other = law.loss(student[order], teacher[order], d)
    torch.testing.assert_close(other, value[order] if law.alone else value, rtol=1e-4, atol=rounding(d.dtype))


@pytest.mark.parametrize("law", [law for law in LAWS.values() if law.tokens and law.shape != "logits"])
@checked
@given(d=draws())
def test_tokens_in_any_order(law: Law, d: Draw) -> None:
    student, teacher = law.inputs(d)
    value = law.loss(student, teacher, d)
    order = d.order(d.tokens)
    d.mask = d.mask[:, order]
    pick = (lambda x: x[:, order]) if law.shape == "hidden" else (lambda x: x[:, :, order][..., order])
    torch.testing.assert_close(law.loss(pick(student), pick(teacher), d), value, rtol=1e-4, atol=rounding(d.dtype))


@everywhere
@checked
@given(d=draws())
def test_padding_columns_change_nothing(law: Law, d: Draw) -> None:
    """On either side, also where only the order of real tokens counts."""
    student, teacher = law.inputs(d)
    value = law.loss(student, teacher, d)
    if law.shape == "logits":
        return
    sides = {"hidden": (0, 0, 2, 1), "scores": (2, 1, 2, 1)}[law.shape]
    wider = [nn.functional.pad(x, sides, value=7.0) for x in (student, teacher)]
    d.mask = nn.functional.pad(d.mask, (2, 1))
    torch.testing.assert_close(law.loss(*wider, d), value, rtol=1e-4, atol=rounding(d.dtype))


@pytest.mark.parametrize("law", [law for law in LAWS.values() if law.shape != "logits"])
@checked
@given(d=draws())
def test_where_padding_stands_changes_nothing(law: Law, d: Draw) -> None:
    """In each example by itself: to the left, to the right, or between the tokens."""
    student, teacher = law.inputs(d)
    value = law.loss(student, teacher, d)
    first = (~d.mask).int().argsort(dim=1, stable=True)  # real tokens to the front
    moved = []
    for x in (student, teacher):
        rows = [x[b][first[b]] if x.ndim == 3 else x[b][:, first[b]][:, :, first[b]] for b in range(d.batch)]
        moved.append(torch.stack(rows))
    d.mask = d.mask.gather(1, first)
    torch.testing.assert_close(law.loss(*moved, d), value, rtol=1e-4, atol=rounding(d.dtype))


@checked
@given(
    d=draws(), scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10), length=st.integers(3, 30), offset=st.floats(-9, 9)
)
def test_pearson(d: Draw, scale: float, shift: float, length: int, offset: float) -> None:
    """As in SciPy, and blind to a positive affine map of the student's."""
    student, teacher = d.normal(length).double() + offset, d.normal(length).double() - offset
    mask = torch.rand(length, generator=d.generator) < 0.7
    assume(mask.sum() > 2)
    distance, defined = pearson_distance(student, teacher, mask, 0)
    wanted = 1 - scipy.stats.pearsonr(student[mask].numpy(), teacher[mask].numpy()).statistic
    assert defined
    assert distance.item() == pytest.approx(wanted, abs=1e-9)
    assert pearson_distance(scale * student + shift, teacher, mask, 0)[0].item() == pytest.approx(wanted, abs=1e-7)
    assert pearson_distance(-student, teacher, mask, 0)[0].item() == pytest.approx(2 - wanted, abs=1e-9)
    student, teacher = (torch.where(mask, x, math.nan).requires_grad_() for x in (student, teacher))
    distance = pearson_distance(student, teacher, mask, 0)[0]
    assert distance.item() == pytest.approx(wanted, abs=1e-9)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(distance, (student, teacher)))
    single = pearson_distance(student.float(), teacher.float(), mask, 0)[0]
    assert single.item() == pytest.approx(wanted, abs=1e-4)


@checked
@given(d=draws(), scale=st.floats(1e-3, 1e3))
def test_logits_dist_is_the_correlation_of_probabilities(d: Draw, scale: float) -> None:
    student, teacher = d.normal(d.batch, 5).double(), d.normal(d.batch, 5).double()
    values, defined = functional.logits_dist(student, teacher, 2.0)
    assert defined.all()
    p, q = (scipy.special.softmax(x.numpy() / 2, axis=1) for x in (student, teacher))
    for b in range(d.batch):
        assert values[b].item() == pytest.approx(4 * (1 - scipy.stats.pearsonr(p[b], q[b]).statistic), abs=1e-9)


@checked
@given(d=draws(), temperature=st.floats(0.5, 8))
def test_kl(d: Draw, temperature: float) -> None:
    student, teacher = d.normal(d.batch, 5).double(), 3 * d.normal(d.batch, 5).double()
    q, p = (scipy.special.softmax(x.numpy() / temperature, axis=1) for x in (student, teacher))
    forward = functional.logits_kl(student, teacher, temperature).numpy()
    reverse = functional.logits_kl(student, teacher, temperature, "reverse").numpy()
    np.testing.assert_allclose(forward, temperature**2 * scipy.special.rel_entr(p, q).sum(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(reverse, temperature**2 * scipy.stats.entropy(q, p, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        functional.logits_kl(student, teacher, temperature, "jensen-shannon").numpy(),
        temperature**2 * scipy.spatial.distance.jensenshannon(p, q, axis=1) ** 2,
        rtol=1e-6,
        atol=1e-12,
    )


@checked
@given(d=draws(), beta=st.floats(0.05, 0.95))
def test_jensen_shannon_is_a_gap_of_entropies(d: Draw, beta: float) -> None:
    student, teacher = d.normal(d.batch, 4).double(), d.normal(d.batch, 4).double()
    q, p = (scipy.special.softmax(x.numpy(), axis=1) for x in (student, teacher))
    mixed, own = beta * p + (1 - beta) * q, [scipy.stats.entropy(x, axis=1) for x in (p, q)]
    wanted = scipy.stats.entropy(mixed, axis=1) - beta * own[0] - (1 - beta) * own[1]
    found = functional.logits_kl(student, teacher, 1.0, "jensen-shannon", beta)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


@checked
@given(d=draws(), top_k=st.integers(1, 6))
def test_fewer_classes_tell_less(d: Draw, top_k: int) -> None:
    """Joining classes never raises a divergence, and keeping all of them is no change."""
    student, teacher = d.normal(d.batch, 5).double(), d.normal(d.batch, 5).double()
    whole = functional.logits_kl(student, teacher)
    joined = functional.logits_kl(student, teacher, top_k=top_k)
    assert (joined <= whole + 1e-12).all()
    if top_k >= 4:  # the rest is one class, or none
        torch.testing.assert_close(joined, whole)


@checked
@given(d=draws(), scale=st.floats(1e-6, 1e6), shift=st.floats(-10, 10))
def test_cka_is_blind_to_rotation_scale_and_shift(d: Draw, scale: float, shift: float) -> None:
    student, teacher = d.normal(d.batch, d.tokens, 4).double(), d.normal(d.batch, d.tokens, 3).double()
    turn, _ = torch.linalg.qr(d.normal(4, 4).double())
    value = functional.hidden_cka(student, teacher, d.mask)
    torch.testing.assert_close(functional.hidden_cka(scale * (student @ turn + shift), teacher, d.mask), value)
    torch.testing.assert_close(functional.hidden_cka(teacher, student, d.mask), value)


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("tokens", [1, 3, 7, 64, 500])
def test_cka_of_equal_states(width: int, tokens: int) -> None:
    """The mean of equal numbers rounds: what is left of them is no state."""
    student, mask = torch.randn(1, tokens, width, requires_grad=True), torch.ones(1, tokens, dtype=torch.bool)
    teacher = (10 * torch.randn(width)).expand(1, tokens, width).clone()
    value = functional.hidden_cka(student, teacher, mask)
    assert value == 0
    assert (torch.autograd.grad(value, student)[0] == 0).all()
    if tokens > 1:
        assert functional.hidden_cka(teacher, student, mask) == 1


@checked
@given(d=draws(), candidates=st.integers(0, 5), temperature=st.floats(0.05, 2))
def test_info_nce(d: Draw, candidates: int, temperature: float) -> None:
    anchors, positives = d.normal(d.batch, 4).double(), d.normal(d.batch, 4).double()
    negatives = d.normal(candidates, 4).double()
    allowed = torch.rand(d.batch, candidates, generator=d.generator) < 0.5
    values = functional.info_nce(anchors, positives, negatives, allowed, temperature)
    assert (values >= 0).all()
    a, p, n = (x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (anchors, positives, negatives))
    for b in range(d.batch):
        near = a[b] @ p[b] / temperature
        among = [near, *(a[b] @ n[k] / temperature for k in range(candidates) if allowed[b, k])]
        assert values[b].item() == pytest.approx(scipy.special.logsumexp(among) - near, abs=1e-9)
        if len(among) == 1:
            assert values[b] == 0


@checked
@given(d=draws(), heads=st.sampled_from([(4, 2), (2, 4), (4, 6), (3, 3), (2, 3)]), causal=st.booleans())
def test_attention_with_merged_heads(d: Draw, heads: tuple[int, int], causal: bool) -> None:
    student, teacher = (d.normal(d.batch, h, d.tokens, d.tokens).double() for h in heads)
    allowed = d.allowed & (torch.ones(d.tokens, d.tokens).tril().bool() if causal else True)
    values = functional.attention_kl(student, teacher, allowed, d.mask)
    common = math.gcd(*heads)

    def merged(scores: np.ndarray, b: int, i: int, keys: list[int]) -> np.ndarray:
        p = scipy.special.softmax(scores[b, :, i][:, keys], axis=1)
        return p.reshape(common, -1, len(keys)).mean(1)

    for b in range(d.batch):
        total, queries = 0.0, [i for i in range(d.tokens) if d.mask[b, i]]
        for i in queries:
            keys = [j for j in range(d.tokens) if d.mask[b, j] and (j <= i or not causal)]
            q, p = merged(student.numpy(), b, i, keys), merged(teacher.numpy(), b, i, keys)
            total += scipy.special.rel_entr(p, q).sum() / common
        assert values[b].item() == pytest.approx(total / max(len(queries), 1), abs=1e-9)


@checked
@given(d=draws(), groups=st.sampled_from([1, 2]))
def test_attention_output(d: Draw, groups: int) -> None:
    """As in numpy; padded values, NaN included, don't reach what real queries get."""
    scores, value = d.normal(d.batch, 2, d.tokens, d.tokens).double(), d.normal(d.batch, 2 // groups, d.tokens, 3)
    value = torch.where(d.mask[:, None, :, None], value.double(), math.nan)
    found = functional.attention_output(scores, value, d.allowed)
    for b in range(d.batch):
        keys = d.mask[b].nonzero().flatten().tolist()
        for i in keys:
            rows = [
                scipy.special.softmax(scores[b, h, i, keys].numpy()) @ value[b, h // groups, keys].numpy()
                for h in range(2)
            ]
            np.testing.assert_allclose(found[b, i].numpy(), np.concatenate(rows), atol=1e-9)


@checked
@given(d=draws())
def test_means(d: Draw) -> None:
    values = d.normal(d.batch, d.tokens).double()
    rows = [values[b][d.mask[b]] for b in range(d.batch) if d.mask[b].any()]
    wanted = torch.stack([row.mean() for row in rows]).mean() if rows else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(functional.masked_mean(values, d.mask), wanted)
    states = d.normal(d.batch, d.tokens, 3).double()
    means, firsts = functional.token_mean(states, d.mask), functional.first_token(states, d.mask)
    lasts = functional.last_token(states, d.mask)
    for b in range(d.batch):
        real = states[b][d.mask[b]]
        torch.testing.assert_close(means[b], real.mean(0) if len(real) else torch.zeros(3).double())
        torch.testing.assert_close(firsts[b], real[0] if len(real) else torch.zeros(3).double())
        torch.testing.assert_close(lasts[b], real[-1] if len(real) else torch.zeros(3).double())


@pytest.mark.parametrize("normal", [0.0, 1e-6, 1.0, 1e4])
def test_directions_of_vectors_of_any_length(normal: float) -> None:
    vector = torch.tensor([3.0, 4.0]) * normal
    torch.testing.assert_close(unit(vector), torch.tensor([0.6, 0.8]) * (normal > 0))


def test_zero_vectors_have_no_huge_gradient() -> None:
    """Dividing by the length of nothing would give gradients that half precision can't hold."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    teacher = torch.randn(1, 2, 4)
    for loss in (functional.hidden_cosine, lambda s, t, m: functional.cls_mse(s, t, m, normalize=True)):
        student = torch.zeros(1, 2, 4, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(student, teacher, mask).sum(), student)
        assert 0 < gradient.abs().max() < 10


@checked
@given(student=st.integers(1, 12), more=st.integers(0, 12), seed=st.integers(0, 99), step=st.integers(0, 10**6))
def test_random_mapping(student: int, more: int, seed: int, step: int) -> None:
    pairs = mappings.Random(seed).at(step)(student, student + more)
    drawn = [t for _, t in pairs]
    assert [s for s, _ in pairs] == list(range(1, student + 1))
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(range(1, student + more + 1))
    assert pairs == mappings.Random(seed).at(step)(student, student + more)


shares = st.floats(0, 1)
sizes = st.floats(0, 1e3)


@checked
@given(
    kind=st.sampled_from([schedules.Linear, schedules.Cosine]), start=sizes, end=sizes, span=st.tuples(shares, shares)
)
def test_ramps(kind: type[schedules.Linear], start: float, end: float, span: tuple[float, float]) -> None:
    begin, until = sorted(span)
    assume(begin < until and start + end > 0)
    ramp = kind(start, end, begin, until)
    weights = [ramp(i / 50) for i in range(51)]
    assert min(start, end) * (1 - 1e-12) <= min(weights) <= max(weights) <= max(start, end) * (1 + 1e-12)
    assert weights == sorted(weights, reverse=end < start) or start == pytest.approx(end)
    assert (ramp(begin), ramp(until)) == (start, end)


@checked
@given(weight=st.floats(1e-3, 1e3), span=st.tuples(shares, shares), progress=shares)
def test_window(weight: float, span: tuple[float, float], progress: float) -> None:
    begin, until = sorted(span)
    assume(begin < until)
    inside = begin <= progress < until or progress == until == 1
    assert schedules.Window(weight, begin, until)(progress) == (weight if inside else 0)


terms = st.lists(st.tuples(st.floats(1e-4, 1e4), st.floats(1e-3, 1e3)), min_size=1, max_size=5)


@checked
@given(terms=terms)
def test_balanced_weights_are_shares(terms: list[tuple[float, float]]) -> None:
    values = {str(i): torch.tensor(value) for i, (value, _) in enumerate(terms)}
    weights = {str(i): weight for i, (_, weight) in enumerate(terms)}
    factors = Balance().weights(values, weights, [])
    plain = sum(weights[n] * values[n].item() for n in values)
    whole = sum(weights.values())
    for name, value in values.items():
        assert (factors[name] * value).item() == pytest.approx(plain * weights[name] / whole, rel=1e-4)


@checked
@given(terms=terms)
def test_balanced_gradients_are_shares(terms: list[tuple[float, float]]) -> None:
    parameter = nn.Parameter(torch.ones(3))
    values = {str(i): value * parameter.sum() for i, (value, _) in enumerate(terms)}
    weights = {str(i): weight for i, (_, weight) in enumerate(terms)}
    balance = Balance(by="gradient")
    found = balance.gradient_shares(balance.weights(values, weights, [parameter]))
    for name, share in found.items():
        assert share.item() == pytest.approx(weights[name] / sum(weights.values()), rel=1e-4)


def test_balance_of_a_term_that_begins_at_zero() -> None:
    """Such as a memory bank's: it keeps its weight, the others share the whole, and it has its share at once."""
    balance = Balance(every=1)
    weights = {"a": 1.0, "b": 1.0, "bank": 2.0}
    values = {"a": torch.tensor(1.0), "b": torch.tensor(3.0), "bank": torch.tensor(0.0)}
    first = balance.weights(values, weights, [], step=0)
    assert [first[name].item() for name in weights] == pytest.approx([2.0, 2 / 3, 2.0])
    values["bank"] = torch.tensor(4.0)
    second = balance.weights(values, weights, [], step=1)
    assert (second["bank"] * 4).item() == pytest.approx(6.0)


def test_balance_survives_a_first_step_that_overflows() -> None:
    balance = Balance(every=1)
    weights = {"a": 1.0, "b": 1.0}
    first = balance.weights({"a": torch.tensor(math.inf), "b": torch.tensor(2.0)}, weights, [], step=0)
    assert first["a"] == 1
    second = balance.weights({"a": torch.tensor(6.0), "b": torch.tensor(2.0)}, weights, [], step=1)
    assert [second[name].item() for name in weights] == pytest.approx([4 / 6, 4 / 2])


def test_contrast_counts_the_examples_it_averages() -> None:
    objective = handmade.built(CASES["CLSContrast"], torch.float32)
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    student = handmade.activations([torch.randn(s) for s in handmade.shapes(2, 3, 2)], 2, mask)
    batch = {"row_id": torch.arange(3), "labels": torch.tensor([1, 0, -100])}
    assert objective.count(student, batch).number == 1
