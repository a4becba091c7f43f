"""One step without a trace, to find out whether every term is finite and what it reaches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ildistil.capture.trial import same_state
from ildistil.errors import ObjectiveError


@dataclass(frozen=True)
class TermCheck:
    """What a dry run found of one term: its value and the norm of its gradient."""

    value: float
    gradient: float


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        terms: value and gradient of each.
        unreached: the parameters that no term reaches.
        next_token: whether the student's logits at a position predict the token after it; ``None`` if it isn't known.
    """

    terms: dict[str, TermCheck]
    unreached: list[nn.Parameter] = field(repr=False, default_factory=list)
    next_token: bool | None = None


@contextmanager
def without_trace(module: nn.Module) -> Iterator[None]:
    """Run something and put random state, buffers and training modes back."""
    # transformers notes the problem type that labels suggest in the config: ours must not decide it.
    configs = [m.config for m in module.modules() if isinstance(m, PreTrainedModel)]
    problem_types = [getattr(config, "problem_type", None) for config in configs]
    buffers = [(b, b.clone()) for b in module.buffers()]
    with same_state(module):
        try:
            yield
        finally:
            for config, problem_type in zip(configs, problem_types, strict=True):
                config.problem_type = problem_type
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def check_terms(values: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> tuple[DryRun, dict[str, set[int]]]:
    """Differentiate each term, and check that it and its gradient are finite.

    Return what was found, and the ids of the parameters that each term reaches.
    """
    checks: dict[str, TermCheck] = {}
    reach: dict[str, set[int]] = {}
    for name, value in values.items():
        gradients = _gradients(name, value, parameters)
        checks[name] = TermCheck(value.item(), _norm(gradients))
        reach[name] = {id(p) for p, g in zip(parameters, gradients, strict=True) if g is not None}
        _check_term(name, checks[name])
    reached = set().union(*reach.values())
    return DryRun(checks, [p for p in parameters if id(p) not in reached]), reach


def look_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether the norms of some tensors are finite, as a boolean scalar: nothing waits for the device.

    Where they are, so are all numbers. Where they aren't, numbers may be no more than large: see :func:`all_finite`.
    """
    # One kernel for all tensors, and at the speed of memory on CPU, where looking at each number takes ten times as
    # long. Norms times 0 are 0 or NaN, in any dtype, and so can be summed.
    filled = [tensor.detach() for tensor in tensors if tensor.numel()]
    norms = torch._foreach_norm(filled) if filled else [torch.zeros(())]
    zeros = torch._foreach_mul(norms, 0.0)
    return torch.stack([zero.to(zeros[0]) for zero in zeros]).sum().isfinite()


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Return whether all numbers of some tensors are finite, as a boolean scalar.

    >>> bool(all_finite([torch.ones(2), torch.tensor([0.0, 3e38])]))
    True
    """
    found = [tensor.isfinite().all() for tensor in tensors]
    return torch.stack([each.to(found[0].device) for each in found]).all() if found else torch.tensor(True)


def spoilt_terms(values: Mapping[str, Tensor], parameters: list[nn.Parameter]) -> list[str]:
    """Return the names of the terms that aren't finite, or whose gradient by itself isn't."""
    spoilt = []
    for name, value in values.items():
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        if not all_finite([value, *(gradient for gradient in gradients if gradient is not None)]):
            spoilt.append(name)
    return spoilt


def _gradients(name: str, value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    if not value.requires_grad:
        raise ObjectiveError(f"The term {name} reaches no trainable parameter. Is the student frozen?")
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise ObjectiveError(f"The term {name} reaches no trainable parameter. Is what it trains frozen?")
    return list(gradients)


def _norm(gradients: list[Tensor | None]) -> float:
    norms = [g.detach().float().norm() for g in gradients if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _check_term(name: str, check: TermCheck) -> None:
    for what, number in (("value", check.value), ("gradient", check.gradient)):
        if not number < float("inf"):
            raise ObjectiveError(
                f"The {what} of the term {name} is {number} in the dry run. Look for NaN in the models' weights, for "
                "an unfit precision, or for a loss that divides by zero."
            )
