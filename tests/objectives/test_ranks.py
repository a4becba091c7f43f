"""Terms over the batches of several processes: each process has the value of the whole, and with gradients that are
averaged as data-parallel training does, the gradient of the whole. Processes are threads here, in lockstep."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import handmade
from ildistil import Balance, distributed
from table import CASES

COUPLED = [name for name, case in CASES.items() if case.make().batch_coupled]


class Lockstep:
    """What ildistil.distributed needs of torch.distributed, among threads."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.here = size, threading.Barrier(size, timeout=20), threading.local()
        self.shared: list[Tensor] = [torch.empty(0)] * size

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_world_size(self) -> int:
        return self.size

    def get_rank(self) -> int:
        return self.here.rank

    def exchanged(self, tensor: Tensor) -> list[Tensor]:
        self.shared[self.get_rank()] = tensor.clone()
        self.barrier.wait()
        everyone = [x.clone() for x in self.shared]
        self.barrier.wait()
        assert len({(x.shape, x.dtype) for x in everyone}) == 1, "collectives need equal shapes"
        return everyone

    def all_reduce(self, tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        everyone = torch.stack(self.exchanged(tensor))
        tensor.copy_(everyone.amax(0) if op == torch.distributed.ReduceOp.MAX else everyone.sum(0))

    def all_gather(self, parts: list[Tensor], tensor: Tensor) -> None:
        for part, theirs in zip(parts, self.exchanged(tensor), strict=True):
            part.copy_(theirs)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def started(rank: int) -> Any:
            self.here.rank = rank
            return work(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(started, range(self.size)))


def _part(tensors: list[Tensor], rows: slice, tokens: int) -> list[Tensor]:
    """Some examples, cut to fewer tokens."""
    cut = []
    for x in tensors:
        x = x[rows]
        cut.append({2: lambda x: x, 3: lambda x: x[:, :tokens], 4: lambda x: x[:, :, :tokens]}[x.ndim](x))
    return cut


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("padded", [False, True], ids=["", "one process has padding only"])
def test_gradients_are_those_of_the_whole_batch(name: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 has three examples of up to five tokens, process 1 two of up to four."""
    objective = handmade.built(CASES[name], torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]).bool()
    mask[3:] &= not padded
    student, teacher = (
        [torch.randn(s, dtype=torch.float64) for s in handmade.shapes(depth, 5, 5)]
        for depth in (handmade.STUDENT, handmade.TEACHER)
    )
    learned = list(objective.projections.parameters())

    def term(rows: slice, tokens: int) -> tuple[Tensor, list[Tensor]]:
        leaves = [x.requires_grad_() for x in student]
        value = objective.loss(
            handmade.activations(_part(leaves, rows, tokens), handmade.STUDENT, mask[rows, :tokens]),
            handmade.activations(_part(teacher, rows, tokens), handmade.TEACHER, mask[rows, :tokens]),
            {},
        )
        found = torch.autograd.grad(value, [*leaves, *learned], allow_unused=True)
        return value.detach(), [torch.zeros(1) if g is None else g for g in found]

    value, gradients = term(slice(0, 5), 5)
    lockstep = Lockstep(2)
    monkeypatch.setattr(distributed, "dist", lockstep)
    both = lockstep.run(lambda rank: term(slice(0, 3), 5) if rank == 0 else term(slice(3, 5), 4))
    for theirs, _ in both:
        torch.testing.assert_close(theirs, value)
    for i, whole in enumerate(gradients):
        torch.testing.assert_close((both[0][1][i] + both[1][1][i]) / 2, whole, rtol=1e-9, atol=1e-12)
    assert sum(g.abs().sum() for g in gradients) > 0


def test_all_processes_balance_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    lockstep = Lockstep(2)
    monkeypatch.setattr(distributed, "dist", lockstep)
    parameters = [nn.Parameter(torch.ones(1))]

    def factors(rank: int) -> dict[str, Tensor]:
        values = {"a": torch.tensor(1.0 + rank), "b": torch.tensor(4.0)}
        return Balance().weights(values, {"a": 1.0, "b": 1.0}, parameters)

    first, second = lockstep.run(factors)
    assert first == second
    assert (first["a"] * 1.5).item() == pytest.approx((first["b"] * 4).item())
