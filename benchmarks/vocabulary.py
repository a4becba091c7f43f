"""Distilling the logits of a language model: all of them made by the models, or a few target rows at a time.

A 6-layer teacher and a 3-layer student of width 384 over 30,522 tokens; masked (15 % of the tokens are targets) and
next tokens; ``LogitsKL`` alone, and with ``TaskLoss``. Time and peak memory of forward and backward pass.

``python benchmarks/vocabulary.py``
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from measure import NO_DROPOUT, SHAPE, finish, interleaved, options, peak_memory
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from ildistil import Distillation, init_student, objectives


def teacher(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "masked":
        return BertForMaskedLM(BertConfig(**SHAPE, **NO_DROPOUT))
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "loss_type": "ForCausalLM"}
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=384, n_layer=6, n_head=12, vocab_size=30_522, **special, **dropout))


def text(kind: str, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 30_000, (batch, tokens))
    targets = torch.rand(batch, tokens) < 0.15 if kind == "masked" else torch.ones_like(ids, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(targets, ids, -100)}


def step(kind: str, both: bool, whole: bool, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    terms = [objectives.LogitsKL(), *([objectives.TaskLoss()] if both else [])]
    trained = teacher(kind)
    engine = Distillation(init_student(trained, layers=[2, 4, 6]), trained, terms)
    if whole:  # models that don't name their output layer are distilled this way
        for model in (engine.student, trained):
            model.get_output_embeddings = lambda: None
        engine.attach()
    engine({name: value[:2] for name, value in batch.items()})  # the first step looks how it may go

    def run() -> None:
        engine(batch).total.backward()
        engine.zero_grad()

    return run


def measure(chosen: SimpleNamespace, kind: str, both: bool) -> list[list[object]]:
    batch = text(kind, chosen.batch, chosen.tokens)
    steps = {name: step(kind, both, name == "whole", batch) for name in ("whole", "target rows")}
    memory = {name: peak_memory(run) for name, run in steps.items()}
    seconds = interleaved(steps, chosen.repeats)
    terms = "LogitsKL + TaskLoss" if both else "LogitsKL"
    return [[kind, terms, name, seconds[name], memory[name] / 2**20] for name in steps]


if __name__ == "__main__":
    chosen = options(__doc__, batch=16, tokens=128, repeats=5).parse_args()
    rows = [row for kind in ("masked", "next") for both in (False, True) for row in measure(chosen, kind, both)]
    finish("vocabulary", ["tokens", "objectives", "logits", "s", "peak MiB"], rows, chosen.json, batch=chosen.batch)
