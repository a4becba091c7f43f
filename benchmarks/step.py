"""What the engine adds to a training step, against the same two forward passes and backward written by hand.

Both sides run the same models with ``LogitsKL`` alone, interleaved in one process; the figure is the ratio of the
medians. Prints JSON::

    python benchmarks/step.py
    python benchmarks/step.py --batch 8 --tokens 512 --device cuda
"""

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from ildistil import Distillation, init_student, objectives


def models(device: str) -> tuple[BertForSequenceClassification, BertForSequenceClassification]:
    shape = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536, "num_hidden_layers": 6}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    teacher = BertForSequenceClassification(BertConfig(**shape, **dropout)).to(device).eval().requires_grad_(False)
    return init_student(teacher, layers=[2, 4, 6]), teacher


def measure(batch: int, tokens: int, device: str, repeats: int) -> dict[str, object]:
    torch.manual_seed(0)
    student, teacher = models(device)
    ids = torch.randint(5, 30_000, (batch, tokens), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][:, tokens - tokens // 8 :] = 0
    engine = Distillation(student, teacher, [objectives.LogitsKL(temperature=2.0)])

    def by_hand() -> Tensor:
        with torch.no_grad():
            target = teacher(**inputs).logits
        logits = student(**inputs).logits
        own, wanted = (F.log_softmax(z / 2, -1) for z in (logits, target))
        loss = F.kl_div(own, wanted, log_target=True, reduction="batchmean")
        return 4 * loss

    def with_engine() -> Tensor:
        return engine(inputs).total

    seconds: dict[str, list[float]] = {"by_hand": [], "engine": []}
    for repeat in range(repeats + 3):
        # Alternate who goes first: what warms the caches must not favour one side.
        sides = [("by_hand", by_hand), ("engine", with_engine)]
        for name, step in sides if repeat % 2 else reversed(sides):
            student.zero_grad(set_to_none=True)
            start = time.perf_counter()
            step().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "batch": batch,
        "tokens": tokens,
        "device": device,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "median_ms": {name: round(1000 * value, 2) for name, value in medians.items()},
        "ratio": round(medians["engine"] / medians["by_hand"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    print(json.dumps(measure(**vars(parser.parse_args())), indent=2))


if __name__ == "__main__":
    main()
