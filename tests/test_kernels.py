"""The backends of the kernels against the plain losses in float64, on the same inputs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ildistil import kernels
from ildistil.errors import KernelError
from ildistil.kernels import Masks, Scores, blockwise, choice


@pytest.fixture(autouse=True)
def short_texts_too(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Small maps would be made whole: here they stand for large ones."""
    if "short" not in request.node.name:
        monkeypatch.setattr(choice, "_SHORT", 0)


PADDING = ["none", "right", "left", "holes", "an empty row"]
REACHES = [(False, None), (True, None), (False, 3), (True, 4)]
LOSSES = {"kl": kernels.attention_kl, "mse": kernels.attention_mse}


def mask(kind: str, tokens: int) -> Tensor | None:
    real = torch.ones(3, tokens, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "right":
        real[1, -3:] = real[2, 1:] = False
    elif kind == "left":
        real[1, :4] = False
    elif kind == "holes":
        real[0, 2] = real[1, ::2] = False
    elif kind == "an empty row":
        real[1] = False
    return real


def sides(
    heads: int = 4, queries: int = 9, keys: int = 9, sizes: tuple[int, int] = (4, 6),
    key_heads: tuple[int, int] = (4, 4), dtype: torch.dtype = torch.float64,
    biases: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None),
    softcaps: tuple[float | None, float | None] = (None, None), scales: tuple[float, float] = (0.6, 0.4),
) -> tuple[Scores, Scores]:  # fmt: skip
    """Student and teacher as captured: heads and tokens lie transposed; all of the student wants gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5).to(dtype)

    made = []
    for side in (0, 1):
        query = draw(3, queries, heads, sizes[side]).transpose(1, 2)
        key = draw(3, keys, key_heads[side], sizes[side]).transpose(1, 2)
        shape = biases[side]
        made.append(Scores(query, key, scales[side], None if shape is None else draw(*shape), softcaps[side]))
    return with_gradients(made[0]), made[1]


def with_gradients(student: Scores) -> Scores:
    return student._replace(
        query=student.query.detach().requires_grad_(),
        key=student.key.detach().requires_grad_(),
        bias=None if student.bias is None else student.bias.detach().requires_grad_(),
    )


def converted(parts: Scores, dtype: torch.dtype) -> Scores:
    return parts._replace(query=parts.query.detach().to(dtype), key=parts.key.detach().to(dtype))


def trained(student: Scores) -> list[Tensor]:
    return [x for x in (student.query, student.key, student.bias) if x is not None and x.requires_grad]


def evaluate(loss: str, backend: kernels.Backend, student: Scores, teacher: Scores, masks: Masks) -> list[Tensor]:
    """The values of a loss, and its gradients where examples have different weights."""
    with kernels.use(backend):
        values = LOSSES[loss](student, teacher, masks)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=values.dtype)
    return [values, *torch.autograd.grad((values * weights).sum(), trained(student))]


def check(loss: str, student: Scores, teacher: Scores, masks: Masks) -> None:
    found, wanted = (evaluate(loss, backend, student, teacher, masks) for backend in ("blockwise", "plain"))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-12, atol=1e-13)


@pytest.fixture(autouse=True)
def automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ILDISTIL_KERNELS", raising=False)
    with kernels.use("auto"):
        yield


@pytest.mark.parametrize("block", [2, 60, 2**19])
@pytest.mark.parametrize(("causal", "window"), REACHES)
@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("loss", LOSSES)
def test_masks(
    loss: str, kind: str, causal: bool, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_BLOCK", block)
    monkeypatch.setattr(blockwise, "_NARROW", 4)
    check(loss, *sides(), Masks(mask(kind, 9), mask(kind, 9), causal, window))


@pytest.mark.parametrize("loss", LOSSES)
def test_queries_and_keys_may_be_of_different_texts(loss: str) -> None:
    check(loss, *sides(queries=5, keys=8), Masks(mask("right", 5), mask("left", 8)))


@pytest.mark.parametrize("block", [30, 2**19])
@pytest.mark.parametrize("softcaps", [(None, None), (2.0, 3.0), (None, 3.0)])
@pytest.mark.parametrize("shape", [(3, 4, 9, 9), (1, 4, 9, 9), (3, 1, 1, 9), (1, 1, 9, 9), (9, 9)])
@pytest.mark.parametrize("loss", LOSSES)
def test_biases_and_softcaps(
    loss: str, shape: tuple[int, ...], softcaps: tuple[float, float], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained bias has its gradient too, added up over whatever shares it."""
    monkeypatch.setattr(blockwise, "_BLOCK", block)
    check(
        loss, *sides(biases=(shape, (1, 4, 9, 9)), softcaps=softcaps), Masks(mask("right", 9), mask("right", 9), True)
    )


