"""How often a training step waits for the device: at most once, and not for every term."""

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import ildistil
import tiny
from ildistil import Distillation, Distiller, kernels, objectives
from ildistil.capture import checks
from ildistil.stages import Step
from ildistil.training import Throughput
from table import CASES
from test_distiller import every_kind, loader, pair, trainer

# Operations whose result, or its shape, the host has to know: on a GPU they wait for all that was asked of it before.
WAITING = {"_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero", "unique_dim"}
OURS, MODELS = Path(ildistil.__file__).parent, Path(transformers.__file__).parent
# The bank of CLSContrast keeps rows by their ids.
LOOKING = ["CLSContrast", "CLSContrast-nce"]


def is_model(frame: traceback.FrameSummary) -> bool:
    return MODELS in Path(frame.filename).parents


class Waits(TorchDispatchMode):
    """Notes where the package waits; the models' own looks at their masks are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITING or by_mask:
            frames = [f for f in traceback.extract_stack() if OURS in Path(f.filename).parents or is_model(f)]
            if frames and not is_model(frames[-1]):
                self.found.append(f"{name} in {frames[-1].filename}, line {frames[-1].lineno}")
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave out what looks at its results on CPUs only: blocks, and masks in every run."""
    monkeypatch.setattr(checks, "reads_at_once", lambda device: False)
    with kernels.use("plain"):
        yield


class Steps(L.Callback):
    """Counts within each training step."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self._now: Waits | None = None

    def on_train_batch_start(self, *args: Any) -> None:
        self._now = Waits()
        self._now.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        assert self._now is not None
        self._now.__exit__(None, None, None)
        self.counts.append(len(self._now.found))


def test_what_waits_is_seen() -> None:
    with Waits() as waits:
        ok = torch.ones(3)
        ok.sum().item()
    assert waits.found == []  # not ours
    term = objectives.CLSContrast(negatives=2, size=8)
    engine = Distillation(*pair(), [term])
    engine(tiny.batch(), Step(0))
    with Waits() as waits:
        engine(tiny.batch(), Step(1))
    assert waits.found


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOOKING])
def test_no_term_waits(name: str) -> None:
    engine = Distillation(*pair(), [CASES[name].make()])
    engine(tiny.batch(), Step(0))  # the first step checks the masks
    with Waits() as waits:
        terms = engine(tiny.batch(), Step(1))
        terms.total.backward()
        terms.logs("train")
    assert waits.found == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [1, 1, 1, 1]), ({"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}, [0, 1, 0, 1])],
)
def test_a_step_looks_at_its_losses_once(options: dict[str, Any], expected: list[int]) -> None:
    steps = Steps()
    trainer(*every_kind(), Throughput(), steps, max_epochs=2, **options).fit(Distiller(*pair()), loader())
    assert steps.counts[4:] == expected
