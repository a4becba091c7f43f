"""The blockwise and Gram forms against the plain losses in float64, on the same inputs."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ildistil import functional, kernels
from ildistil.capture import Attention

MASKS = ["none", "right", "left", "holes", "an empty row"]


def inputs(
    heads: int = 3, queries: int = 9, keys: int = 9, sizes: tuple[int, int] = (4, 6), seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(queries, sizes[0]), (keys, sizes[0]), (queries, sizes[1]), (keys, sizes[1])]
    return [torch.randn(3, heads, *shape, generator=generator) * 1.5 for shape in shapes]


def mask(kind: str, tokens: int) -> Tensor:
    real = torch.ones(3, tokens, dtype=torch.bool)
    if kind == "right":
        real[1, -3:] = real[2, 1:] = False
    elif kind == "left":
        real[1, :4] = False
    elif kind == "holes":
        real[0, 2] = real[1, ::2] = False
    elif kind == "an empty row":
        real[1] = False
    return real


def expected(tensors: list[Tensor], rows: Tensor, columns: Tensor, causal: bool, window: int | None) -> Tensor:
    q_s, k_s, q_t, k_t = tensors
    record = Attention(q_s, k_s, k_s, 1.0, causal, window, key_mask=columns)
    return functional.attention_kl(q_s @ k_s.mT, q_t @ k_t.mT, record.allowed(), rows)


def gradients(values: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=values.dtype)
    return list(torch.autograd.grad((values * weights).sum(), tensors[:2]))


@pytest.mark.parametrize("block", [2, 20, 2**19])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, 3), (True, 4)])
@pytest.mark.parametrize("kind", MASKS)
def test_blocks_give_the_divergence_and_its_gradients(
    kind: str, causal: bool, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", block)
    tensors = [x.double().requires_grad_() for x in inputs()]
    real = mask(kind, 9)
    plain = expected(tensors, real, real, causal, window)
    blocks = kernels.attention_kl((tensors[0], tensors[1]), (tensors[2], tensors[3]), real, real, causal, window)
    torch.testing.assert_close(blocks, plain, rtol=1e-12, atol=1e-14)
    for mine, theirs in zip(gradients(blocks, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


def test_queries_and_keys_may_be_of_different_texts() -> None:
    tensors = [x.double().requires_grad_() for x in inputs(queries=5, keys=8)]
    rows, columns = mask("right", 5), mask("left", 8)
    plain = expected(tensors, rows, columns, False, None)
    blocks = kernels.attention_kl((tensors[0], tensors[1]), (tensors[2], tensors[3]), rows, columns)
    torch.testing.assert_close(blocks, plain, rtol=1e-12, atol=1e-14)


def test_gradcheck_and_no_second_derivative() -> None:
    tensors = [x.double().requires_grad_() for x in inputs(heads=2, queries=4, keys=4)]
    real = mask("right", 4)

    def values(q: Tensor, k: Tensor) -> Tensor:
        return kernels.attention_kl((q, k), (tensors[2], tensors[3]), real, real)

    assert gradcheck(values, (tensors[0], tensors[1]))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(values(tensors[0], tensors[1]).sum(), tensors[0], create_graph=True)


@pytest.mark.parametrize("length", [64, 300])
def test_float32_is_near_float64_on_the_same_inputs(length: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(heads=4, queries=length, keys=length, sizes=(32, 32))]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    real = torch.ones(3, length, dtype=torch.bool)
    found, wanted = (kernels.attention_kl((x[0] / 6, x[1]), (x[2] / 6, x[3]), real, real) for x in (tensors, exact))
    assert (found.double() / wanted - 1).abs().max() < 2e-6
    for mine, theirs in zip(gradients(found, tensors), gradients(wanted, exact), strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2e-5


def test_large_scores_stay_exact() -> None:
    """Scores of 1e4 with small differences: the greatest is taken off before anything is subtracted."""
    q, k, _, _ = inputs(sizes=(4, 4))
    k = k * 1e3
    tensors = [q, k, q + 1e-5, k]
    real = torch.ones(3, 9, dtype=torch.bool)
    found = kernels.attention_kl((q, k), (tensors[2], k), real, real)
    wanted = kernels.attention_kl(*(tuple(x.double() for x in pair) for pair in ((q, k), (tensors[2], k))), real, real)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)])
def test_grams_give_the_squared_error_and_its_gradients(kind: str, sizes: tuple[int, int]) -> None:
    tensors = [x.double().requires_grad_() for x in inputs(sizes=sizes)]
    real = mask(kind, 9)
    q_s, k_s, q_t, k_t = tensors
    plain = functional.attention_mse(q_s @ k_s.mT, q_t @ k_t.mT, real[:, None, None, :].expand(3, 1, 9, 9), real)
    grams = kernels.attention_mse((q_s, k_s), (q_t, k_t), real, real)
    torch.testing.assert_close(grams, plain, rtol=1e-12, atol=1e-13)
    for mine, theirs in zip(gradients(grams, tensors), gradients(plain, tensors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("rotated", [False, True])
def test_grams_do_not_cancel(distance: float, rotated: bool) -> None:
    """Also where equal scores come from other vectors: queries and keys turned by the same rotation."""
    q, k, dq, dk = inputs(sizes=(4, 4))
    turn = torch.linalg.qr(torch.randn(4, 4))[0] if rotated else torch.eye(4)
    student, teacher = (q + distance * dq, k + distance * dk), (q @ turn, k @ turn)
    real = mask("right", 9)
    found = kernels.attention_mse(student, teacher, real, real)
    wanted = kernels.attention_mse(*(tuple(x.double() for x in pair) for pair in (student, teacher)), real, real)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-13)
