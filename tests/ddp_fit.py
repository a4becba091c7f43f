"""Run by test_distiller: fits on two gloo processes, and saves each rank's student."""

import sys
import warnings
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

import tiny
from ildistil import Distiller, Stage, init_student, objectives
from ildistil.schedules import Linear
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
    found = {"student": module.student.state_dict(), "heads": heads.seen}
    torch.save(found, Path(folder) / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