def test_a_fixed_bias_gets_no_gradient() -> None:
    student, teacher = sides(biases=((1, 4, 9, 9), None))
    assert student.bias is not None
    student.bias.requires_grad_(False)
    values = kernels.attention_kl(student, teacher)
    wanted = torch.autograd.grad(kernels.attention_kl(student, teacher).sum(), student.query)
    with kernels.use("plain"):
        plain = kernels.attention_kl(student, teacher)
    torch.testing.assert_close(values, plain)
    torch.testing.assert_close(wanted, torch.autograd.grad(plain.sum(), student.query))


@pytest.mark.parametrize("block", [2, 8 * 81, 2**19])
@pytest.mark.parametrize("key_heads", [(6, 6), (1, 12), (12, 4), (6, 3)])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, 4)])
@pytest.mark.parametrize("loss", LOSSES)
def test_heads_may_share_keys(
    loss: str, causal: bool, window: int | None, sizes: tuple[int, int], key_heads: tuple[int, int], block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Heads that share a key are never cut apart, whatever fits into a block: 8 of 12 heads at groups of 4, say."""
    monkeypatch.setattr(blockwise, "_BLOCK", block)
    real = mask("left", 9)
    check(loss, *sides(heads=12, sizes=sizes, key_heads=key_heads), Masks(real, real, causal, window))


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 6)])
@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.6, 0.4)])
def test_grams_give_the_squared_error(kind: str, sizes: tuple[int, int], scales: tuple[float, float]) -> None:
    check("mse", *sides(sizes=sizes, scales=scales), Masks(mask(kind, 9), mask(kind, 9)))


@pytest.mark.parametrize("backend", ["blockwise", "plain"])
@pytest.mark.parametrize("kind", ["right", "left", "holes", "an empty row"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_stands_in_padding_is_never_seen(loss: str, causal: bool, kind: str, backend: kernels.Backend) -> None:
    student, teacher = sides()
    masks = Masks(mask(kind, 9), mask(kind, 9), causal)
    wanted = evaluate(loss, backend, student, teacher, masks)
    assert masks.query_mask is not None
    padding = ~masks.query_mask[:, None, :, None]
    with torch.no_grad():
        for tensor in (student.query, student.key, teacher.query, teacher.key):
            tensor.masked_fill_(padding, float("nan"))
    for mine, theirs in zip(evaluate(loss, backend, student, teacher, masks), wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("more", [{}, {"softcaps": (2.0, None), "biases": ((1, 2, 4, 4), None)}])
def test_gradcheck_and_no_second_derivative(loss: str, more: dict[str, object]) -> None:
    student, teacher = sides(heads=2, queries=4, keys=4, key_heads=(1, 2), **more)  # type: ignore[arg-type]
    real = mask("right", 4)

    def values(*tensors: Tensor) -> Tensor:
        query, key, *bias = tensors
        return LOSSES[loss](student._replace(query=query, key=key, bias=bias[0] if bias else None), teacher, masks)

    masks = Masks(real, real)
    assert gradcheck(values, tuple(x.detach().requires_grad_() for x in trained(student)))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(values(*trained(student)).sum(), student.query, create_graph=True)


@pytest.mark.parametrize("length", [64, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_float32_is_near_float64_on_the_same_inputs(length: int, causal: bool) -> None:
    student, teacher = sides(queries=length, keys=length, sizes=(32, 32), dtype=torch.float32, scales=(1 / 6, 1 / 6))
    exact = with_gradients(converted(student, torch.float64)), converted(teacher, torch.float64)
    masks = Masks(causal=causal)
    found, wanted = evaluate("kl", "auto", student, teacher, masks), evaluate("kl", "plain", *exact, masks)
    assert (wanted[0] > 1e-2).all()
    assert (found[0].double() / wanted[0] - 1).abs().max() < 2e-6
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_widened(loss: str, dtype: torch.dtype) -> None:
    student, teacher = sides(dtype=dtype)
    wide = with_gradients(converted(student, torch.float32)), converted(teacher, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = evaluate(loss, "auto", student, teacher, Masks(causal=True))
    wanted = evaluate(loss, "auto", *wide, Masks(causal=True))
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0], wanted[0])
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(mine, theirs.to(dtype))


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("bias", [None, 1e4])
def test_large_scores_stay_exact(scale: float, bias: float | None) -> None:
    """Large in both models, or in one: the greatest is taken off before anything is subtracted."""
    student, teacher = sides(sizes=(4, 4), dtype=torch.float32, scales=(scale, scale))
    query = student.query.detach()
    teacher = Scores(
        query + 1e-5, student.key.detach(), scale, None if bias is None else torch.full((1, 1, 9, 9), bias)
    )
    found = kernels.attention_kl(student, teacher)
    with kernels.use("plain"):
        wanted = kernels.attention_kl(converted(student, torch.float64), converted(teacher, torch.float64))
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=1e-6)


def test_blocks_of_a_validation_serve_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers validate in inference mode, whose tensors can't be written to outside it; later blocks are larger."""
    monkeypatch.setattr(blockwise, "_buffers", blockwise._Buffers())
    short, long = sides(queries=5, keys=5), sides()
    with torch.inference_mode(), kernels.use("blockwise"):
        kernels.attention_kl(*short)
    for student, teacher in (short, long, short):
        check("kl", student, teacher, Masks())


@pytest.mark.parametrize("shift", [0.0, 3.0, -12.0])
def test_what_is_common_to_a_row_cancels(shift: float) -> None:
    """A divergence of 2e-3 where the teacher's scores are shifted: it must not be a sum of shifts less another."""
    student, other = sides(queries=300, keys=300, sizes=(4, 4), dtype=torch.float32, scales=(0.1, 0.1))
    query, key = (x.detach() + 0.1 * y for x, y in zip(student[:2], other[:2], strict=True))
    near = Scores(query, key, 0.1, torch.full((1, 1, 1, 1), shift))
    found = kernels.attention_kl(student, near)
    with kernels.use("plain"):
        wanted = kernels.attention_kl(converted(student, torch.float64), converted(near, torch.float64))
    torch.testing.assert_close(found.double(), wanted, rtol=3e-5, atol=0)


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("rotated", [False, True])
def test_grams_do_not_cancel(distance: float, rotated: bool) -> None:
    """Also where equal scores come from other vectors: queries and keys turned by the same rotation."""
    student, other = sides(sizes=(4, 4), dtype=torch.float32, scales=(1.0, 1.0))
    q, k, dq, dk = (x.detach() for x in (student.query, student.key, other.query, other.key))
    turn = torch.linalg.qr(torch.randn(4, 4))[0] if rotated else torch.eye(4)
    pair = (
        Scores((q + distance * dq).requires_grad_(), (k + distance * dk).requires_grad_()),
        Scores(q @ turn, k @ turn),
    )
    exact = with_gradients(converted(pair[0], torch.float64)), converted(pair[1], torch.float64)
    masks = Masks(mask("right", 9), mask("right", 9))
    found, wanted = evaluate("mse", "auto", *pair, masks), evaluate("mse", "plain", *exact, masks)
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=1e-13)
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("loss", "causal"), [("kl", False), ("kl", True), ("mse", False), ("mse", True)])
def test_nothing_of_all_queries_by_all_keys_is_kept(loss: str, causal: bool, biased: bool) -> None:
    tokens, kept = 300, []
    shape = (1, 1, tokens, tokens) if biased else None
    student, teacher = sides(queries=tokens, keys=tokens, dtype=torch.float32, biases=(shape, None))

    def note(tensor: Tensor) -> Tensor:
        if student.bias is None or tensor.untyped_storage().data_ptr() != student.bias.untyped_storage().data_ptr():
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        LOSSES[loss](student, teacher, Masks(causal=causal)).sum()
    vectors = sum(x.numel() for x in (student.query, student.key, teacher.query, teacher.key))
    assert sum(kept) <= vectors + 10_000


