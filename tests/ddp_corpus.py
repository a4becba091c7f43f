"""A training on a corpus that notes the rows and masks of every step; run as a script, on two gloo processes."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import BertConfig, BertForMaskedLM

sys.path.insert(0, str(Path(__file__).parent / "data"))

from corpora import TOKENS, tokenizer
from ildistil import Distiller, ResumeCheckpoint, objectives
from ildistil.data import Corpus
from ildistil.errors import Stopped

ROWS_OF_A_STEP = 8


def model(layers: int, seed: int) -> BertForMaskedLM:
    """A masked language model in double precision, without dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(TOKENS), num_hidden_layers=layers, hidden_size=16, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    return BertForMaskedLM(config).double()


class Notes(L.Callback):
    """Notes what each batch held, and where Lightning counted it; stops after a step, if one is given."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.seen: list[tuple[int, int, list[Any]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Note which step the batch is of."""
        self.place = trainer.current_epoch, trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Note rows, tokens and labels; send SIGTERM."""
        real = batch["attention_mask"].bool()
        tokens = ([row[mask].tolist() for row, mask in zip(batch[name], real, strict=True)]
                  for name in ("input_ids", "labels"))  # fmt: skip
        rows = zip(batch["row_id"].tolist(), *tokens, strict=True)
        self.seen.append((*self.place, list(rows)))
        if self.stop is not None and trainer.global_step == self.stop:
            self.stop = None
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder: Path, ranks: int = 1, accumulate: int = 1, stop: int | None = None, path: Path | None = None,
    rows: int = ROWS_OF_A_STEP, accept: bool = False, **options: Any,
) -> tuple[list[tuple[int, int, list[Any]]], Distiller, L.Trainer]:  # fmt: skip
    """Train two epochs, or go on from a checkpoint; leave one in the folder."""
    L.seed_everything(1, verbose=False)
    settings = {"labels": "masked", "max_length": 16, "processes": 1, "tokenizer": tokenizer()} | options
    data = Corpus(str(folder.parent / "corpus.txt"), batch_size=rows // ranks // accumulate,
                  cache_dir=str(folder.parent / "cache"), **settings)  # fmt: skip
    terms = [objectives.TaskLoss(weight=0.5), objectives.LogitsKL(), objectives.HiddenMSE()]
    notes = Notes(stop)
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", logger=False,
        accumulate_grad_batches=accumulate, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        callbacks=[notes, *terms, ResumeCheckpoint(str(folder), every_steps=1)], default_root_dir=folder,
    )  # fmt: skip
    module = Distiller(model(1, seed=2), model(2, seed=3), learning_rate=1e-3, accept_changes=accept)
    try:
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
    except Stopped:
        if stop is None:
            raise
    return notes.seen, module, trainer


def main(folder: Path, stop: int) -> None:
    """Train undisturbed, and until a step."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, at in (("whole", None), ("halved", stop)):
        seen, module, trainer = fit(folder / name, ranks=2, stop=at)
        (folder / f"{name}{trainer.global_rank}.json").write_text(json.dumps(seen))
        if trainer.is_global_zero:
            torch.save(module.student.state_dict(), folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
