"""What padding costs: an epoch of distillation with fixed, random, length-grouped and token-budget batches.

All four train a student of every second layer on the same rows with ``LogitsKL`` and ``TaskLoss``, in slices that take
turns in one process. Prints a table and JSON; the bar is 3 for fixed length against length-grouped::

    python benchmarks/batching.py --data glue --teacher teacher
    python benchmarks/batching.py --data glue --teacher teacher --task qnli --rows 2048 --device cuda
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from ildistil import Distillation, init_student, objectives
from ildistil.data import Glue
from ildistil.models import load
from ildistil.plan import table

SLICES = 16
Batch = dict[str, Tensor]


def fixed(batch: Batch, length: int) -> Batch:
    """Pad a batch to a fixed length."""
    return {name: F.pad(x, (0, length - x.shape[1])) if x.ndim == 2 else x for name, x in batch.items()}


def epochs(arguments: argparse.Namespace) -> dict[str, list[Batch]]:
    """All batches of one epoch, by the kind of batching."""

    def epoch(**options: object) -> list[Batch]:
        common = {"path": arguments.data, "max_length": arguments.length, "limit_train": arguments.rows, "seed": 0}
        data = Glue(arguments.task, arguments.teacher, **common, **options)
        data.prepare_data()
        data.setup("fit")
        return list(data.train_dataloader())

    shuffled = epoch(batch_size=arguments.batch, group_by_length=False)
    return {
        f"fixed length {arguments.length}": [fixed(batch, arguments.length) for batch in shuffled],
        "random": shuffled,
        "length-grouped": epoch(batch_size=arguments.batch),
        "token budget": epoch(tokens_per_batch=arguments.tokens),
    }


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    teacher = load(arguments.teacher, new_head=True).to(arguments.device)
    student = init_student(teacher, layers=list(range(2, teacher.config.num_hidden_layers + 1, 2)))
    engine = Distillation(student, teacher, [objectives.LogitsKL(), objectives.TaskLoss()]).train()
    optimizer = torch.optim.AdamW(engine.parameters(), lr=1e-5, fused=True)

    def train(batches: list[Batch]) -> float:
        start = time.perf_counter()
        for batch in batches:
            moved = {name: x.to(arguments.device, non_blocking=True) for name, x in batch.items()}
            engine(moved).total.backward()
            optimizer.step()
            optimizer.zero_grad()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    kinds = epochs(arguments)
    for batches in kinds.values():
        train(batches[:2])
    seconds = dict.fromkeys(kinds, 0.0)
    for part in range(SLICES):
        # Alternate who goes first: what warms the caches must not favour one side.
        for name, batches in list(kinds.items())[:: 1 if part % 2 else -1]:
            seconds[name] += train(batches[part::SLICES])
    slowest = next(iter(seconds.values()))
    return {name: {"seconds": s, "ratio": slowest / s, **_sizes(kinds[name], s)} for name, s in seconds.items()}


def _sizes(batches: list[Batch], seconds: float) -> dict[str, float]:
    rows = sum(len(batch["row_id"]) for batch in batches)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {
        "batches": len(batches),
        "rows": rows,
        "tokens": tokens,
        "padding": 1 - real / tokens,
        "ms_per_row": 1000 * seconds / rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with a folder of files for each GLUE task")
    parser.add_argument("--teacher", required=True, help="folder of the teacher and its tokenizer")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch, where it is rows that count")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a batch, where it is tokens that count")
    parser.add_argument("--length", type=int, default=128, help="the fixed length, and where rows are cut")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    found = measure(arguments)
    rows = [
        (name, f"{f['batches']:,}", f"{f['tokens']:,}", f"{f['padding']:.1%}", f"{f['seconds']:.1f}",
         f"{f['ms_per_row']:.2f}", f"{f['ratio']:.2f}")
        for name, f in found.items()
    ]  # fmt: skip
    print(table(("batches of", "number", "tokens", "padding", "seconds", "ms per row", "times faster"), rows))
    print(json.dumps({**vars(arguments), "threads": torch.get_num_threads(), "found": found}, indent=2))


if __name__ == "__main__":
    main()
