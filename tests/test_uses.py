"""The three ways of use and the two extensions, as the README shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.fabric import Fabric
from torch import Tensor, nn

import tiny
from ildistil import Distillation, Distiller, cli, init_student, mappings, objectives
from ildistil.capture import Activations, ModelInfo
from ildistil.functional import masked_mean
from ildistil.mappings import LayerMapping
from ildistil.objectives import Objective
from test_distiller import loader, trainer


def test_our_module() -> None:
    teacher = tiny.bert(6)
    student = init_student(teacher, layers=[1, 2, 3])
    run = trainer(
        objectives.AttentionKL(weight=1.0, mapping=mappings.Uniform()),
        objectives.LogitsKL(weight=0.5, temperature=2.0),
        objectives.TaskLoss(weight=0.5),
    )
    run.fit(Distiller(student, teacher), loader())
    assert run.callback_metrics["train/loss"] > 0


class Mine(L.LightningModule):
    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.distill = Distillation(student, teacher, [objectives.HiddenMSE(), objectives.TaskLoss()])

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        terms = self.distill(batch)
        self.log_dict(terms.logs("train"), batch_size=4)
        return terms.total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_ones_own_lightning_module() -> None:
    teacher = tiny.bert(6).eval()
    module = Mine(init_student(teacher, layers=[1, 2, 3]).eval(), teacher)
    run = trainer()
    run.fit(module, loader())
    assert module.distill.student.training
    assert not teacher.training
    assert "train/hidden_mse" in run.callback_metrics
    assert not any("teacher" in key for key in module.state_dict())


def test_plain_torch_lowers_the_loss() -> None:
    teacher = tiny.bert(6)
    engine = Distillation(init_student(teacher, layers=[1, 2, 3]), teacher, [objectives.HiddenMSE(projection="always")])
    optimizer, losses = torch.optim.Adam(engine.parameters(), lr=1e-2), []
    for _ in range(20):
        optimizer.zero_grad()
        total = engine(tiny.batch()).total
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < 0.5 * losses[0]


def test_fabric() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    teacher = tiny.bert(6)
    engine = Distillation(init_student(teacher, layers=[1, 2, 3]), teacher, [objectives.AttentionKL()])
    wrapped, optimizer = fabric.setup(engine, torch.optim.SGD(engine.parameters(), lr=0.1))
    fabric.backward(wrapped(tiny.batch()).total)
    optimizer.step()


@dataclass(frozen=True)
class Skip(LayerMapping):
    """Student layer ``i`` learns from teacher layer ``every * i``."""

    every: int = 2

    def __call__(self, student: int, teacher: int) -> list[tuple[int, int]]:
        return [(i, self.every * i) for i in range(1, student + 1)]


class HiddenCosine(Objective):
    """Cosine distance of the last hidden states, after a learned projection."""

    taps = ("hidden",)

    def build(self, student: ModelInfo, teacher: ModelInfo) -> None:
        assert student.width is not None
        assert teacher.width is not None
        self.projections["last"] = nn.Linear(student.width, teacher.width)

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> Tensor:
        s, t = self.projections["last"](student.hidden[-1]), teacher.hidden[-1]
        return masked_mean(1 - F.cosine_similarity(s, t, dim=-1), student.mask)


def test_ones_own_mapping_and_objective() -> None:
    teacher = tiny.bert(6)
    student = tiny.bert(3, width=16, heads=2)
    own = HiddenCosine(weight=0.3)
    run = trainer(own, objectives.HiddenMSE(mapping=Skip(every=2)))
    run.fit(Distiller(student, teacher), loader())
    assert run.callback_metrics["train/hidden_cosine"] < 1.2
    assert own.projections["last"].weight.grad is not None or own.projections["last"].weight.requires_grad


def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in design: named objectives, short class names, an override of one value on the command line."""
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(Path("teacher"))
    tiny.save_data(Path("glue/sst2"))
    Path("run.yaml").write_text(
        """
model:
  teacher: {class_path: pretrained, init_args: {path: ./teacher}}
  student: {layers: [1, 2, 3]}
objectives:
  attention: {class_path: AttentionKL, init_args: {mapping: Uniform}}
  logits: {class_path: LogitsKL, init_args: {temperature: 2.0, weight: 0.5}}
  own: {class_path: test_uses.HiddenCosine}
  skip: {class_path: HiddenMSE, init_args: {mapping: {class_path: test_uses.Skip, init_args: {every: 2}}}}
data: {class_path: Glue, init_args: {task: sst2, path: glue, batch_size: 8, cache_dir: cache}}
trainer: {max_epochs: 1, precision: bf16-mixed, accelerator: cpu, enable_progress_bar: false}
"""
    )
    cli.main(["fit", "--config", "run.yaml", "--objectives.logits.weight=0.25"])
    saved = yaml.safe_load(Path("runs/fit/version_0/config.yaml").read_text())
    assert saved["objectives"]["logits"]["init_args"]["weight"] == 0.25
    assert saved["objectives"]["attention"]["class_path"] == "ildistil.objectives.AttentionKL"
    best = torch.load("runs/fit/version_0/checkpoints/best.ckpt", weights_only=True)
    assert list(best["ildistil"]["objectives"]) == ["attention", "logits", "own", "skip"]
