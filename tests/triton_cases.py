"""The Triton kernels: run in Triton's interpreter, and compiled for GPUs that need not be there; see test_kernels."""

import pytest
import torch
from test_kernels import PADDING, REACHES, evaluate, mask, sides

from ildistil import kernels
from ildistil.kernels import Masks


def check(masks: Masks, rtol: float = 1e-5, **more: object) -> None:
    student, teacher = sides(dtype=torch.float32, **more)  # type: ignore[arg-type]
    if student.bias is not None:
        student.bias.requires_grad_(False)
    found, wanted = (evaluate("kl", backend, student, teacher, masks) for backend in ("triton", "plain"))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-6)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from ildistil.kernels import triton_kl

    monkeypatch.setattr(triton_kl, "_TILES", {256: (16, 1)})


@pytest.mark.parametrize("kind", PADDING)
@pytest.mark.parametrize(("causal", "window"), REACHES)
def test_interpreted_masks(kind: str, causal: bool, window: int | None) -> None:
    check(Masks(mask(kind, 18), mask(kind, 18), causal, window), queries=18, keys=18, heads=1, key_heads=(1, 1))


@pytest.mark.parametrize(
    "more",
    [
        {"sizes": (20, 6)},
        {"key_heads": (2, 1)},
        {"softcaps": (2.0, 3.0)},
        {"biases": ((1, 2, 18, 18), (3, 1, 1, 18))},
        {"sizes": (6, 20), "key_heads": (1, 2), "softcaps": (2.0, None), "biases": ((1, 2, 18, 18), None)},
    ],
)
def test_interpreted_parts(more: dict[str, object]) -> None:
    """Heads of other sizes, shared keys, softcaps and biases, under masks of every kind."""
    masks = Masks(mask("right", 18), mask("right", 18), True, 12)
    check(masks, **{"queries": 18, "keys": 18, "heads": 2, "key_heads": (2, 2), **more})


def test_interpreted_queries_and_keys_of_different_texts() -> None:
    check(Masks(mask("right", 9), mask("left", 34)), queries=9, keys=34, heads=1, key_heads=(1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpreted_half_precision(dtype: torch.dtype) -> None:
    student, teacher = sides(dtype=dtype, heads=1, key_heads=(1, 1))
    found, wanted = (evaluate("kl", backend, student, teacher, Masks()) for backend in ("triton", "blockwise"))
    torch.testing.assert_close(found[0], wanted[0])
    for mine, theirs in zip(found[1:], wanted[1:], strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs)


def test_interpreted_padding_may_hold_anything() -> None:
    student, teacher = sides(queries=18, keys=18, heads=1, key_heads=(1, 1), dtype=torch.float32)
    masks = Masks(mask("holes", 18), mask("holes", 18))
    wanted = evaluate("kl", "triton", student, teacher, masks)
    assert masks.query_mask is not None
    with torch.no_grad():
        for tensor in (student.query, student.key, teacher.query, teacher.key):
            tensor.masked_fill_(~masks.query_mask[:, None, :, None], float("nan"))
    for mine, theirs in zip(evaluate("kl", "triton", student, teacher, masks), wanted, strict=True):
        assert torch.equal(mine, theirs)


def test_interpreted_large_scores_and_no_second_derivative() -> None:
    student, teacher = sides(queries=18, keys=18, heads=1, key_heads=(1, 1), dtype=torch.float32, scales=(0.5, 400.0))
    found, wanted = (evaluate("kl", backend, student, teacher, Masks()) for backend in ("triton", "blockwise"))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with kernels.use("triton"), pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(kernels.attention_kl(student, teacher).sum(), student.query, create_graph=True)


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every branch of the kernels is code that Triton's compiler and the assembler take, into the memory of a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ildistil.kernels import triton_kl

    monkeypatch.setattr(triton_kl, "_TILES", {128: (32, 1)})
    student, teacher = sides(dtype=torch.bfloat16, sizes=(64, 80), key_heads=(2, 4), softcaps=(30.0, 30.0))
    masks = Masks(mask("right", 9), mask("right", 9), True, 4)
    _, arguments = triton_kl._arguments(student._replace(bias=torch.zeros(1, 4, 9, 9)), teacher, masks)
    rows, weights = torch.zeros(5, 3, 4, 9), torch.zeros(3)
    arguments |= {"rows": rows, "row_count": rows[0].numel(), "weights": weights, "out": student.query}
    arguments |= triton_kl._strides("out", student.query)
    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int8: "*i8", int: "i32", float: "fp32"}
    for kernel in (triton_kl._row_kernel, triton_kl._query_kernel, triton_kl._key_kernel):
        constants = {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr or arguments[p.name] is None}
        signature = {
            p.name: "constexpr"
            if p.name in constants
            else types[getattr(arguments[p.name], "dtype", type(arguments[p.name]))]
            for p in kernel.params
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_stages": 1})
        assert compiled.metadata.shared <= 96 * 1024
