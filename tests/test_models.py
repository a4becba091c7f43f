"""Every family of models with every objective: what works, what is refused. The table stands in docs/models.md.

After a change of the objectives or of the families, write the table anew:

    PYTHONPATH=. python tests/test_models.py
"""

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from ildistil import Distillation, objectives
from ildistil.capture.taps import STACKS
from ildistil.engine.synthetic import synthetic_batch
from ildistil.errors import CaptureError, ObjectiveError
from ildistil.objectives import Objective
from ildistil.stages import Step

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- made by tests/test_models.py -->", "<!-- end of what is made -->"
TEACHER, STUDENT = 4, 2  # layers
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = WIDE | {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = WIDE | {"vocab_size": 50, "max_position_embeddings": 32}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
DISENTANGLED = BERT | {"pos_att_type": ["c2p", "p2c"], "relative_attention": True}
GPT2 = {"n_embd": 32, "n_head": 4, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {"d_model": 32, "vocab_size": 50, "pad_token_id": 0, "decoder_start_token_id": 2}
BART = SEQ2SEQ | {
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 32,
}  # fmt: skip

Make = Callable[[int], nn.Module]


def classifier(name: str, **config: Any) -> Make:
    """A random sequence classifier of a family, by its number of layers."""

    def make(depth: int) -> nn.Module:
        settings = getattr(tf, f"{name}Config")(**config, num_hidden_layers=depth, num_labels=3)
        return getattr(tf, f"{name}ForSequenceClassification")(settings)

    return make


FAMILIES: dict[str, Make] = {
    "BERT": classifier("Bert", **BERT),
    "RoBERTa": classifier("Roberta", **BERT),
    "XLM-R": classifier("XLMRoberta", **BERT),
    "DistilBERT": lambda depth: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=32, n_layers=depth, n_heads=4, hidden_dim=64, vocab_size=50, num_labels=3)
    ),
    "ELECTRA": classifier("Electra", **BERT),
    "ALBERT": classifier("Albert", **BERT, embedding_size=16),
    "MPNet": classifier("MPNet", **BERT),
    "DeBERTa": classifier("Deberta", **DISENTANGLED),
    "DeBERTa-v2, v3": classifier("DebertaV2", **DISENTANGLED, share_att_key=True, position_buckets=4),
    "ModernBERT": classifier("ModernBert", **TEXT, cls_token_id=1, sep_token_id=2, local_attention=4),
    "GPT-2": lambda depth: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2, n_layer=depth, num_labels=3)),
    "GPT-2, language model": lambda depth: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, n_layer=depth)),
    "BERT, masked language model": lambda depth: tf.BertForMaskedLM(tf.BertConfig(**BERT, num_hidden_layers=depth)),
    "Llama": classifier("Llama", **GROUPED),
    "Qwen3": classifier("Qwen3", **GROUPED),
    "Gemma 2": classifier("Gemma2", **GROUPED, sliding_window=3),
    "T5": lambda depth: tf.T5ForConditionalGeneration(
        tf.T5Config(**SEQ2SEQ, d_kv=8, d_ff=64, num_heads=4, num_layers=depth)
    ),
    "BART": lambda depth: tf.BartForConditionalGeneration(
        tf.BartConfig(**BART, encoder_layers=depth, decoder_layers=depth)
    ),
    "ViT": lambda depth: tf.ViTForImageClassification(
        tf.ViTConfig(**WIDE, num_hidden_layers=depth, image_size=8, patch_size=4, num_labels=3)
    ),
    "`nn.TransformerEncoder`": lambda depth: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), depth, enable_nested_tensor=False
    ),
}
MIXED = {
    "BERT teaches DistilBERT": ("BERT", "DistilBERT"),
    "RoBERTa teaches ELECTRA": ("RoBERTa", "ELECTRA"),
    "DeBERTa-v3 teaches MPNet": ("DeBERTa-v2, v3", "MPNet"),
    "ModernBERT teaches BERT": ("ModernBERT", "BERT"),
    "Llama teaches GPT-2": ("Llama", "GPT-2"),
}


class Row(NamedTuple):
    teacher: str
    student: str
    stack: str | None = None


def rows() -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name in FAMILIES:
        if name in ("T5", "BART"):
            rows |= {f'{name}, `stack="{stack}"`': Row(name, name, stack) for stack in STACKS}
        else:
            rows[name] = Row(name, name)
    return rows | {name: Row(*pair) for name, pair in MIXED.items()}


