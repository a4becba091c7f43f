"""What attention objectives add to a training step of plain distillation.

A 6-layer teacher and a 3-layer student of width 384, attention dropout 0, ``LogitsKL`` on every side, the attention
objectives on all three student layers (``RelationKL`` on the last). ``usual`` is ``AttentionKL`` as it is usually
written: eager attention, ``output_attentions``, probabilities of all layers. Interleaved in one process, medians.
Prints JSON::

    python benchmarks/attention.py
    python benchmarks/attention.py --batch 32 --tokens 128
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from ildistil import Distillation, init_student, objectives


def models() -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    shape = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = BertForSequenceClassification(BertConfig(**shape, **dropout)).eval().requires_grad_(False)
    return init_student(teacher, layers=[2, 4, 6]), teacher


def usual(inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    student, teacher = models()
    for model in (student, teacher):
        model.set_attn_implementation("eager")

    def step() -> Tensor:
        with torch.no_grad():
            target = teacher(**inputs, output_attentions=True)
        output = student(**inputs, output_attentions=True)
        loss = 4 * F.kl_div(
            F.log_softmax(output.logits / 2, -1), F.softmax(target.logits / 2, -1), reduction="batchmean"
        )
        real = inputs["attention_mask"].bool()
        for own, theirs in zip(output.attentions, target.attentions[1::2], strict=True):
            rows = (theirs * (theirs.clamp(min=1e-7).log() - own.clamp(min=1e-7).log())).sum(-1).mean(1)
            loss = loss + ((rows * real).sum(1) / real.sum(1)).mean() / 3
        return loss

    return step


def ours(inputs: dict[str, Tensor], *terms: objectives.Objective) -> Callable[[], Tensor]:
    engine = Distillation(*models(), [objectives.LogitsKL(), *terms])
    return lambda: engine(inputs).total


def measure(batch: int, tokens: int, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    ids = torch.randint(5, 30_000, (batch, tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][:, tokens - tokens // 8 :] = 0
    steps = {
        "LogitsKL": ours(inputs),
        "AttentionKL": ours(inputs, objectives.AttentionKL()),
        "AttentionMSE": ours(inputs, objectives.AttentionMSE()),
        "RelationKL": ours(inputs, objectives.RelationKL()),
        "usual": usual(inputs),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step().backward()
            if repeat > 0:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    over = {name: round(median / medians["LogitsKL"], 3) for name, median in medians.items() if name != "LogitsKL"}
    return {
        "batch": batch,
        "tokens": tokens,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "median_ms": {name: round(1e3 * median, 1) for name, median in medians.items()},
        "over LogitsKL alone": over,
        "usual / AttentionKL": round(medians["usual"] / medians["AttentionKL"], 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(json.dumps(measure(**vars(options)), indent=2))
