"""Two processes under Lightning's ddp: which rows does each see? Started by test_data_order.py."""

import json
import os
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ildistil.data import LengthGroupedSampler, TextData, TokenBudgetSampler
from ildistil.data.sampler import EpochSampler

sys.path.insert(0, str(Path(__file__).parent))
from tiny_data import make_tokenizer


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, Any] = {"train": defaultdict(list), "val": defaultdict(list), "predict": []}

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        longest = batch["attention_mask"].sum(1).max().item()
        self.seen["train"][self.current_epoch].append((batch["row_id"].tolist(), longest))
        return self.layer(batch["labels"].float()[:, None]).mean()

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        torch.distributed.all_reduce(
            batch["row_id"].sum()
        )  # as a metric synchronised in each step: no rank may do more
        self.seen["val"][self.current_epoch] += batch["row_id"].tolist()

    def predict_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen["predict"] += batch["row_id"].tolist()
        return batch["row_id"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def write(path: Path, rows: int) -> str:
    texts = ["cat " * (1 + (i * 7) % 13) for i in range(rows)]
    path.write_text("\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(texts)))
    return str(path)


RUNS: dict[str, dict[str, int]] = {"grouped": {"batch_size": 4}, "budget": {"tokens_per_batch": 45}}


def sampler(run: str, lengths: list[int], rank: int) -> EpochSampler:
    """The training order that a run should have."""
    make = {"grouped": LengthGroupedSampler, "budget": TokenBudgetSampler}[run]
    return make(lengths, *RUNS[run].values(), num_replicas=2, rank=rank, seed=5)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["ILDISTIL_CACHE"] = str(folder / "cache")
    files = folder / f"{os.environ.get('LOCAL_RANK', 0)}"
    files.mkdir()
    for run, sizes in RUNS.items():
        # 33 rows in batches of 16 on two ranks: 17 and 16 rows, two steps against one if nothing were done.
        data = TextData(
            write(files / "train.jsonl", 50),
            write(files / "val.jsonl", 33),
            tokenizer=make_tokenizer(),
            eval_batch_size=16,
            seed=5,
            **sizes,
        )
        model = Recorder()
        trainer = L.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        trainer.predict(model, data, return_predictions=False)
        (folder / f"{run}{trainer.global_rank}.json").write_text(json.dumps(model.seen))
        if trainer.is_global_zero:
            (folder / "lengths.json").write_text(json.dumps(data._rows["train"]["length"][:]))


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)  # Lightning 2.6 with torch 2.13
    main(Path(sys.argv[1]))
