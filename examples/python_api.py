"""Distil with our module: a small teacher and generated data, in seconds, without any download.

Put your own model and data in their place: any fine-tuned transformers model, any loader whose batches are mappings.
"""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from ildistil import Distiller, init_student, mappings, objectives

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def make_loader(rows: int, shuffle: bool = False) -> DataLoader:
    """Sentences of 4 to 12 tokens; the label says whether most of them are of the vocabulary's second half."""
    ids = torch.randint(4, 64, (rows, 12))
    mask = (torch.arange(12) < torch.randint(4, 13, (rows, 1))).long()
    labels = (((ids >= 34) * mask).sum(1) * 2 > mask.sum(1)).long()
    data = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    return DataLoader(data, batch_size=32, shuffle=shuffle)


def make_teacher() -> BertForSequenceClassification:
    """Fine-tune a small model: the same module, without a teacher."""
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    trainer = L.Trainer(max_epochs=5, callbacks=[objectives.TaskLoss()], **QUIET)
    trainer.fit(Distiller(model, learning_rate=5e-3), make_loader(512, shuffle=True))
    return model


def main() -> None:
    L.seed_everything(0)
    teacher, validation = make_teacher(), make_loader(128)
    check = L.Trainer(**QUIET)
    accuracy = {"teacher": check.validate(Distiller(teacher), validation, verbose=False)[0]["val/accuracy"]}
    student = init_student(teacher, layers=[2, 4])
    trainer = L.Trainer(
        max_epochs=3,
        callbacks=[
            objectives.AttentionKL(weight=1.0, mapping=mappings.Uniform()),
            objectives.LogitsKL(weight=0.5, temperature=2.0),
            objectives.TaskLoss(weight=0.5),
        ],
        **QUIET,
    )
    module = Distiller(student, teacher, learning_rate=1e-3)
    accuracy["student before"] = check.validate(module, validation, verbose=False)[0]["val/accuracy"]
    trainer.fit(module, make_loader(256, shuffle=True), validation)
    accuracy["student after"] = trainer.callback_metrics["val/accuracy"].item()
    print({name: round(value, 3) for name, value in accuracy.items()})


if __name__ == "__main__":
    main()