def test_the_backend_is_chosen_by_device_and_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    student, _ = sides()
    assert choice.choose_backend(student) == "blockwise"
    monkeypatch.setenv("ILDISTIL_KERNELS", "plain")
    with kernels.use("blockwise"):
        assert choice.choose_backend(student) == "blockwise"
        kernels.use("plain")
        assert choice.choose_backend(student) == "plain"
    on_gpu, small = (
        Scores(torch.empty(8, 12, tokens, 32, device="meta"), torch.empty(8, 12, tokens, 32, device="meta"))
        for tokens in (4096, 64)
    )
    with kernels.use("auto"):
        assert [choice.choose_backend(x) for x in (on_gpu, small)] == ["blockwise", "plain"]
        assert choice.choose_backend(small, linear=True) == "blockwise"


@pytest.mark.parametrize("distance", [1.0, 1e-4])
def test_short_texts_are_compared_by_whole_maps_as_exactly(distance: float) -> None:
    student, other = sides(sizes=(4, 4), dtype=torch.float32, scales=(1.0, 1.0))
    assert choice.choose_backend(student) == "plain"
    long = Scores(torch.empty(1, 12, 64, 32), torch.empty(1, 12, 64, 32))
    many = Scores(torch.empty(4096, 12, 16, 32), torch.empty(4096, 12, 16, 32))
    assert [choice.choose_backend(x) for x in (long, many)] == ["blockwise", "blockwise"]
    query, key = (y.detach() + distance * x.detach() for x, y in zip(student[:2], other[:2], strict=True))
    teacher = Scores(query, key)
    student = with_gradients(other)
    exact = with_gradients(converted(student, torch.float64)), converted(teacher, torch.float64)
    found, wanted = evaluate("mse", "auto", student, teacher, Masks()), evaluate("mse", "plain", *exact, Masks())
    assert found[0].dtype == torch.float32
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine.double() - theirs).norm() / theirs.norm() < 1e-5


def test_backends_that_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = sides(dtype=torch.float32)
    with pytest.raises(KernelError, match=r"kernels.use: got 'fast'; choose one of 'auto', 'triton'"):
        kernels.use("fast")  # type: ignore[arg-type]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "Triton kernels run on CUDA, the tensors are on cpu" if find_spec("triton") else "Triton isn't installed"
    with kernels.use("triton"), pytest.raises(KernelError, match=reason):
        kernels.attention_kl(student, teacher)


def test_the_environment_names_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_told", None)
    student, _ = sides()
    monkeypatch.setenv("ILDISTIL_KERNELS", "plain")
    assert choice.choose_backend(student) == "plain"
    monkeypatch.setenv("ILDISTIL_KERNELS", "fast")
    with pytest.raises(KernelError, match="ILDISTIL_KERNELS: got 'fast'"):
        choice.choose_backend(student)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton isn't installed; its interpreter runs the GPU kernels")
@pytest.mark.parametrize("part", ["interpreted", "compiled"])
def test_triton(part: str) -> None:
    """In a process of its own: the interpreter must be asked for before the first import."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if part == "interpreted" else "0"}
    cases = Path(__file__).parent / "triton_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:xdist", str(cases), "-k", part]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=cases.parent.parent
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
