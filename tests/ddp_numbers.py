"""Run by test_evaluation: measures and trains on two gloo processes with uneven shards; saves what each rank found."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import tiny
from ildistil import Balance, Distiller, objectives
from ildistil.errors import NotFiniteError
from test_distiller import trainer
from test_finite import Spoilt, States

Rows = list[dict[str, Tensor]]


def rows(lengths: tuple[int, ...], labels: int = 3) -> Rows:
    batch = tiny.batch(lengths, labels=labels)
    if labels == 1:
        batch["labels"] = torch.linspace(-1, 2, len(lengths))
    return [{k: v[i] for k, v in batch.items()} for i in range(len(lengths))]


def without_labels(found: Rows, *numbers: int) -> Rows:
    for number in numbers:
        found[number]["labels"] = torch.tensor(-100)
    return found


def gpt2() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32)
        return GPT2LMHeadModel(config)


def texts() -> Rows:
    """For a language model: very different numbers of target tokens."""
    found = rows((9, 2, 7, 4, 8))
    for row in found:
        row["labels"] = torch.where(row["attention_mask"] == 1, row["input_ids"], -100)
    return found


#: Model, rows, and how these are shared among two processes: the rows of each, in batches of two.
SETS: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], Rows], tuple[list[int], list[int]]]] = {
    "three rows": (lambda: tiny.bert(2), lambda: rows((5, 4, 6)), ([0, 2], [1])),
    "uneven batches": (lambda: tiny.bert(2), lambda: rows((5, 4, 6, 3, 7)), ([0, 2, 4], [1, 3])),
    "without labels": (
        lambda: tiny.bert(2),
        lambda: without_labels(rows((5, 4, 6, 3, 7, 2)), 0, 1, 4),
        ([0, 1, 2, 3], [4, 5]),
    ),
    "regression": (lambda: tiny.bert(2, labels=1), lambda: rows((5, 4, 6, 3), labels=1), ([0, 1, 2], [3])),
    "next tokens": (gpt2, texts, ([0, 1, 2], [3, 4])),
}


def measured(name: str, shared: bool) -> dict[str, float]:
    model, data, shards = SETS[name]
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False} if shared else {}
    run = trainer(**options)
    found = data()
    if shared:
        found = [found[i] for i in shards[run.global_rank]]
    run.validate(Distiller(model()), DataLoader(found, 2), verbose=False)  # type: ignore[arg-type]
    return {key: float(value) for key, value in run.callback_metrics.items()}


def measured_terms(shared: bool) -> dict[str, float]:
    """The terms of five rows without labels: on one process, or on two with three rows and two."""
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False} if shared else {}
    terms = [objectives.HiddenMSE(), objectives.AttentionKL(weight=2.0), objectives.LogitsKL()]
    run, found = trainer(*terms, **options), rows((9, 2, 7, 4, 8))
    for row in found:
        del row["labels"]
    if shared:
        found = found[:3] if run.global_rank == 0 else found[3:]
    module = Distiller(tiny.bert(2, seed=1), tiny.bert(4, seed=2))
    run.validate(module, DataLoader(found, 2), verbose=False)  # type: ignore[arg-type]
    return {key: float(value) for key, value in run.callback_metrics.items()}


def balanced(by: Any, shared: bool) -> dict[str, float]:
    """Sizes after one step: on one process of four rows, or on two of three rows and one."""
    student, teacher = tiny.bert(2, seed=1).double(), tiny.bert(4, seed=2).double()
    terms = [objectives.HiddenMSE(), objectives.AttentionKL(), objectives.LogitsKL(), objectives.LogitsDIST()]
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False} if shared else {}
    data = without_labels(rows((7, 3, 5, 2)), 1)
    run = trainer(*terms, objectives.TaskLoss(), max_epochs=1, **options)
    if shared:
        data = data[:3] if run.global_rank == 0 else data[3:]
    module = Distiller(student, teacher, balance=Balance(by))
    run.fit(module, DataLoader(data, 4))  # type: ignore[arg-type]
    assert module.distillation.balance is not None
    return module.distillation.balance.state_dict()


def skipped(accumulated: int) -> dict[str, Any]:
    """Train where one process has a row whose gradient is NaN, in the second of four steps."""
    states, data = States(), rows((5, 4, 6, 3, 7, 2, 4, 5, 3, 6, 7, 2, 5, 4, 6, 3))
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    terms = [objectives.LogitsKL(), objectives.HiddenMSE(), Spoilt({5})]
    run = trainer(*terms, states, max_epochs=1, accumulate_grad_batches=accumulated, **options)
    module = Distiller(tiny.bert(2, seed=1), tiny.bert(4, seed=2), non_finite="skip")
    run.fit(module, DataLoader(data[run.global_rank :: 2], 2 // accumulated))  # type: ignore[arg-type]
    return {"weights": states.weights[accumulated - 1 :: accumulated], "window": module.window.state_dict()}


def stopped() -> str:
    data = rows((5, 4, 6, 3, 7, 2, 4, 5))
    options = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    run = trainer(objectives.LogitsDIST(), Spoilt({5}), max_epochs=1, **options)
    try:
        run.fit(Distiller(tiny.bert(2, seed=1), tiny.bert(4, seed=2)), DataLoader(data[run.global_rank :: 2], 2))  # type: ignore[arg-type]
    except NotFiniteError as error:
        return str(error)
    return "nothing"


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: measured(name, shared=True) for name in SETS}
    found |= {by: balanced(by, shared=True) for by in ("magnitude", "gradient")}
    found |= {f"skipped {accumulated}": skipped(accumulated) for accumulated in (1, 2)}
    found["terms"] = measured_terms(shared=True)
    rank = torch.distributed.get_rank()
    found["stopped"] = stopped()
    torch.save(found, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
