import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
from ildistil import Distillation, mappings, objectives
from ildistil.capture import Activations, Attention, Capture, ModelInfo, Tap, find_layers
from ildistil.errors import CaptureError, ObjectiveError

ALL = {Tap("hidden", i) for i in range(5)} | {Tap("attention", i) for i in range(1, 5)} | {Tap("logits")}
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "BERT": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SMALL)),
    "RoBERTa": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**SMALL)),
    "ELECTRA": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**SMALL)),
    "ALBERT": lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**SMALL, embedding_size=16)),
    "DistilBERT": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(dim=32, n_layers=4, n_heads=4, hidden_dim=64, vocab_size=50)
    ),
    "ModernBERT": lambda: tf.ModernBertForSequenceClassification(
        tf.ModernBertConfig(**SMALL, **SPECIAL, cls_token_id=1, sep_token_id=2, local_attention=4)
    ),
    "GPT-2": lambda: tf.GPT2ForSequenceClassification(
        tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=50, **SPECIAL)
    ),
    "Llama": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SMALL, **SPECIAL, num_key_value_heads=2)),
    "Gemma 2": lambda: tf.Gemma2ForSequenceClassification(
        tf.Gemma2Config(**SMALL, **SPECIAL, num_key_value_heads=2, head_dim=8, sliding_window=3)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_what_the_model_attends_with(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """softmax(scores) v, under the understood masks, is what the model's implementation gives, in every layer."""
    model, outputs = FAMILIES[family]().eval(), []
    batch = {k: v for k, v in tiny.batch((7, 4, 6)).items() if k != "position_ids"}
    with torch.no_grad():
        plain = model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits
        capture = Capture(model, ALL)
        eager = getattr(sys.modules[type(model).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(model.config._attn_implementation, eager)

        def keep_output(*args: Any, **kwargs: Any) -> Any:
            result = attend(*args, **kwargs)
            outputs.append(result[0])
            return result

        monkeypatch.setitem(AttentionInterface._global_mapping, model.config._attn_implementation, keep_output)
        seen = capture(batch, verify=True)
    assert torch.equal(seen.logits, plain)
    assert sorted(seen.attention) == [1, 2, 3, 4]
    for layer, output in enumerate(outputs, start=1):
        attention = seen.attention[layer]
        weights = attention.score_map().masked_fill(~attention.allowed_map(), -1e9).softmax(-1)
        value = attention.value.repeat_interleave(attention.heads // attention.value.shape[1], dim=1)
        expected = (weights @ value).transpose(1, 2).reshape(output.shape)
        torch.testing.assert_close(expected[seen.mask], output[seen.mask], rtol=1e-4, atol=1e-5)


ENCODER_DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "T5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=32, d_kv=8, d_ff=64, num_layers=4, num_decoder_layers=3, num_heads=4, vocab_size=50,
            decoder_start_token_id=0,
        )
    ),
    "BART": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            d_model=32, encoder_layers=4, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, max_position_embeddings=32, layerdrop=0.0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
        )
    ),
}  # fmt: skip
OUTSIDE: dict[str, Callable[[], PreTrainedModel]] = {
    "MPNet": lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**SMALL, initializer_range=0.3)),
    "DeBERTa": lambda: tf.DebertaForSequenceClassification(
        tf.DebertaConfig(
            **SMALL, pos_att_type=["c2p", "p2c"], relative_attention=True, max_relative_positions=4,
            initializer_range=0.3,
        )
    ),
    "DeBERTa without positions": lambda: tf.DebertaForSequenceClassification(
        tf.DebertaConfig(**SMALL, initializer_range=0.3)
    ),
    "DeBERTa-v2": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(**SMALL, pos_att_type=["c2p", "p2c"], relative_attention=True, initializer_range=0.3)
    ),
    "DeBERTa-v3": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            **SMALL, pos_att_type=["c2p", "p2c"], relative_attention=True, share_att_key=True, position_buckets=4,
            norm_rel_ebd="layer_norm", initializer_range=0.3,
        )
    ),
}  # fmt: skip


