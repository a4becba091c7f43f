"""Running a model on calibration batches, and summing up how large its activations are. Internal."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ildistil.capture import Capture, Tap
from ildistil.capture.trial import undisturbed
from ildistil.errors import ModelError


@dataclass
class Measured:
    """Sums over the real tokens of the calibration batches."""

    moment: Tensor  # of x x^T over the states x of the residual stream
    residual: Tensor  # of |x|
    inner: dict[str, Tensor]  # by module: the mean of |x| of what it reads or writes


def measure(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], reads: list[str], writes: list[str]
) -> Measured:
    """Run the model on the batches, and sum up its states and what the named modules read and write."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    named = dict(model.named_modules())
    handles = [named[n].register_forward_pre_hook(lambda _, x, n=n: seen[n].append(x[0])) for n in reads]
    handles += [named[n].register_forward_hook(lambda _, x, y, n=n: seen[n].append(y)) for n in writes]
    # The modules are tapped so that the model runs to the last of them.
    taps = [Tap("hidden", i) for i in range(model.config.num_hidden_layers + 1)] + [Tap(name) for name in reads]
    capture = Capture(model, taps, role="teacher")
    moment = residual = torch.zeros(())
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = defaultdict(int)
    try:
        with undisturbed(model):
            for batch in batches:
                activations = capture({k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
                mask = activations.mask
                for state in activations.hidden.values():
                    real = state[mask].to("cpu", torch.double)
                    moment, residual = moment + real.T @ real, residual + real.abs().sum(0)
                for name, values in seen.items():
                    for value in values:
                        by_token = value.ndim == 3 and value.shape[:2] == mask.shape
                        real = (value[mask] if by_token else value.flatten(0, -2)).to("cpu", torch.double)
                        totals[name] = totals.get(name, 0) + real.abs().sum(0)
                        counts[name] += len(real)
                seen.clear()
    finally:
        capture.close()
        for handle in handles:
            handle.remove()
    if not moment.ndim:
        raise ModelError("batches has no batch. Pass a list of batches, or a DataLoader.")
    return Measured(moment, residual, {name: total / counts[name] for name, total in totals.items()})
