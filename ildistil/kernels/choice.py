"""Which backend runs a kernel: by device and size, or as told."""

import functools
import os
from importlib.util import find_spec
from types import TracebackType
from typing import Literal, cast, get_args

import torch

from ildistil.attention import Scores
from ildistil.errors import KernelError

Backend = Literal["auto", "triton", "blockwise", "plain"]

# Scores of a layer from which on blocks are taken on a device that has no kernel of its own: 1 GiB in float32, of which
# a plain loss keeps several.
_LARGE = 2**28
# Scores of an example up to which whole maps are faster on a CPU, where blocks go from example to example: about 50
# tokens at 12 heads. And scores of a layer up to which they may be kept: 16 MiB in float32.
_SHORT, _SMALL = 2**15, 2**22
_told: Backend | None = None


class use:  # noqa: N801
    """Run the kernels on one backend from now on, or within a ``with`` block.

    ``"auto"``: Triton kernels on CUDA where Triton is installed; blocks in plain torch on a CPU, but whole score maps
    where texts are short; elsewhere whole maps, or blocks where the maps would be large. ``"triton"``: where it has no
    kernel, blocks. ``"blockwise"`` and ``"plain"``: always blocks, always whole maps, in plain torch. What has one
    backend only (:func:`~ildistil.kernels.attention_dist`, :func:`~ildistil.kernels.attention_output`, numbers of heads
    that differ) makes whole maps in any case. The environment variable ``ILDISTIL_KERNELS`` sets the backend of a whole
    run.

    Args:
        backend: ``"auto"``, ``"triton"``, ``"blockwise"`` or ``"plain"``.

    Raises:
        KernelError: there is no such backend.

    >>> with use("plain"):
    ...     pass
    """

    def __init__(self, backend: Backend) -> None:
        global _told
        self.before = _told
        _told = _known(backend, "kernels.use")

    def __enter__(self) -> None:
        """Enter the block; the backend is set already."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Restore the backend that was set before."""
        global _told
        _told = self.before


def choose_backend(student: Scores, has_triton_kernel: bool = False, linear: bool = False) -> Backend:
    """Choose the backend for these scores, any but ``"auto"``.

    Where a loss without maps is ``linear`` in the number of tokens, no device wants maps.
    """
    backend = _told or _known(os.environ.get("ILDISTIL_KERNELS") or "auto", "ILDISTIL_KERNELS")
    device = student.query.device.type
    if backend == "triton":
        _check_triton(device)
        return "triton" if has_triton_kernel else "blockwise"
    if backend != "auto":
        return backend
    if device == "cuda" and has_triton_kernel and _installed():
        return "triton"
    batch, heads, queries, _ = student.query.shape
    if device == "cpu":
        return "plain" if is_short(student) else "blockwise"
    large = batch * heads * queries * student.key.shape[2] >= _LARGE
    return "blockwise" if linear or large else "plain"


def refuse_second_derivative(loss: str) -> None:
    """Refuse to differentiate the gradient of a loss: for the backward pass of one that computes it by itself."""
    if torch.is_grad_enabled():
        raise KernelError(f"{loss} has no second derivative. Use kernels.use('plain') around the step.")


def is_short(student: Scores) -> bool:
    """Return whether texts are so short that a CPU is fastest with whole maps, which are small."""
    batch, heads, queries, _ = student.query.shape
    scores = heads * queries * student.key.shape[2]
    return scores <= _SHORT and batch * scores <= _SMALL


def triton_suits(student: Scores, teacher: Scores) -> bool:
    """Return whether the Triton kernels take these scores: no float64, no gradient of a bias, heads of at most 256."""
    trained_bias = student.bias is not None and student.bias.requires_grad
    sizes = student.query.shape[-1], teacher.query.shape[-1]
    return student.query.dtype != torch.float64 and not trained_bias and max(sizes) <= 256


@functools.cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _known(backend: str, where: str) -> Backend:
    if backend not in get_args(Backend):
        raise KernelError(f"{where}: got {backend!r}; choose one of {', '.join(map(repr, get_args(Backend)))}.")
    return cast(Backend, backend)


def _check_triton(device: str) -> None:
    if not _installed():
        raise KernelError("kernels.use('triton'): Triton isn't installed. Use 'auto', or pip install triton.")
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(
            f"kernels.use('triton'): Triton kernels run on CUDA, the tensors are on {device}. Use 'auto', or set "
            "TRITON_INTERPRET=1 before the first import to run them in Triton's slow interpreter."
        )
