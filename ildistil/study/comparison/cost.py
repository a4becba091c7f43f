"""Internal: what models cost to run: size, memory, and times, taken in turns."""

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import cached_file

from ildistil.capture.inputs import model_inputs
from ildistil.study.comparison.content import Cost, Speed
from ildistil.study.comparison.outputs import Outputs, Reading

__all__ = ["SIZES", "bytes_on_disk", "costs", "joined", "peak_memory", "speeds", "timed"]

T = TypeVar("T")

#: Batch sizes that are timed.
SIZES = (1, 32)
_WARM_UP, _FEWEST, _MOST = 3, 20, 500

Inputs = Mapping[str, Any]


def costs(models: Sequence[Reading], said: Sequence[Outputs], device: torch.device, seconds: float) -> list[Cost]:
    """Return what each model costs; times only if there are seconds to take them.

    Args:
        models: The teacher first; they are on the device.
        said: What each said, with the inputs of some rows.
        device: Where they run.
        seconds: To time them for, with each batch size.
    """
    batches = [_batches(model, each, device) for model, each in zip(models, said, strict=True)]
    timed: list[list[Speed]] = []
    with torch.inference_mode():
        for size in SIZES if seconds else ():
            runs = [partial(_run, model.model, each[size]) for model, each in zip(models, batches, strict=True)]
            timed.append(speeds(runs, size, seconds, device))
    return [
        Cost(
            parameters=model.info.parameters,
            bytes_on_disk=bytes_on_disk(model.path),
            peak_memory=peak_memory(model.model, each[SIZES[-1]][0]),
            speeds=tuple(of_size[number] for of_size in timed),
        )
        for number, (model, each) in enumerate(zip(models, batches, strict=True))
    ]


def _batches(model: Reading, said: Outputs, device: torch.device) -> dict[int, list[dict[str, Any]]]:
    """Return batches of each size; rows repeat where they are fewer than a batch."""
    padding = getattr(model.model.config.get_text_config(), "pad_token_id", None) or 0
    found = {}
    for size in SIZES:
        rows = said.sample * -(-size // len(said.sample))
        groups = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
        inputs = [{name: value.to(device) for name, value in joined(group, padding).items()} for group in groups]
        found[size] = [model_inputs(model.model, each) for each in inputs]
    return found


def _run(model: nn.Module, batches: Sequence[Inputs], number: int) -> None:
    model(**batches[number % len(batches)])


def speeds(
    runs: Sequence[Callable[[int], object]], batch_size: int, seconds: float, device: torch.device
) -> list[Speed]:
    """Time models in turns, so that what else the machine does meets all of them.

    Each round runs every model on the same rows, beginning with another one. There are at least 20 rounds, and at most
    500.

    Args:
        runs: Of each model, the teacher first: runs the batch of a round's number.
        batch_size: Rows of a batch.
        seconds: To spend, about.
        device: Where they run.

    Returns:
        The speed of each.
    """
    for number in range(_WARM_UP):
        for run in runs:
            timed(partial(run, number), device)
    times: list[list[float]] = [[] for _ in runs]
    started, rounds = time.perf_counter(), 0
    while rounds < _FEWEST or (rounds < _MOST and time.perf_counter() - started < seconds):
        for turn in range(len(runs)):
            model = (turn + rounds) % len(runs)
            times[model].append(timed(partial(runs[model], rounds), device)[1])
        rounds += 1
    taken = np.array(times)
    middle, high = np.quantile(taken, [0.5, 0.95], axis=1)
    faster = np.median(taken[0] / taken, axis=1)
    rate = batch_size * rounds / taken.sum(1)
    columns = zip(middle.tolist(), high.tolist(), rate.tolist(), faster.tolist(), strict=True)
    return [Speed(batch_size, rounds, *column) for column in columns]


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Return what a call returns, and the seconds that it takes on a device."""
    _wait(device)
    started = time.perf_counter()
    found = run()
    _wait(device)
    return found, time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def joined(rows: Sequence[Inputs], padding: int) -> dict[str, Tensor]:
    """Return single rows as one batch, filled up on the right to the longest.

    Args:
        rows: Inputs of shape ``(1, ...)``.
        padding: The token id of padding.

    >>> short, long = {"input_ids": torch.tensor([[5]])}, {"input_ids": torch.tensor([[6, 7]])}
    >>> joined([short, long], padding=0)["input_ids"].tolist()
    [[5, 0], [6, 7]]
    """
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].ndim == 2:
            width, fill = max(v.shape[1] for v in values), padding if name == "input_ids" else 0
            values = [nn.functional.pad(v, (0, width - v.shape[1]), value=fill) for v in values]
        batch[name] = torch.cat(values)
    return batch


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators returned and that are still alive."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and (storage := each.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, count: int) -> None:
        self.now -= count


def peak_memory(model: nn.Module, inputs: Inputs) -> int:
    """Return the bytes of the weights, and of the tensors that are alive at once in a forward pass.

    The scratch space of kernels, and what the process holds beside the model, are not in it.

    Args:
        model: The model.
        inputs: Of a batch.
    """
    weights = {tensor.untyped_storage().data_ptr(): tensor for tensor in [*model.parameters(), *model.buffers()]}
    given = [value for value in inputs.values() if isinstance(value, Tensor)]
    alive = _Alive([*weights.values(), *given])
    with torch.inference_mode(), alive:
        model(**inputs)
    return alive.peak + sum(tensor.untyped_storage().nbytes() for tensor in weights.values())


def bytes_on_disk(path: str) -> int | None:
    """Return the bytes of a model's weights in its folder, or in the hub's cache; None where there are none.

    Args:
        path: Folder, or name on the hub.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = cached_file(path, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if config is None:
            return None
        folder = Path(config).parent
    found = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in found) or None
