"""Distillation inside a LightningModule of your own: the engine is one attribute, one call a step."""

import lightning as L
import torch
from python_api import QUIET, make_loader, make_teacher
from torch import Tensor, nn

from ildistil import Distillation, init_student, objectives


class Mine(L.LightningModule):
    """Your module, with your optimiser and your logging."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.distill = Distillation(student, teacher, [objectives.HiddenMSE(), objectives.TaskLoss()])

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        """Give the sum of the terms."""
        terms = self.distill(batch)  # one teacher run, one student run, all objectives
        self.log_dict(terms.logs("train"))
        return terms.total

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Measure the student."""
        output = self.distill.student(**batch)
        self.log("val/accuracy", (output.logits.argmax(-1) == batch["labels"]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give the optimiser; projections are among the parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    L.seed_everything(0)
    teacher = make_teacher()
    train, validation = make_loader(256, shuffle=True), make_loader(128)
    module = Mine(init_student(teacher, layers=[2, 4]), teacher)
    trainer = L.Trainer(max_epochs=3, **QUIET)
    trainer.fit(module, train, validation)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
