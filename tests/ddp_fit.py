"""Run by test_distiller: fits on two gloo processes, with and without stored targets; saves each rank's student."""

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

import tiny
from ildistil import Distiller, Stage, init_student, objectives
from ildistil.schedules import Linear
from ildistil.teachers import StoredTeacher
from test_distiller import loader, trainer


class Heads(L.Callback):
    """The classifier and the projection after each epoch."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        projections = module.distillation.projections.parameters()
        self.seen.append([p.detach().clone() for p in (module.student.classifier.weight, *projections)])


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = tiny.bert(4)
    stages = [Stage(["attention_kl", "hidden_mse"], 1), Stage(["task_loss"], 2)]
    module = Distiller(init_student(teacher, layers=[1, 2]), teacher, stages=stages, weight_decay=0.5)
    heads = Heads()
    terms = [objectives.AttentionKL(weight=Linear(1.0, 0.0)), objectives.HiddenMSE(projection="always")]
    run = trainer(heads, *terms, objectives.TaskLoss(), devices=2, strategy="ddp", max_epochs=3)
    run.fit(module, loader(rows=16), loader(rows=8))
    found = {"student": module.student.state_dict(), "heads": heads.seen, **stored(Path(folder) / "targets")}
    torch.save(found, Path(folder) / f"rank{run.global_rank}.pt")


def stored(folder: Path) -> dict[str, Any]:
    """Train by a teacher that runs, and by one whose targets are stored first, read in another order each epoch."""
    found: dict[str, Any] = {"runs": 0}

    def count(*_: Any) -> None:
        found["runs"] += 1

    (rows,) = loader(rows=16, batch_size=16)
    for name in ("live", "stored"):
        student, teacher = tiny.bert(2, seed=1), tiny.bert(4, seed=2)
        if name == "stored":
            teacher.register_forward_hook(count)
        module = Distiller(student, StoredTeacher(folder, teacher, dtype="float32") if name == "stored" else teacher)
        run = trainer(objectives.HiddenMSE(), objectives.LogitsKL(), devices=2, strategy="ddp")
        order = DistributedSampler(range(16), 2, run.global_rank, seed=1)  # type: ignore[arg-type]
        data = [{k: v[i] for k, v in rows.items()} for i in range(16)]
        run.fit(module, DataLoader(data, 4, sampler=order))  # type: ignore[arg-type]
        found[name] = student.state_dict()
    return found


if __name__ == "__main__":
    main(sys.argv[1])
