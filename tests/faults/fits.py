"""One small training, of every kind that can be resumed, and what may happen to it."""

import csv
import os
import random
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import tiny
from ildistil import Distiller, ResumeCheckpoint, Stage, objectives, schedules
from ildistil.data import TextData
from ildistil.engine import Balance
from ildistil.errors import Stopped
from ildistil.mappings import Random
from ildistil.objectives import Objective
from ildistil.training.checkpoint_files import newest

WORDS = ["good", "bad", "fine", "poor", "film", "plot", "is", "was", "the", "very", "not", "and"]


@dataclass(frozen=True)
class Case:
    """A training. Each field is a choice that resuming has to respect."""

    workers: int = 0
    ranks: int = 1
    precision: str = "32-true"
    accumulate: int = 1
    batching: str = "grouped"  # grouped, plain, tokens
    terms: str = "plain"  # plain, stages, balance, contrast, drawn
    validate: str = "epoch"  # epoch, often, never
    epochs: int = 3
    max_steps: int = -1


def write_data(folder: Path, rows: int = 37) -> None:
    """Write a training and a validation file."""
    draw = random.Random(0)
    for name, count in (("train.csv", rows), ("val.csv", 11)):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for _ in range(count):
                words = draw.choices(WORDS, k=draw.randint(1, 12))
                writer.writerow([" ".join(words), "yes" if "good" in words else "no"])


def terms(case: Case) -> list[Objective]:
    """The objectives of a training."""
    if case.terms == "contrast":
        return [objectives.CLSContrast(negatives=4, size=8), objectives.TaskLoss()]
    if case.terms == "drawn":
        return [objectives.HiddenMSE(mapping=Random()), objectives.TaskLoss(weight=schedules.Linear(0.1, 1.0))]
    return [objectives.HiddenMSE(projection="always"), objectives.AttentionKL(), objectives.TaskLoss()]


class Trap(Callback):
    """Sends a signal to its own process at a place of the training."""

    def __init__(self, place: str, number: int, signum: int) -> None:
        self.place, self.left, self.signum = place, number, signum
        self.sprung: int | None = None

    def _spring(self, place: str, trainer: L.Trainer) -> None:
        if place == self.place:
            self.left -= 1
            if self.left == 0:
                self.sprung = trainer.global_step
                os.kill(os.getpid(), self.signum)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Before a batch."""
        self._spring("batch", trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        """After the backward pass."""
        self._spring("step", trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After a batch, before it is saved."""
        self._spring("batch end", trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """In a validation."""
        self._spring("validation", trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """At the end of an epoch, before it is saved."""
        self._spring("epoch end", trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """At the start of an epoch, and of a stage."""
        self._spring("epoch start", trainer)


PLACES = ("batch", "step", "batch end", "validation", "epoch end", "epoch start")


def fit(folder: Path, case: Case, trap: Trap | None = None) -> None:
    """Train, or go on where a run in this folder was; leave the final weights in ``final.pt``."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    L.seed_everything(5, verbose=False)
    teacher = tiny.bert(4, labels=2)
    student = tiny.bert(2, labels=2, seed=1, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    staged = [Stage(["hidden_mse", "attention_kl"], 1), Stage(["task_loss"], case.epochs - 1)]
    module = Distiller(
        student,
        teacher,
        learning_rate=1e-3,
        stages=staged if case.terms == "stages" else (),
        balance=Balance(by="gradient", every=2) if case.terms == "balance" else None,
    )
    sizes: dict[str, Any] = {"tokens_per_batch": 40} if case.batching == "tokens" else {"batch_size": 4}
    data = TextData(
        str(folder.parent / "train.csv"), str(folder.parent / "val.csv"), tokenizer=tiny.tokenizer(), max_length=16,
        num_workers=case.workers, group_by_length=case.batching != "plain", cache_dir=str(folder.parent / "cache"),
        **sizes,
    )  # fmt: skip
    checkpoints = folder / "checkpoints"
    kept = [ResumeCheckpoint(str(checkpoints), every_minutes=None, every_steps=2)]
    if case.validate != "never":
        # Every validation is a new best: its file is written each time.
        kept.append(
            ModelCheckpoint(checkpoints, filename="best", monitor="epoch", mode="max", enable_version_counter=False)
        )  # type: ignore[arg-type]
    trainer = L.Trainer(
        max_epochs=case.epochs, max_steps=case.max_steps, accelerator="cpu", devices=case.ranks,
        strategy="ddp" if case.ranks > 1 else "auto", precision=case.precision, logger=False,  # type: ignore[arg-type]
        accumulate_grad_batches=case.accumulate, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0 if case.validate == "never" else None, num_sanity_val_steps=0, default_root_dir=folder,
        val_check_interval=2 if case.validate == "often" else None,
        callbacks=[*terms(case), *([trap] if trap else []), *kept],
    )  # fmt: skip
    try:
        trainer.fit(module, data, ckpt_path=newest(checkpoints), weights_only=True)
    except Stopped:
        if trap is not None and trap.sprung is not None:
            (folder / "sprung").write_text(str(trap.sprung))
        raise
    if trainer.is_global_zero:
        states = trainer.optimizers[0].state_dict()["state"]
        torch.save(
            {"weights": module.state_dict(), "optimizer": states, "step": trainer.global_step}, folder / "final.pt"
        )


def differs(first: Path, second: Path) -> str | None:
    """Return the name of the first value of two final states that isn't bit-equal."""
    pair = [torch.load(folder / "final.pt", weights_only=True) for folder in (first, second)]
    if pair[0]["step"] != pair[1]["step"]:
        return f"step {pair[0]['step']} and {pair[1]['step']}"
    for key in ("weights", "optimizer"):
        flat = [dict(_flat(each[key])) for each in pair]
        for name, value in flat[0].items():
            if not torch.equal(value, flat[1][name]):
                return f"{key} {name}"
    return None


def _flat(tree: Any, prefix: str = "") -> Any:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