def assert_probabilities(seen: Attention, expected: torch.Tensor) -> None:
    weights = seen.score_map().masked_fill(~seen.allowed_map(), -1e9).softmax(-1)
    real = seen.real()
    assert weights.shape == expected.shape
    assert weights.std() > 0.01
    torch.testing.assert_close(weights.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-5, atol=1e-7)


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """Make the attention far from uniform, and the position biases large."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and any(part in name for part in ("q", "k", "relative")):
                parameter.mul_(8)
    return model.double().eval()


@pytest.mark.parametrize("family", OUTSIDE)
def test_attention_outside_the_interface_is_what_the_model_attends_with(family: str) -> None:
    model = OUTSIDE[family]().double().eval()
    batch = {k: v for k, v in tiny.batch((7, 4, 6)).items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain = model(**batch, output_attentions=True)
        capture = Capture(model, ALL)
        seen = capture(batch, verify=True)
        value = seen.attention[2].value
    assert torch.equal(seen.logits, plain.logits)
    assert value.shape == (3, 4, 7, 8)
    for layer, expected in enumerate(plain.attentions, start=1):
        assert_probabilities(seen.attention[layer], expected)
    capture.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", OUTSIDE)
def test_values_outside_the_interface_are_those_of_the_model(family: str) -> None:
    """The probabilities applied to the values are what the attention module gives."""
    model, contexts = OUTSIDE[family]().double().eval(), []
    layers = find_layers(model)
    for layer in layers:
        module = layer.attention.attn.o if family == "MPNet" else layer.attention.output.dense
        module.register_forward_pre_hook(lambda m, args: contexts.append(args[0]))
    with torch.no_grad():
        seen = Capture(model, ALL)({k: v for k, v in tiny.batch().items() if k in ("input_ids", "attention_mask")})
    for record, context in zip(seen.attention.values(), contexts, strict=True):
        weights = record.score_map().masked_fill(~record.allowed_map(), -1e9).softmax(-1)
        expected = (weights @ record.value).transpose(1, 2).flatten(2)
        torch.testing.assert_close(expected[seen.mask], context[seen.mask], rtol=1e-5, atol=1e-7)


def switch(model: PreTrainedModel, implementation: str) -> None:
    for part in model.modules():  # T5's stacks have configs of their own, which not every transformers sees
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(implementation)


def stacked(depths: dict[str, int]) -> set[Tap]:
    taps = {Tap("attention", i, stack) for stack, depth in depths.items() for i in range(1, depth + 1)}
    return taps | {Tap("hidden", i, s) for s, depth in depths.items() if s != "cross" for i in range(depth + 1)}


def translation() -> dict[str, torch.Tensor]:
    """Sources and targets with padding; the targets' by -100."""
    source, target = tiny.batch((7, 4, 6)), tiny.batch((5, 3, 2), seed=1)
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
    return {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": labels}


@pytest.mark.parametrize("told", ["labels", "decoder_attention_mask", "decoder_input_ids"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_three_stacks_of_an_encoder_decoder(family: str, implementation: str, told: str) -> None:
    model, batch = spread(ENCODER_DECODERS[family]()), translation()
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    if told == "decoder_attention_mask":
        inputs["decoder_attention_mask"] = (batch["labels"] != -100).long()
    with torch.no_grad():
        switch(model, "eager")
        eager = model(**inputs, output_attentions=True, output_hidden_states=True)
        switch(model, implementation)
        plain = model(**inputs, use_cache=False)
        capture = Capture(model, stacked({"encoder": 4, "decoder": 3, "cross": 3}) | {Tap("logits")})
        seen = capture(batch if told == "labels" else inputs, verify=True)
    assert torch.equal(seen.logits, plain.logits)
    for stack in ("encoder", "decoder", "cross"):
        part, expected = seen.stack(stack), eager[f"{stack}_attentions"]
        assert part.output is seen.output
        assert list(part.attention) == list(range(1, len(expected) + 1))
        for layer, probabilities in enumerate(expected, start=1):
            assert_probabilities(part.attention[layer], probabilities)
    for stack in ("encoder", "decoder"):
        states = eager[f"{stack}_hidden_states"]
        for layer in range(len(states) - 1):  # the last of transformers may be behind a final norm
            torch.testing.assert_close(seen.stack(stack).hidden[layer], states[layer], rtol=1e-9, atol=1e-10)
    assert torch.equal(seen.stack("encoder").mask, batch["attention_mask"] != 0)
    real = batch["labels"] != -100
    if told == "decoder_input_ids":  # what follows the last token that isn't padding; the input is shifted by one
        real = torch.cat([torch.ones(3, 1, dtype=torch.bool), real[:, :-1]], 1)
    assert torch.equal(seen.mask, real)
    assert torch.equal(seen.stack("cross").mask, real)
    assert seen.stack("cross").attention[1].query.shape[2:] != seen.stack("cross").attention[1].key.shape[2:]
    capture.close()
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    assert {part.config._attn_implementation for part in parts} == {implementation}


@pytest.mark.parametrize("stack", ["encoder", "decoder", "cross"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_padding_changes_nothing_in_any_stack(family: str, stack: str) -> None:
    """Padding of source or target doesn't reach an objective of any stack."""
    student, teacher = (spread(ENCODER_DECODERS[family]()) for _ in range(2))
    engine = Distillation(student, teacher, [objectives.AttentionKL(stack=stack)]).eval()
    batch = translation()
    padded = {
        "input_ids": nn.functional.pad(batch["input_ids"], (0, 3)),
        "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 3)),
        "labels": nn.functional.pad(batch["labels"], (0, 2), value=-100),
    }
    terms = [engine(b, verify=True).total for b in (batch, padded)]
    assert terms[0] > 1e-3
    torch.testing.assert_close(*terms, rtol=1e-9, atol=0)
    terms[0].backward()
    with_loss = Distillation(student, None, [objectives.TaskLoss()]).eval()(batch).total
    assert with_loss.item() == pytest.approx(student(**batch).loss.item())


def test_stacks_have_sizes_of_their_own() -> None:
    sizes = ModelInfo.of(ENCODER_DECODERS["BART"]())
    assert {name: (s.depth, s.width, s.heads) for name, s in sizes.stacks.items()} == {
        "encoder": (4, 32, 4), "decoder": (3, 32, 2), "cross": (3, 32, 2),
    }  # fmt: skip
    assert sizes.stack("decoder").stack(None).depth == 3
    assert hash(sizes)
    with pytest.raises(CaptureError, match="several stacks of layers.*name one: stack='encoder' or"):
        sizes.stack(None)
    single = ModelInfo.of(tiny.bert(2))
    assert single.stack(None) is single
    with pytest.raises(CaptureError, match="has a single stack of layers, and none named 'encoder'. Leave stack out"):
        single.stack("encoder")


def test_stacks_must_be_named_and_cross_has_no_hidden_states() -> None:
    model = ENCODER_DECODERS["T5"]()
    for tap, message in (
        (Tap("hidden", 1), "none is named: name one: stack='encoder'"),
        (Tap("attention", 1, "middle"), "none is named 'middle': name one"),
        (Tap("hidden", 1, "cross"), "has attention only"),
    ):
        with pytest.raises(CaptureError, match=message):
            Capture(model, {tap})
    with pytest.raises(CaptureError, match="has a single stack of layers, and none named 'decoder'"):
        Capture(tiny.bert(2), {Tap("hidden", 1, "decoder")})
    seen = Capture(model, {Tap("hidden", 2, "decoder")})(translation())
    with pytest.raises(CaptureError, match=r"decoder.hidden\[1\] was not captured; captured: \[2\]"):
        seen.stack("decoder").hidden[1]
    with pytest.raises(CaptureError, match="several stacks"):
        seen.stack(None)
    plain = Capture(tiny.bert(2), {Tap("logits")})(tiny.batch())
    assert plain.stack(None) is plain


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_layer_that_does_not_run_is_found_in_each_stack(family: str) -> None:
    model = ENCODER_DECODERS[family]()
    decoder = Capture(model, {Tap("attention", 3, "cross")})
    encoder = Capture(model, {Tap("hidden", 4, "encoder")})
    stack = model.get_decoder().block if family == "T5" else model.get_decoder().layers
    del stack[2]
    encoder(translation())
    with pytest.raises(CaptureError, match=r"ran 2 layers, its depth is 3 \(stack 'cross'\)"):
        decoder(translation())


def test_a_causal_model_predicts_the_next_token() -> None:
    def next_token(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> bool | None:
        return Capture(model, {Tap("logits")})(batch).next_token

    gpt2 = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, pad_token_id=0)
    llama = tf.LlamaConfig(**SMALL, **SPECIAL)
    text = {key: tiny.batch()[key] for key in ("input_ids", "attention_mask")}
    assert next_token(tf.GPT2LMHeadModel(gpt2), text)
    assert next_token(tf.LlamaForCausalLM(llama), text)
    assert next_token(tf.BertForMaskedLM(tiny.bert(1).config), text) is False
    assert next_token(tf.GPT2ForSequenceClassification(gpt2), text) is None
    assert next_token(ENCODER_DECODERS["T5"](), translation()) is False


def test_images_have_no_padding() -> None:
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4,
        initializer_range=0.3, num_labels=3,
    )  # fmt: skip
    model, batch = tf.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 8, 8)}
    model.set_attn_implementation("eager")
    expected = model(**batch, output_attentions=True, output_hidden_states=True)
    seen = Capture(model, ALL)(batch, verify=True)
    assert seen.mask.shape == (2, 5)
    assert seen.mask.all()
    for layer in range(1, 5):
        assert_probabilities(seen.attention[layer], expected.attentions[layer - 1])
        torch.testing.assert_close(seen.hidden[layer], expected.hidden_states[layer])


def test_hidden_states_are_those_of_transformers() -> None:
    model, batch = tiny.bert(4).eval(), tiny.batch()
    expected = model(**{k: v for k, v in batch.items() if k != "row_id"}, output_hidden_states=True).hidden_states
    seen = Capture(model, ALL)(batch)
    for layer in range(5):
        assert torch.equal(seen.hidden[layer], expected[layer])
    assert torch.equal(seen.hidden[-1], expected[4])
    assert torch.equal(seen.hidden[-5], expected[0])


def test_only_wanted_layers_are_kept() -> None:
    seen = Capture(tiny.bert(4), {Tap("hidden", 2), Tap("attention", 3), Tap("bert.pooler")})(tiny.batch())
    assert list(seen.hidden) == [2]
    assert list(seen.attention) == [3]
    assert seen.modules["bert.pooler"].shape == (3, 32)
    with pytest.raises(CaptureError, match=r"hidden\[1\] was not captured; captured: \[2\]"):
        seen.hidden[1]


def test_only_parts_that_are_read_are_kept() -> None:
    model = tiny.bert(4).eval()
    whole = Capture(model, {Tap("attention", 3)})(tiny.batch()).attention[3]
    seen = Capture(model, {Tap("attention", 3, parts="qk"), Tap("attention", 4, parts="v")}, "teacher")(tiny.batch())
    assert torch.equal(seen.attention[3].score_map(), whole.score_map())
    for unread in (seen.attention[3].value, seen.attention[4].query, seen.attention[4].key):
        assert unread.shape == whole.query.shape
        assert unread.isnan().all()
        assert unread.untyped_storage().nbytes() == unread.element_size()


def test_a_teacher_keeps_what_the_objectives_read() -> None:
    """One objective's parts don't shadow another's."""
    student, teacher = tiny.bert(2), tiny.bert(4)
    terms = [
        objectives.AttentionKL(mapping=mappings.Last()),
        objectives.ValueRelationKL(),
        objectives.AttentionOutputMSE(),
    ]
    assert all(check.value > 0 for check in Distillation(student, teacher, terms).dry_run(tiny.batch()).terms.values())


class Watch(objectives.Objective):
    """Notes which of the teacher's attention is still there."""

    taps = ("logits",)
    left: list[int]

    def loss(self, student: Activations, teacher: Activations, batch: Mapping[str, Any]) -> torch.Tensor:
        self.left = list(teacher.attention)
        return student.logits.square().mean()


def test_layers_of_the_teacher_go_with_their_last_reader() -> None:
    between, after = Watch(name="between"), Watch(name="after")
    terms = [objectives.AttentionKL(), between, objectives.AttentionMSE(), after]
    both = Distillation(tiny.bert(2), tiny.bert(4), terms)(tiny.batch()).values
    assert (between.left, after.left) == ([2, 4], [])
    for name, objective in (("attention_kl", objectives.AttentionKL()), ("attention_mse", objectives.AttentionMSE())):
        alone = Distillation(tiny.bert(2), tiny.bert(4), [objective])(tiny.batch()).values
        torch.testing.assert_close(both[name], alone[name])


def test_layers_of_several_pairs_stay_until_the_last() -> None:
    many = mappings.Explicit([[1, 4], [2, 3], [2, 4]])
    engine = Distillation(
        tiny.bert(2), tiny.bert(4), [objectives.AttentionKL(mapping=many), objectives.HiddenMSE(mapping=many)]
    )
    assert engine(tiny.batch()).total.isfinite()


def test_a_run_records_only_what_it_is_asked_for() -> None:
    model = tiny.bert(4)
    taps = frozenset({Tap("hidden", 2), Tap("hidden", 3), Tap("attention", 3), Tap("bert.pooler"), Tap("loss")})
    capture = Capture(model, taps)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    seen = capture(tiny.batch(), wanted=frozenset({Tap("hidden", 2)}))
    assert (list(seen.hidden), list(seen.attention), seen.modules) == ([2], [], {})
    assert seen.output is None  # the run stopped after layer 2
    seen = capture(tiny.batch(), wanted=frozenset({Tap("attention", 3), Tap("loss")}))
    assert (list(seen.hidden), list(seen.attention), seen.modules) == ([], [3], {})
    assert seen.loss > 0
    assert set(capture(tiny.batch()).modules) == {"bert.pooler"}
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(CaptureError, match=r"was not made for hidden\[1\]; it was made for attention\[3\], bert"):
        capture(tiny.batch(), wanted=frozenset({Tap("hidden", 1)}))


def test_attention_loss_with_dropout_equals_a_loop_over_scores_before_dropout() -> None:
    dropout = {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.0}
    student, teacher = tiny.bert(2, **dropout).double(), tiny.bert(2, seed=5, **dropout).double()
    engine = Distillation(student, teacher, [objectives.AttentionKL()])
    rows: dict[tuple[int, str], torch.Tensor] = {}
    for role, model in enumerate((student, teacher)):
        for layer, block in enumerate(model.bert.encoder.layer):
            for part in ("query", "key"):

                def keep(
                    m: nn.Module, a: object, out: torch.Tensor, key: tuple[int, str] = (10 * role + layer, part)
                ) -> None:
                    rows[key] = out.detach().unflatten(-1, (4, 8))

                getattr(block.attention.self, part).register_forward_hook(keep)
    batch = tiny.batch()
    term = engine(batch).total.item()
    expected = 0.0
    for layer in range(2):
        for b, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            for h in range(4):
                for i in range(length):
                    p, q = (
                        torch.softmax(
                            rows[r + layer, "key"][b, :length, h] @ rows[r + layer, "query"][b, i, h] / 8**0.5, 0
                        )
                        for r in (10, 0)
                    )
                    expected += float((p * (p / q).log()).sum()) / (2 * 3 * 4 * length)
    assert term == pytest.approx(expected, rel=1e-10)


def enable_checkpointing(model: PreTrainedModel, *options: dict[str, bool]) -> None:
    """transformers 5.23 calls it activation checkpointing, and warns of the old name."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*options)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo hides it from users, not from pytest
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_and_compile_give_the_same_gradients(checkpointing: bool, compiled: bool) -> None:
    def gradients(change: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        student = tiny.bert(2).double()
        engine = Distillation(
            student,
            tiny.bert(4, seed=1).double(),
            [objectives.AttentionKL(), objectives.HiddenMSE(), objectives.LogitsKL()],
        )
        if change and checkpointing:
            enable_checkpointing(student)
        if change and compiled:
            student.compile(backend="aot_eager", fullgraph=not checkpointing)
        for _ in range(2):  # the second run of a compiled model must record too
            student.zero_grad()
            engine(tiny.batch()).total.backward()
        return [p.grad for p in student.parameters()]

    for plain, changed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, changed, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("family", "change"),
    [("MPNet", "compile"), ("DeBERTa", "checkpointing"), ("DeBERTa-v3", "checkpointing"), ("DeBERTa-v3", "compile")],
)
def test_projections_are_read_in_checkpointed_and_compiled_models_too(family: str, change: str) -> None:
    def gradients(changed: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        student, teacher = (OUTSIDE[family]().double() for _ in range(2))
        terms = [objectives.AttentionKL(), objectives.RelationKL(), objectives.HiddenMSE()]
        engine = Distillation(student, teacher, terms).eval()
        if changed and change == "checkpointing":
            engine.train()
            for module in student.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            enable_checkpointing(student)
        elif changed:
            student.compile(backend="aot_eager")
        batch = {k: v for k, v in tiny.batch(labels=2).items() if k in ("input_ids", "attention_mask")}
        engine(batch).total.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]

    for plain, changed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, changed, rtol=1e-7, atol=1e-10)


def test_reentrant_checkpointing_is_refused() -> None:
    student = tiny.bert(2)
    enable_checkpointing(student, {"use_reentrant": True})
    with pytest.raises(CaptureError, match="reentrant gradient checkpointing"):
        Distillation(student, tiny.bert(4), [objectives.AttentionKL()])(tiny.batch())


def test_a_shared_config_is_separated() -> None:
    teacher = tiny.bert(4)
    student = tf.BertForSequenceClassification(teacher.config)
    assert student.config is teacher.config
    engine = Distillation(student, teacher, [objectives.AttentionKL()])
    configs = {id(m.config) for m in student.modules() if hasattr(m, "config")}
    assert configs.isdisjoint({id(m.config) for m in teacher.modules() if hasattr(m, "config")})
    engine.release()
    student.set_attn_implementation("eager")
    assert teacher.config._attn_implementation == "sdpa"


def test_release_gives_the_models_back() -> None:
    student, teacher = tiny.bert(2), tiny.bert(4)
    engine = Distillation(student, teacher, [objectives.AttentionKL(), objectives.HiddenMSE()])
    for model in (student, teacher):
        assert model.config._attn_implementation == "sdpa"
    engine(tiny.batch())
    engine.release()
    for model in (student, teacher):
        assert model.config._attn_implementation == "sdpa"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_recording_outlives_a_copy_of_the_model(tmp_path: object) -> None:
    student = tiny.bert(2)
    engine = Distillation(student, tiny.bert(4), [objectives.AttentionKL()])
    twin = copy.deepcopy(student)
    twin(**{k: v for k, v in tiny.batch().items() if k != "row_id"})
    engine(tiny.batch()).total.backward()
    assert student.bert.encoder.layer[0].attention.self.query.weight.grad is not None


def test_attention_outside_the_interface_is_refused() -> None:
    model = tf.XLNetForSequenceClassification(
        tf.XLNetConfig(d_model=32, n_layer=4, n_head=4, d_inner=64, vocab_size=50)
    )
    message = "can't be captured: it does not go through transformers' AttentionInterface, nor"
    with pytest.raises(CaptureError, match=message):
        Capture(model, {Tap("attention", 1)})
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    with pytest.raises(CaptureError, match=message):
        Capture(plain, {Tap("attention", 1)})


def test_talking_heads_give_relations_but_no_scores() -> None:
    config = tf.DebertaConfig(**SMALL, pos_att_type=["c2p"], relative_attention=True, talking_head=True)
    student, teacher = tf.DebertaForSequenceClassification(config), tf.DebertaForSequenceClassification(config)
    batch = {k: v for k, v in tiny.batch(labels=2).items() if k != "position_ids"}
    assert Distillation(student, teacher, [objectives.RelationKL()])(batch).total > 0
    with pytest.raises(CaptureError, match="its heads are mixed after the product.*Use RelationKL"):
        Distillation(student, teacher, [objectives.AttentionKL()]).dry_run(batch)


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"no module 'bert.poler'.*at the top are \['bert', 'dropout', 'classifier'\]"
    ):
        Capture(tiny.bert(2), {Tap("bert.poler")})


def test_a_layer_that_does_not_run_is_an_error() -> None:
    model = tiny.bert(4)
    capture = Capture(model, {Tap("hidden", 4)}, "teacher")
    del model.bert.encoder.layer[3]
    with pytest.raises(CaptureError, match="ran 3 layers, its depth is 4"):
        capture(tiny.batch())


def test_a_mask_that_is_not_understood_is_refused() -> None:
    batch = tiny.batch()
    batch["attention_mask"] = batch["attention_mask"][:, None, None, :].expand(-1, 1, 7, -1)
    with pytest.raises(CaptureError, match=r"must have the shape \(batch, tokens\), got \(3, 1, 7, 7\)"):
        Capture(tiny.bert(2), {Tap("attention", 1)})(batch)


def test_a_model_that_masks_otherwise_is_refused_in_the_dry_run() -> None:
    decoder = tiny.bert(2, is_decoder=True)
    for layer in decoder.bert.encoder.layer:
        layer.attention.self.is_causal = False  # what the record will say; the mask that arrives is causal
    capture = Capture(decoder, {Tap("attention", 1)})
    with pytest.raises(CaptureError, match="uses a mask that is not its padding mask"):
        capture(tiny.batch(), verify=True)


def test_missing_logits_and_loss_name_the_remedy() -> None:
    base = tiny.bert(2).bert
    with pytest.raises(ObjectiveError, match="the student makes none.*has no 'logits'. Use a model with a head"):
        Distillation(base, tiny.bert(4), [objectives.LogitsMSE()])(tiny.batch())
    unlabelled = {k: v for k, v in tiny.batch().items() if k != "labels"}
    with pytest.raises(CaptureError, match="Give the batch 'labels'"):
        Distillation(tiny.bert(2), None, [objectives.TaskLoss()])(unlabelled)


def test_a_module_path_can_be_distilled() -> None:
    class PoolerMSE(objectives.Objective):
        taps = ("bert.pooler",)

        def loss(self, student, teacher, batch):  # type: ignore[no-untyped-def]
            return (student.modules["bert.pooler"] - teacher.modules["bert.pooler"]).square().mean()

    engine = Distillation(tiny.bert(2), tiny.bert(4, seed=1), [PoolerMSE()])
    assert engine(tiny.batch()).total > 0


def test_a_plain_transformer_gives_hidden_states() -> None:
    def plain(depth: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    engine = Distillation(plain(2), plain(4), [objectives.HiddenMSE()])
    engine({"src": torch.randn(2, 5, 16)}).total.backward()
    assert all(p.grad is not None for p in engine.student.parameters())


def test_a_term_must_be_a_scalar() -> None:
    class Vector(objectives.Objective):
        taps = ("logits",)

        def loss(self, student, teacher, batch):  # type: ignore[no-untyped-def]
            return student.logits

    with pytest.raises(ObjectiveError, match=r"must be a scalar, got the shape \(3, 3\)"):
        Distillation(tiny.bert(2), tiny.bert(4), [Vector()])(tiny.batch())
