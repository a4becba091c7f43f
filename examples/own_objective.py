"""A mapping and an objective of your own, with a learned projection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch.nn.functional as F
from python_api import QUIET, make_loader, make_teacher
from torch import Tensor, nn

from ildistil import Distiller, init_student, objectives
from ildistil.capture import Activations, ModelInfo
from ildistil.functional import masked_mean
from ildistil.mappings import LayerMapping
from ildistil.objectives import Objective


@dataclass(frozen=True)
class Skip(LayerMapping):
    """Student layer ``i`` learns from teacher layer ``every * i``."""

    every: int = 2

    def __call__(self, student: int, teacher: int) -> list[tuple[int, int]]:
        """Give the pairs for two depths."""
        return [(i, self.every * i) for i in range(1, student + 1)]


class HiddenCosine(Objective):
    """Cosine distance of the last hidden states, after a learned projection."""

    taps = ("hidden[-1]",)

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        """Make the projection."""
        self.projections["last"] = nn.Linear(student.width, teacher.width)

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        """Give the mean over examples."""
        s, t = self.projections["last"](student.hidden[-1]), teacher.hidden[-1]
        return masked_mean(1 - F.cosine_similarity(s, t, dim=-1), student.mask)


def main() -> None:
    L.seed_everything(0)
    teacher = make_teacher()
    train, validation = make_loader(256, shuffle=True), make_loader(128)
    # Half as wide as the teacher, so both objectives need a projection.
    student = init_student(teacher, config={"num_hidden_layers": 2, "hidden_size": 16})
    terms = [HiddenCosine(weight=0.5), objectives.HiddenMSE(mapping=Skip(every=2)), objectives.TaskLoss()]
    trainer = L.Trainer(max_epochs=3, callbacks=terms, **QUIET)
    trainer.fit(Distiller(student, teacher, learning_rate=3e-3), train, validation)
    print({name: round(value.item(), 4) for name, value in trainer.callback_metrics.items()})


if __name__ == "__main__":
    main()
