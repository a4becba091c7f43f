"""Extreme activations: every term and its gradients stay finite, and near what float64 gives."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

import handmade
from table import CASES

Tensors = list[Tensor]
Made = tuple[Tensors, Tensors, Tensor]  # student, teacher, mask

NAMES = [name for name, case in CASES.items() if case.make().taps != ("loss",)]


def _random(examples: int = 3, tokens: int = 4) -> Made:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (
        [torch.randn(s, generator=generator) for s in handmade.shapes(depth, examples, tokens)]
        for depth in (handmade.STUDENT, handmade.TEACHER)
    )
    mask = torch.ones(examples, tokens, dtype=torch.bool)
    mask[-1, tokens // 2 + 1 :] = False
    return student, teacher, mask


def _changed(made: Made, change: Callable[[Tensor], Tensor], what: str, roles: str = "student and teacher") -> Made:
    """Change the hidden states, the attention (queries and keys) or the logits."""

    def concerns(x: Tensor) -> bool:
        return what in ("all", {2: "logits", 3: "hidden", 4: "attention"}[x.ndim])

    student, teacher, mask = made
    if "student" in roles:
        student = [change(x) if concerns(x) else x for x in student]
    if "teacher" in roles:
        teacher = [change(x) if concerns(x) else x for x in teacher]
    return student, teacher, mask


def _identical() -> Made:
    """Every layer of both models holds the same."""
    student, _, mask = _random()
    first = {x.shape: x for x in reversed(student)}
    shapes = handmade.shapes(handmade.TEACHER, 3, 4)
    return [first[x.shape] for x in student], [first[torch.Size(s)] for s in shapes], mask


def _padded(fill: float, first: bool) -> Made:
    student, teacher, mask = _random()
    row = 0 if first else 1
    mask[row] = False

    def spoil(x: Tensor) -> Tensor:
        return x.index_fill(0, torch.tensor([row]), fill)

    return _changed((student, teacher, mask), spoil, "all")


def _equal(x: Tensor) -> Tensor:
    """The same vector everywhere, of numbers whose mean rounds."""
    vector = torch.tensor([0.1, -3.3, 7.7, 0.01])[: x.shape[-1]]
    return vector.expand(x.shape).clone()


def _saturated(x: Tensor) -> Tensor:
    return 1e4 * x.sign()


SITUATIONS: dict[str, Callable[[], Made]] = {
    "plain": _random,
    "large scores": lambda: _changed(_random(), lambda x: 85 * x.sign(), "attention"),  # 0.7 * 2 * 85 * 85 = 1e4
    "large scores of the student": lambda: _changed(_random(), lambda x: 85 * x.sign(), "attention", "student"),
    "large scores of the teacher": lambda: _changed(_random(), lambda x: 85 * x.sign(), "attention", "teacher"),
    "small scores": lambda: _changed(_random(), lambda x: 0.1 * x, "attention"),
    "zeros": lambda: _changed(_random(), torch.zeros_like, "all"),
    "zeros of the student": lambda: _changed(_random(), torch.zeros_like, "all", "student"),
    "zeros of the teacher": lambda: _changed(_random(), torch.zeros_like, "all", "teacher"),
    "equal": lambda: _changed(_random(3, 7), _equal, "all"),
    "equal of the student": lambda: _changed(_random(3, 7), _equal, "all", "student"),
    "equal of the teacher": lambda: _changed(_random(3, 7), _equal, "all", "teacher"),
    "long vectors": lambda: _changed(_random(), lambda x: 1e4 * x, "hidden"),
    "short vectors": lambda: _changed(_random(), lambda x: 1e-6 * x, "hidden"),
    "far from zero": lambda: _changed(_random(), lambda x: 100 + x, "hidden"),
    "identical": _identical,
    "one token": lambda: _random(3, 1),
    "one example": lambda: _random(1, 4),
    "one token of one example": lambda: _random(1, 1),
    "a row of padding holds NaN": lambda: _padded(float("nan"), first=False),
    "a row of padding holds infinity": lambda: _padded(float("inf"), first=False),
    "the first row is padding": lambda: _padded(float("nan"), first=True),
    "nothing but padding": lambda: (*_random()[:2], torch.zeros(3, 4, dtype=torch.bool)),
    "large logits": lambda: _changed(_random(), _saturated, "logits"),
    "large logits of the student": lambda: _changed(_random(), _saturated, "logits", "student"),
    "large logits of the teacher": lambda: _changed(_random(), _saturated, "logits", "teacher"),
}


def term(name: str, made: Made, dtype: torch.dtype, compute: torch.dtype) -> tuple[Tensor, Tensors]:
    """The term of activations in one dtype, computed from another, and its gradients."""
    student, teacher, mask = made
    torch.manual_seed(3)  # the projections
    objective = handmade.built(CASES[name], torch.float64 if compute == torch.float64 else torch.float32)
    leaves = [x.to(dtype).to(compute).requires_grad_() for x in student]
    theirs = [x.to(dtype).to(compute) for x in teacher]
    half = compute in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", compute) if half else nullcontext():
        value = objective.loss(
            handmade.activations(leaves, handmade.STUDENT, mask),
            handmade.activations(theirs, handmade.TEACHER, mask),
            handmade.batch(len(mask)),
        )
    inputs = [*leaves, *objective.projections.parameters()]
    found = torch.autograd.grad(value, inputs, allow_unused=True)
    return value.detach(), [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_finite(name: str, situation: str) -> None:
    made = SITUATIONS[situation]()
    exact, wanted = term(name, made, torch.float32, torch.float64)
    assert all(torch.isfinite(w).all() for w in wanted)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        value, gradients = term(name, made, dtype, dtype)
        assert value.dtype == torch.float32
        assert torch.isfinite(value), dtype
        for gradient, w in zip(gradients, wanted, strict=True):
            fits = w.abs() < torch.finfo(dtype).max / 4
            assert torch.isfinite(gradient)[fits].all(), dtype
        if dtype == torch.float32:
            torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)
