"""What reading costs: tokens per second of the loader alone, by kind of labels, beside those that a student trains on.

``--corpus`` is a file or folder of text, ``--tokenizer`` a folder or hub name; rows of ``--length`` tokens in batches
of ``--batch``, packed or a text each. The student of 3 layers of width 384 trains on the last hidden states of a
teacher of 6, on as many threads as torch takes.

``python benchmarks/loader.py --corpus wiki.train.txt --tokenizer sentence-transformers/all-MiniLM-L6-v2``
"""

import argparse
import time
from typing import Any

from measure import finish, models, options, training

from ildistil import Distillation, objectives
from ildistil.data import Corpus

KINDS: dict[str, dict[str, Any]] = {
    "none": {"labels": "none"},
    "next": {"labels": "next"},
    "masked": {"labels": "masked"},
    "masked, whole words": {"labels": "masked", "whole_words": True},
    "masked, a text a row": {"labels": "masked", "packed": False},
}


def corpus(arguments: argparse.Namespace, **changes: Any) -> Corpus:
    """Return a data module, set up."""
    data = Corpus(
        arguments.corpus, tokenizer=arguments.tokenizer, max_length=arguments.length, batch_size=arguments.batch,
        num_workers=arguments.workers, seed=0, **changes,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    return data


def loaded(data: Corpus, seconds: float) -> float:
    """Return the real tokens per second of an epoch's batches, in some seconds after the first batch."""
    batches = iter(data.train_dataloader())
    next(batches)
    tokens, start = 0, time.perf_counter()
    for batch in batches:
        tokens += int(batch["attention_mask"].sum())
        if time.perf_counter() - start > seconds:
            break
    return tokens / (time.perf_counter() - start)


def trained(data: Corpus, steps: int) -> float:
    """Return the real tokens per second of a training, after a step to warm up."""
    student, teacher = models()
    train = training(Distillation(student, teacher, [objectives.HiddenMSE()]))
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(steps + 1), strict=False)]
    train(batches[:1])
    return sum(int(batch["attention_mask"].sum()) for batch in batches[1:]) / train(batches[1:])


def measure(arguments: argparse.Namespace) -> list[list[object]]:
    training_speed = trained(corpus(arguments, labels="none"), arguments.steps)
    rows: list[list[object]] = [["training", training_speed, 1.0]]
    for name, changes in KINDS.items():
        speed = loaded(corpus(arguments, **changes), arguments.seconds)
        rows.append([f"loader, {name}", speed, speed / training_speed])
    return rows


if __name__ == "__main__":
    chosen = options(
        __doc__, corpus="corpus", tokenizer="sentence-transformers/all-MiniLM-L6-v2", length=128, batch=32, workers=0,
        steps=8, seconds=5,
    )  # fmt: skip
    arguments = chosen.parse_args()
    finish("loader", ["what", "tokens/s", "times training"], measure(arguments), arguments.json,
           length=arguments.length, batch=arguments.batch, workers=arguments.workers)  # fmt: skip
