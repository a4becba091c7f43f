"""Distil with our module: a small random teacher and generated data, in seconds, without any download.

Put your own model and data in their place: any fine-tuned transformers model, any loader whose batches are mappings.
"""

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from ildistil import Distiller, init_student, mappings, objectives

VOCABULARY, TOKENS = 100, 12


def make_teacher() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)


def make_loader(teacher: BertForSequenceClassification, rows: int, shuffle: bool = False) -> DataLoader:
    """Random sentences of unequal length; their labels are the teacher's answers."""
    ids = torch.randint(5, VOCABULARY, (rows, TOKENS))
    mask = (torch.arange(TOKENS) < torch.randint(4, TOKENS + 1, (rows, 1))).long()
    with torch.no_grad():
        labels = teacher.eval()(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    data = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    return DataLoader(data, batch_size=32, shuffle=shuffle)


def main() -> None:
    L.seed_everything(0)
    teacher = make_teacher()
    train, validation = make_loader(teacher, 512, shuffle=True), make_loader(teacher, 128)
    student = init_student(teacher, layers=[2, 4, 6])
    trainer = L.Trainer(
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[
            objectives.AttentionKL(weight=1.0, mapping=mappings.Uniform()),
            objectives.LogitsKL(weight=0.5, temperature=2.0),
            objectives.TaskLoss(weight=0.5),
        ],
    )
    module = Distiller(student, teacher, learning_rate=3e-3)
    before = trainer.validate(module, validation, verbose=False)[0]["val/accuracy"]
    trainer.fit(module, train, validation)
    after = trainer.callback_metrics["val/accuracy"].item()
    print(f"agreement with the teacher: {before:.3f} before, {after:.3f} after")


if __name__ == "__main__":
    main()
