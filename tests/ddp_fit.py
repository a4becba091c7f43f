"""Run by test_distiller: fits on two gloo processes, and saves each rank's student."""

import sys
import warnings
from pathlib import Path

import torch

import tiny
from ildistil import Distiller, init_student, objectives
from test_distiller import loader, trainer


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = tiny.bert(4)
    module = Distiller(init_student(teacher, layers=[1, 2]), teacher)
    run = trainer(
        objectives.AttentionKL(), objectives.HiddenMSE(projection="always"), devices=2, strategy="ddp", max_epochs=1
    )
    run.fit(module, loader(rows=16), loader(rows=8))
    torch.save(module.student.state_dict(), Path(folder) / f"rank{run.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
