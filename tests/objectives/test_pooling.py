"""Which vector stands for a text: what the model's head pools, which in a causal model is the last token's state."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import tiny
from ildistil import Distillation, mappings, objectives
from ildistil.capture import Capture, Tap
from ildistil.errors import ObjectiveError
from ildistil.objectives import Objective
from ildistil.stages import Step

POOLED: dict[str, Any] = {
    "CLSMSE": objectives.CLSMSE,
    "CLSAttentiveMSE": objectives.CLSAttentiveMSE,
    "CLSContrast": lambda **options: objectives.CLSContrast(size=6, **options),
    "CLSInBatchContrast": lambda **options: objectives.CLSInBatchContrast(size=6, **options),
}
LENGTHS = (7, 4, 1)


def gpt2(layers: int, seed: int = 0) -> nn.Module:
    config = tf.GPT2Config(
        n_layer=layers, n_embd=32, n_head=4, vocab_size=50, n_positions=32, num_labels=3, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.GPT2ForSequenceClassification(config).double()


def llama(layers: int) -> nn.Module:
    config = tf.LlamaConfig(
        num_hidden_layers=layers, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=50, num_labels=3, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return tf.LlamaForSequenceClassification(config).double()


def layer_outputs(layers: nn.ModuleList, model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The output of each layer, by hand; an embedding output that nobody asks for stands first."""
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")})
    for handle in handles:
        handle.remove()
    return [torch.empty(0), *outputs]


def by_hand(states: Tensor, mask: Tensor, b: int, pool: str) -> Tensor:
    tokens = [i for i in range(mask.shape[1]) if mask[b, i]]
    chosen = {"first": tokens[:1], "last": tokens[-1:], "mean": tokens}[pool]
    return sum(states[b, i] for i in chosen) / len(chosen)


def expected(s: list[Tensor], t: list[Tensor], mask: Tensor, pools: tuple[str, str]) -> float:
    """CLSMSE between layer 1 of the student and layer 2 of the teacher."""
    total = 0.0
    for b in range(len(mask)):
        difference = by_hand(s[1], mask, b, pools[0]) - by_hand(t[2], mask, b, pools[1])
        total += sum(float(x) ** 2 for x in difference) / len(difference)
    return total / len(mask)


@pytest.mark.parametrize("padding", [{}, {"left": 2}, {"right": 3}], ids=str)
@pytest.mark.parametrize("pool", ["auto", "last", "mean"])
def test_causal_models_are_pooled_at_the_last_token(pool: str, padding: dict[str, int]) -> None:
    student, teacher = gpt2(2).eval(), llama(4).eval()
    batch = tiny.batch(LENGTHS, **padding)
    s = layer_outputs(student.transformer.h, student, batch)
    t = layer_outputs(teacher.model.layers, teacher, batch)
    term = objectives.CLSMSE(mapping=mappings.Explicit([[1, 2]]), pool=pool)
    value = Distillation(student, teacher, [term]).eval()(batch).total.item()
    how = "mean" if pool == "mean" else "last"
    assert value == pytest.approx(expected(s, t, batch["attention_mask"], (how, how)), rel=1e-9)


def test_each_model_is_pooled_where_its_own_head_does() -> None:
    student, teacher = tiny.bert(2).double().eval(), llama(4).eval()
    batch = tiny.batch(LENGTHS, left=1)
    s = layer_outputs(student.bert.encoder.layer, student, batch)
    t = layer_outputs(teacher.model.layers, teacher, batch)
    term = objectives.CLSMSE(mapping=mappings.Explicit([[1, 2]]))
    value = Distillation(student, teacher, [term]).eval()(batch).total.item()
    assert value == pytest.approx(expected(s, t, batch["attention_mask"], ("first", "last")), rel=1e-9)


