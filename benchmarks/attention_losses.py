"""Time and peak memory of the attention losses over the length of the texts, at a constant number of tokens.

Twelve heads of size 32, one layer, no padding, forward and backward pass of the loss alone. ``plain`` makes the score
maps, ``ours`` doesn't. One relation of ``RelationKL`` costs what ``AttentionKL`` does. The memory is what a step takes
beyond its inputs, the gradients of queries and keys included.

``python benchmarks/attention_losses.py``
"""

from collections.abc import Callable

import torch
from measure import finish, interleaved, options, peak_memory
from torch import Tensor

from ildistil import kernels
from ildistil.kernels import Scores

HEADS, SIZE = 12, 32
LOSSES = {"AttentionKL": kernels.attention_kl, "AttentionMSE": kernels.attention_mse}


def vectors(batch: int, tokens: int) -> list[Tensor]:
    """Give queries and keys of student and teacher, in the memory layout that models have."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(batch, tokens, HEADS, SIZE, generator=generator).transpose(1, 2) for _ in range(4)]
    return [x.requires_grad_(i < 2) for i, x in enumerate(made)]


def step(loss: str, backend: kernels.Backend, tensors: list[Tensor]) -> Callable[[], None]:
    q_s, k_s, q_t, k_t = tensors

    def run() -> None:
        with kernels.use(backend):
            values = LOSSES[loss](Scores(q_s, k_s, SIZE**-0.5), Scores(q_t, k_t, SIZE**-0.5))
        torch.autograd.grad(values.mean(), (q_s, k_s))

    return run


def measure(tokens: int, length: int, longest_plain: int, repeats: int) -> list[list[object]]:
    batch = max(1, tokens // length)
    tensors = vectors(batch, length)
    backends: list[tuple[str, kernels.Backend]] = [("plain", "plain")] * (length <= longest_plain) + [("ours", "auto")]
    steps = {(loss, name): step(loss, backend, tensors) for loss in LOSSES for name, backend in backends}
    memory = {name: peak_memory(run) for name, run in steps.items()}
    seconds = interleaved(steps, repeats)  # type: ignore[arg-type]
    states = batch * length * HEADS * SIZE * 4
    return [
        [f"{batch} x {length}", loss, name, 1e3 * seconds[loss, name], memory[loss, name] / 2**20,
         memory[loss, name] / states]
        for loss, name in steps
    ]  # fmt: skip


def growth(repeats: int) -> dict[str, float]:
    """Say how much longer AttentionMSE takes for texts of four times the length, at batch size 1."""
    steps = {str(n): step("AttentionMSE", "auto", vectors(1, n)) for n in (1024, 4096)}
    (_, short), (_, long) = interleaved(steps, repeats).items()
    return {"AttentionMSE, 4096 tokens over 1024": long / short}


if __name__ == "__main__":
    chosen = options(__doc__, tokens=8192, longest_plain=1024, repeats=5).parse_args()
    lengths = [2**i for i in range(6, 14)]
    rows = [row for n in lengths for row in measure(chosen.tokens, n, chosen.longest_plain, chosen.repeats)]
    header = ["batch", "loss", "backend", "ms", "peak MiB", "in states of a layer"]
    finish("attention_losses", header, rows, chosen.json, growth=growth(chosen.repeats * 4))
