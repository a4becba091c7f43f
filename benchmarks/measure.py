"""What all benchmarks share: interleaved timing, peak memory, and one form of output."""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from ildistil import Distillation, init_student
from ildistil.tables import table

__all__ = ["Batch", "finish", "inputs", "interleaved", "models", "options", "peak_memory", "sliced", "training"]

SHAPE = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
Batch = dict[str, torch.Tensor]
SLICES = 16
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def options(doc: str | None, **defaults: int | str) -> argparse.ArgumentParser:
    """Make a parser with the options all benchmarks have, and some numbers or words more."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    return parser


def models(attn_implementation: str = "sdpa") -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    """Make a 3-layer student and its 6-layer teacher of width 384, without dropout, random."""
    torch.manual_seed(0)
    teacher = (
        BertForSequenceClassification(BertConfig(**SHAPE, **NO_DROPOUT, attn_implementation=attn_implementation))
        .eval()
        .requires_grad_(False)
    )
    return init_student(teacher, layers=[2, 4, 6]), teacher


def inputs(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Make a batch of random tokens, the last eighth padding."""
    ids = torch.randint(5, 30_000, (batch, tokens))
    mask = torch.ones_like(ids)
    mask[:, tokens - tokens // 8 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def interleaved(steps: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Run every step in turn, ``repeats`` times after one to warm up, and give the medians in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        # Alternate who goes first: what warms the caches must not favour one side.
        for name, step in list(steps.items())[:: 1 if repeat % 2 else -1]:
            start = time.perf_counter()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def training(engine: Distillation, device: str = "cpu") -> Callable[[list[Batch]], float]:
    """Make what trains an engine on some batches, and gives the seconds it took."""
    engine.train()
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-5, fused=True)

    def train(batches: list[Batch]) -> float:
        start = time.perf_counter()
        for batch in batches:
            engine({name: x.to(device, non_blocking=True) for name, x in batch.items()}).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return train


def sliced(epochs: Mapping[str, tuple[Callable[[list[Batch]], float], list[Batch]]]) -> dict[str, float]:
    """Train whole epochs in slices that take turns, after two batches of each to warm up, and give their seconds."""
    for train, batches in epochs.values():
        train(batches[:2])
    seconds = dict.fromkeys(epochs, 0.0)
    for part in range(SLICES):
        # Alternate who goes first: what warms the caches must not favour one side.
        for name, (train, batches) in list(epochs.items())[:: 1 if part % 2 else -1]:
            seconds[name] += train(batches[part::SLICES])
    return seconds


def peak_memory(step: Callable[[], object]) -> int:
    """Give the bytes by which a step exceeds what was in use before it, at its peak (Linux, CPU)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def finish(
    name: str, header: Sequence[str], rows: Sequence[Sequence[object]], path: Path | None, **more: object
) -> None:
    """Print a table and the same figures as JSON."""
    print(table(header, [[_cell(value) for value in row] for row in rows]))
    figures = {
        "benchmark": name,
        **more,
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": platform.machine()},
        "rows": [dict(zip(header, row, strict=True)) for row in rows],
    }
    text = json.dumps(figures, indent=1)
    if path is None:
        print(text)
    else:
        path.write_text(text + "\n")


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
