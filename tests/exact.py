"""One optimiser step by the Distiller, whatever the batches and processes; run as a script, on two gloo processes."""

import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import BertForMaskedLM, PreTrainedModel

import tiny
from ildistil import Distiller, objectives
from ildistil.data import TokenBudgetSampler
from ildistil.objectives import Objective
from table import CASES

LENGTHS = (7, 4, 6, 5, 3, 2, 6, 7)
NO_TOKENS = 6  # this row has none: batches and processes count unequal numbers of examples


class Descent(Distiller):
    """Plain gradient descent with a rate of 1, so that a step's difference is the gradient."""

    def configure_optimizers(self) -> Any:
        super().configure_optimizers()
        return torch.optim.SGD(self.parameters(), lr=1.0)


def rows(labels: int = 3) -> list[dict[str, Tensor]]:
    batch = tiny.batch(LENGTHS, labels=labels)
    batch["attention_mask"][NO_TOKENS] = 0
    batch["labels"][NO_TOKENS] = -100
    return [{k: v[i] for k, v in batch.items()} for i in range(len(LENGTHS))]


def masked_rows() -> list[dict[str, Tensor]]:
    """For a masked language model: very different numbers of target tokens."""
    found = rows()
    for i, row in enumerate(found):
        row["labels"] = torch.where(torch.arange(7) < (i * 3) % 7, row["input_ids"], -100)
        row["labels"][row["attention_mask"] == 0] = -100
    return found


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny.bert(2, seed=1).double(), tiny.bert(4, seed=2).double()


def masked_models() -> tuple[PreTrainedModel, PreTrainedModel]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = [BertForMaskedLM(model.config).double() for model in models()]
    return made[0], made[1]


def step(
    terms: Iterable[Objective],
    data: list[dict[str, Tensor]],
    pair: tuple[PreTrainedModel, PreTrainedModel],
    size: int | TokenBudgetSampler,
    **options: Any,
) -> dict[str, Tensor]:
    """Train one epoch of one step; give the gradients by parameter name. A sampler makes whole batches itself."""
    torch.manual_seed(3)
    student, teacher = pair
    module = Descent(student, teacher)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=list(terms), **quiet, **options)
    before: dict[str, Tensor] = {}

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            before.update({n: p.detach().clone() for n, p in module.named_parameters()})

    run.callbacks.append(Start())
    if isinstance(size, TokenBudgetSampler):
        loader: DataLoader[Any] = DataLoader(
            Rows(data), batch_size=None, sampler=size, collate_fn=torch.utils.data.default_collate
        )
    else:
        loader = DataLoader(data, size, shuffle=False)
    run.fit(module, loader)
    assert run.global_step == 1
    return {n: before[n] - p.detach() for n, p in module.named_parameters()}


class Rows(Dataset[Any]):
    """Rows by their numbers: one, or several for a list of numbers."""

    def __init__(self, rows: list[dict[str, Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | list[int]) -> Any:
        return [self.rows[i] for i in key] if isinstance(key, list) else self.rows[key]


def budget_rows() -> list[dict[str, Tensor]]:
    """Seven rows: no two processes can have equally many."""
    return [row for i, row in enumerate(rows()) if i != NO_TOKENS]


def budget(tokens: int) -> TokenBudgetSampler:
    lengths = [length for i, length in enumerate(LENGTHS) if i != NO_TOKENS]
    return TokenBudgetSampler(lengths, tokens, num_replicas=2, rank=int(os.environ.get("LOCAL_RANK", 0)))


def several() -> list[Objective]:
    """Terms that count examples and terms that count target tokens."""
    return [objectives.LogitsKL(), objectives.TaskLoss(weight=0.5), objectives.AttentionKL(), objectives.HiddenMSE()]


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    two = {"devices": 2, "strategy": "ddp"}
    found = {name: step([case.make()], rows(), models(), 4, **two) for name, case in CASES.items()}
    found["masked language model"] = step(several(), masked_rows(), masked_models(), 4, **two)
    found["accumulated"] = step([objectives.AttentionKL()], rows(), models(), 2, accumulate_grad_batches=2, **two)
    # 4 and 3 rows; then 2 and 2, and 2 and 1.
    found["token budget"] = step(several(), budget_rows(), models(), budget(28), **two)
    found["token budget, accumulated"] = step(
        several(), budget_rows(), models(), budget(14), accumulate_grad_batches=2, **two
    )
    torch.save(found, Path(folder) / f"rank{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