@pytest.mark.parametrize("name", POOLED)
def test_terms_of_causal_models_say_something_of_the_whole_text(name: str) -> None:
    """Two batches whose texts begin alike and go on differently: the first token's state would be the same in all."""
    engine = Distillation(gpt2(2), gpt2(4, seed=1), [POOLED[name]()])
    batches = [tiny.batch((6, 6, 6), seed=seed) for seed in (1, 2)]
    for batch in batches:
        batch["input_ids"][:, 0] = 5
        batch["labels"] = torch.tensor([0, 1, 2])
    engine(batches[0], Step(0))  # a bank knows nothing before
    first, second = (engine(batch, Step(1)).total for batch in batches)
    assert not torch.isclose(first, second)
    first.backward()
    later = engine.student.transformer.wpe.weight.grad[5]
    assert later.abs().sum() > 0


@pytest.mark.parametrize("name", POOLED)
def test_the_first_token_of_a_causal_model_is_refused(name: str) -> None:
    engine = Distillation(gpt2(2), gpt2(4), [POOLED[name](pool="first")])
    with pytest.raises(ObjectiveError, match="the model is causal, so its first token sees no other"):
        engine(tiny.batch(), Step(0))  # as in a dry run: only a run tells
    Distillation(tiny.bert(2), tiny.bert(4), [POOLED[name](pool="first")])(tiny.batch(), Step(0))


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("pool", ["first", "last", "mean"])
def test_every_pooling_in_half_precision(name: str, pool: str) -> None:
    term: Objective = POOLED[name](pool=pool)
    engine = Distillation(tiny.bert(2, width=16).bfloat16(), tiny.bert(4), [term])
    for step in range(2):
        value = engine(tiny.batch(), Step(step)).total
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


def test_half_precision_states_that_are_computed_in_float32_fit_the_map() -> None:
    engine = Distillation(tiny.bert(2).bfloat16(), tiny.bert(4), [objectives.AttentionOutputMSE(projection="always")])
    engine(tiny.batch()).total.backward()
    assert all(p.grad is not None for p in engine.projections.parameters())


MODERN = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 50,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip


def modern(pooling: str) -> nn.Module:
    return tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**MODERN, classifier_pooling=pooling))


def test_a_head_that_takes_the_mean() -> None:
    model = modern("mean").double().eval()
    teacher = tiny.bert(4).double().eval()
    batch = tiny.batch(LENGTHS, right=2)
    s = layer_outputs(model.model.layers, model, {k: batch[k] for k in batch})
    t = layer_outputs(teacher.bert.encoder.layer, teacher, batch)
    term = objectives.CLSMSE(mapping=mappings.Explicit([[1, 2]]))
    value = Distillation(model, teacher, [term]).eval()(batch).total.item()
    assert value == pytest.approx(expected(s, t, batch["attention_mask"], ("mean", "first")), rel=1e-9)


def test_what_is_known_of_the_pooling() -> None:
    def known(model: nn.Module, batch: dict[str, Tensor], layers: int = 2) -> tuple[bool | None, str]:
        seen = Capture(model, [Tap("hidden", layers)])(batch)
        return seen.causal, seen.pooling

    text = {k: v for k, v in tiny.batch(labels=2).items() if k in ("input_ids", "attention_mask")}
    assert known(tiny.bert(2), text) == (False, "first")
    assert known(tiny.bert(2, is_decoder=True).bert, text)[0] is True
    assert known(gpt2(2), text) == (True, "last")
    assert known(llama(2), text) == (True, "last")
    assert known(modern("cls"), text) == (False, "first")
    assert known(modern("mean"), text) == (False, "mean")
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, batch_first=True), 2, enable_nested_tensor=False)
    assert known(plain, {"src": torch.randn(2, 5, 32)}) == (None, "first")
    t5 = tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_heads=4, num_layers=2, vocab_size=50, decoder_start_token_id=0)
    )
    seen = Capture(t5, [Tap("hidden", 2, "encoder"), Tap("hidden", 2, "decoder")])(text | {"labels": text["input_ids"]})
    assert {name: seen.stack(name).causal for name in ("encoder", "decoder")} == {"encoder": False, "decoder": True}