ROWS = rows()
# Columns: the modules of objectives, in this order; others follow.
COLUMNS = ["task", "logits", "hidden", "contrast", "attention", "relation"]
# What the refusals have in common, and how the page says it. What matches none is said as the message says it.
REASONS = {
    "has no 'loss'": "There is no head that computes a loss.",
    "has no 'logits'": "There is no head.",
    r"compares logits of shape \(batch, labels\)": "The logits are of tokens, not of examples.",
    "can't be captured: it does not go through": "The attention is outside transformers' `AttentionInterface`.",
    "reaches no trainable parameter": "Nothing that is trained stands before what it reads.",
    "draws texts of other classes": "The examples have no classes.",
    "has no 'row_id'": "The batch has no `row_id`.",
    "The stack 'cross' has attention only": "Cross attention has no hidden states of its own.",
    "has several stacks of layers": "The objective doesn't say which stack of an encoder-decoder it compares.",
}


def concrete() -> dict[str, type[Objective]]:
    """The objectives that need no argument."""
    classes = {name: getattr(objectives, name) for name in objectives.__all__}
    return {
        name: c
        for name, c in classes.items()
        if isinstance(c, type) and issubclass(c, Objective) and not inspect.isabstract(c)
        and all(p.default is not p.empty for p in inspect.signature(c).parameters.values())
    }  # fmt: skip


def batch_for(student: nn.Module) -> dict[str, Tensor]:
    batch = synthetic_batch(student)
    if batch is None:
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        return {"src": torch.randn(2, 5, 32), "src_key_padding_mask": padding}
    return batch


def outcome(engine: Distillation, objective: type[Objective], stack: str | None) -> str:
    """Train one step: "" if it works, else the message of the refusal."""
    student, teacher = engine.student, getattr(engine.teacher, "model", None)
    assert teacher is not None
    takes_stack = "stack" in inspect.signature(objective).parameters
    student.zero_grad()
    try:
        engine.set_objectives([objective(**{"stack": stack} if stack and takes_stack else {})])
        batch = batch_for(student)
        engine.dry_run(batch)
        engine(batch, Step(0))  # a memory bank knows nothing in the first step
        term = engine(batch, Step(1)).total
    except (ObjectiveError, CaptureError) as refusal:
        return str(refusal) or "a refusal without a word"
    term.backward()
    assert torch.isfinite(term)
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(torch.isfinite(g).all() for g in gradients)
    assert gradients
    # The correlation of two rows is always 1 or -1.
    assert objective is objectives.LogitsDIST or any(g.abs().sum() > 0 for g in gradients), objective
    assert all(p.grad is None for p in teacher.parameters())
    return ""


@functools.cache
def outcomes(name: str) -> dict[str, str]:
    """What each objective says to a row."""
    row = ROWS[name]
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        student, teacher = FAMILIES[row.student](STUDENT), FAMILIES[row.teacher](TEACHER)
        engine = Distillation(student, teacher)
        engine.train()
        return {n: outcome(engine, c, row.stack) for n, c in concrete().items()}


def reason(message: str) -> str:
    for pattern, text in REASONS.items():
        if re.search(pattern, message):
            return text
    return message


def table() -> str:
    """The table of the page, with its notes."""
    groups: dict[str, list[str]] = {column: [] for column in COLUMNS}
    for name, c in concrete().items():
        groups.setdefault(c.__module__.rsplit(".", 1)[-1], []).append(name)
    notes: list[str] = []
    lines = ["| models | " + " | ".join(groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for row in ROWS:
        cells = [_cell({n: outcomes(row)[n] for n in names}, notes) for names in groups.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, start=1))])


def _cell(results: dict[str, str], notes: list[str]) -> str:
    refused: dict[int, list[str]] = {}
    for name, message in results.items():
        if message:
            note = reason(message)
            if note not in notes:
                notes.append(note)
            refused.setdefault(notes.index(note) + 1, []).append(name)
    if not refused:
        return "yes"
    if sum(map(len, refused.values())) == len(results):
        return "no (" + ", ".join(map(str, refused)) + ")"
    names = ", ".join(f"`{n}` ({number})" for number, of_note in refused.items() for n in of_note)
    return f"yes, but not {names}"


def written() -> str:
    text = PAGE.read_text(encoding="utf-8")
    return text[text.index(START) + len(START) : text.index(END)].strip()


@pytest.mark.parametrize("row", ROWS)
def test_every_objective_trains_or_says_why_not(row: str) -> None:
    results = outcomes(row)
    assert any(not message for message in results.values())
    assert "a refusal without a word" not in results.values()


def test_the_page_has_this_table() -> None:
    assert written() == table(), "run PYTHONPATH=. python tests/test_models.py"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text[: text.index(START) + len(START)], text[text.index(END) :]
    PAGE.write_text(f"{head}\n\n{table()}\n\n{tail}", encoding="utf-8")
    sys.stdout.write(f"Wrote the table of {PAGE.name}.\n")
