"""What attention objectives add to a training step of plain distillation, and what they cost elsewhere.

A 6-layer teacher and a 3-layer student of width 384, attention dropout 0, logits distilled on every side, the attention
objectives on all three student layers (``RelationKL`` on the last). Forward and backward pass, interleaved in one
process, medians. Beside ours:

- ``as usual``: eager attention, ``output_attentions``, divergence of the probabilities of all layers;
- ``from scores``: eager attention that keeps the scores of all layers of both models, as research code does;
- ``TextBrewer``: its GeneralDistiller with three attention matches, where it is installed (``pip install textbrewer``).

``python benchmarks/attention.py``, or one shape: ``python benchmarks/attention.py --batch 8 --tokens 512``. Ours alone,
more often: ``--others no --repeats 25``
"""

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from measure import finish, inputs, interleaved, models, options
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ildistil import Distillation, objectives

SHAPES = [(64, 64), (32, 128), (8, 512)]
Step = Callable[[], None]


def ours(batch: dict[str, Tensor], *terms: objectives.Objective, compiled: bool = False) -> Step:
    engine = Distillation(*models(), [objectives.LogitsKL(), *terms])
    if compiled:
        engine.compile()
    return lambda: engine(batch).total.backward()


def _logits_kl(own: Tensor, wanted: Tensor) -> Tensor:
    return 4 * F.kl_div(F.log_softmax(own / 2, -1), F.softmax(wanted / 2, -1), reduction="batchmean")


def usual(batch: dict[str, Tensor]) -> Step:
    """The divergence of probabilities that the models give out."""
    student, teacher = models(attn_implementation="eager")
    real = batch["attention_mask"].bool()

    def step() -> None:
        with torch.no_grad():
            wanted = teacher(**batch, output_attentions=True)
        own = student(**batch, output_attentions=True)
        loss = _logits_kl(own.logits, wanted.logits)
        for mine, theirs in zip(own.attentions, wanted.attentions[1::2], strict=True):
            rows = (theirs * (theirs.clamp(min=1e-7).log() - mine.clamp(min=1e-7).log())).sum(-1).mean(1)
            loss = loss + ((rows * real).sum(1) / real.sum(1)).mean() / 3
        loss.backward()

    return step


_scores: list[Tensor] = []


def _keeping_scores(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    scores = query @ key.mT * scaling
    scores = scores if mask is None else scores + mask
    _scores.append(scores)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def from_scores(batch: dict[str, Tensor]) -> Step:
    """The divergence of the softmax of scores that all layers keep."""
    AttentionInterface.register("keeping_scores", _keeping_scores)
    AttentionMaskInterface.register("keeping_scores", eager_mask)
    student, teacher = models(attn_implementation="keeping_scores")
    real = batch["attention_mask"].bool()

    def run(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
        _scores.clear()
        return model(**batch).logits, list(_scores)

    def step() -> None:
        with torch.no_grad():
            wanted, theirs = run(teacher)
        own, mine = run(student)
        loss = _logits_kl(own, wanted)
        for s, t in zip(mine, theirs[1::2], strict=True):
            rows = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="none").sum(-1).mean(1)
            loss = loss + ((rows * real).sum(1) / real.sum(1)).mean() / 3
        _scores.clear()
        loss.backward()

    return step


def textbrewer(batch: dict[str, Tensor]) -> Step | None:
    """The forward pass and the losses of its distiller."""
    try:
        from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
    except ImportError:
        return None
    logging.getLogger("Distillation").setLevel(logging.ERROR)
    student, teacher = models(attn_implementation="eager")
    matches = [
        {"layer_T": t, "layer_S": s, "feature": "attention", "loss": "attention_ce", "weight": 1 / 3}
        for s, t in enumerate((1, 3, 5))
    ]

    def adaptor(batch: dict[str, Tensor], output: Any) -> dict[str, Any]:
        return {
            "logits": (output.logits,), "attention": output.attentions, "inputs_mask": batch["attention_mask"],
        }  # fmt: skip

    config = DistillationConfig(temperature=2, intermediate_matches=matches)
    distiller = GeneralDistiller(TrainingConfig(device="cpu"), config, teacher, student, adaptor, adaptor)
    wanted = batch | {"output_attentions": True}

    def step() -> None:
        distiller.train_on_batch(wanted, {})[0].backward()

    return step


def measure(batch: int, tokens: int, chosen: SimpleNamespace) -> list[list[object]]:
    seen = inputs(batch, tokens)
    steps: dict[str, Step | None] = {
        "LogitsKL alone": ours(seen),
        "+ AttentionKL": ours(seen, objectives.AttentionKL()),
        "+ AttentionMSE": ours(seen, objectives.AttentionMSE()),
        "+ RelationKL": ours(seen, objectives.RelationKL()),
        "+ HiddenMSE": ours(seen, objectives.HiddenMSE()),
    }
    if chosen.others == "yes":
        steps["+ AttentionKL, as usual"] = usual(seen)
        steps["+ AttentionKL, from scores"] = from_scores(seen)
        steps["+ attention, TextBrewer"] = textbrewer(seen)
    if chosen.compile == "yes":
        steps["LogitsKL alone, compiled"] = ours(seen, compiled=True)
        steps["+ AttentionKL, compiled"] = ours(seen, objectives.AttentionKL(), compiled=True)
    seconds = interleaved({name: step for name, step in steps.items() if step is not None}, chosen.repeats)
    floor, own = seconds["LogitsKL alone"], seconds["+ AttentionKL"]
    return [[f"{batch} x {tokens}", name, 1e3 * s, s / floor, s / own] for name, s in seconds.items()]


if __name__ == "__main__":
    chosen = options(__doc__, batch=0, tokens=512, repeats=7, others="yes", compile="no").parse_args()
    shapes = [(chosen.batch, chosen.tokens)] if chosen.batch else SHAPES
    rows = [row for shape in shapes for row in measure(*shape, chosen)]
    header = ["batch", "objectives", "ms", "of LogitsKL alone", "of + AttentionKL"]
    finish("attention", header, rows, chosen.json, repeats=chosen.repeats)
