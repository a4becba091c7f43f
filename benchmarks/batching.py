"""What padding costs: an epoch of distillation with fixed, random, length-grouped and token-budget batches.

All four train a student of every second layer on the same rows with ``LogitsKL`` and ``TaskLoss``, in slices that take
turns in one process. ``--data`` holds a folder of files for each GLUE task, ``--teacher`` is one with a model and
its tokenizer. ``--batch`` counts rows, ``--tokens`` the tokens of a budget; rows are cut at ``--length``.

``python benchmarks/batching.py --data glue --teacher teacher``
"""

import argparse

import torch
import torch.nn.functional as F
from measure import Batch, finish, options, sliced, training

from ildistil import Distillation, init_student, objectives
from ildistil.data import Glue
from ildistil.students import load


def fixed(batch: Batch, length: int) -> Batch:
    """Pad a batch to a fixed length."""
    return {name: F.pad(x, (0, length - x.shape[1])) if x.ndim == 2 else x for name, x in batch.items()}


def epochs(arguments: argparse.Namespace) -> dict[str, list[Batch]]:
    """All batches of one epoch, by the kind of batching."""

    def epoch(**options: object) -> list[Batch]:
        common = {"path": arguments.data, "max_length": arguments.length, "limit_train": arguments.rows, "seed": 0}
        data = Glue(arguments.task, tokenizer=arguments.teacher, **common, **options)
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


def measure(arguments: argparse.Namespace) -> list[list[object]]:
    torch.manual_seed(0)
    teacher = load(arguments.teacher, new_head=True).to(arguments.device)
    student = init_student(teacher, layers=list(range(2, teacher.config.num_hidden_layers + 1, 2)))
    engine = Distillation(student, teacher, [objectives.LogitsKL(), objectives.TaskLoss()])
    train = training(engine, arguments.device)
    kinds = epochs(arguments)
    seconds = sliced({name: (train, batches) for name, batches in kinds.items()})
    slowest = next(iter(seconds.values()))
    return [[name, *_sizes(kinds[name]), s, slowest / s] for name, s in seconds.items()]


def _sizes(batches: list[Batch]) -> list[object]:
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return [len(batches), tokens, 1 - real / tokens]


if __name__ == "__main__":
    chosen = options(__doc__, data="glue", teacher="teacher", task="sst2", rows=4096, batch=32, tokens=1024, length=128)
    chosen.add_argument("--device", default="cpu")
    arguments = chosen.parse_args()
    header = ["batches of", "number", "tokens", "padding", "s", "times faster"]
    finish("batching", header, measure(arguments), arguments.json, rows_of_data=arguments.rows, task=arguments.task)
