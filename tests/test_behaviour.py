"""What only runs tell of a model: which label its logits predict, how its states are laid out, what sees what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from test_models import BART, BERT, GPT2, GROUPED, SEQ2SEQ, TEXT, WIDE
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from ildistil import Distillation, objectives
from ildistil.capture import Capture, ModelInfo, Tap
from ildistil.errors import CaptureError, ObjectiveError
from ildistil.teachers import StoredTeacher, precompute

Make = Callable[[], PreTrainedModel]
CODERS = BART | {"encoder_layers": 2, "decoder_layers": 2}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_words": 50}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 50}
T5 = SEQ2SEQ | {"d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 2, "decoder_start_token_id": 0}
ROUTED = {"num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
EYES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 16}


def decoder(name: str, **changes: Any) -> Make:
    return lambda: getattr(tf, f"{name}ForCausalLM")(getattr(tf, f"{name}Config")(**CODERS | changes))


LANGUAGE: dict[str, Make] = {
    "XLM": lambda: tf.XLMWithLMHeadModel(tf.XLMConfig(**XLM)),
    "Flaubert": lambda: tf.FlaubertWithLMHeadModel(tf.FlaubertConfig(**XLM)),
    "XLNet": lambda: tf.XLNetLMHeadModel(tf.XLNetConfig(**XLNET)),
    **{n: decoder(n) for n in ("Bart", "MBart", "Pegasus", "PLBart", "Marian", "Blenderbot", "Mvp", "BigBirdPegasus")},
    "TrOCR": decoder("TrOCR"),
    "Whisper": decoder("Whisper", max_target_positions=32),
    "CpmAnt": lambda: tf.CpmAntForCausalLM(
        tf.CpmAntConfig(
            vocab_size=50, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=32, num_hidden_layers=2,
            prompt_length=4, prompt_types=4, segment_types=4,
        )
    ),
    "Gemma 3, with images": lambda: tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(
            text_config={**GROUPED, "num_hidden_layers": 2}, vision_config={**EYES, "patch_size": 8},
            mm_tokens_per_image=4, image_token_index=45, boi_token_index=46, eoi_token_index=47,
        )
    ),
    "BertGeneration": lambda: tf.BertGenerationDecoder(
        tf.BertGenerationConfig(**BERT, num_hidden_layers=2, is_decoder=True)
    ),
    "BERT": lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT, num_hidden_layers=2)),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, n_layer=2)),
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, num_hidden_layers=2)),
    "Mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50)),
    "BERT, classes of tokens": lambda: tf.BertForTokenClassification(
        tf.BertConfig(**BERT, num_hidden_layers=2, num_labels=50)
    ),
    "BART": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**CODERS)),
    "mBART": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**CODERS)),
    "T5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
}  # fmt: skip


def seeded(make: Make, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def labelled() -> dict[str, Tensor]:
    batch = {key: tiny.batch()[key] for key in ("input_ids", "attention_mask")}
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[0, 2] = labels[1, 1] = -100
    return batch | {"labels": labels}


def shift_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> int:
    """How far a label is from the row that predicts it, by a loop over the model's own logits."""
    model.eval()
    with torch.no_grad():
        seen = model(**batch)
    labels, fitting = batch["labels"], []
    for shift in (0, 1):
        rows = [
            seen.logits[b, i].double().log_softmax(-1)[labels[b, i + shift]]
            for b, i in torch.cartesian_prod(torch.arange(3), torch.arange(labels.shape[1] - shift)).tolist()
            if labels[b, i + shift] != -100
        ]
        if torch.isclose(-torch.stack(rows).mean(), seen.loss.double(), rtol=1e-5):
            fitting.append(shift)
    assert len(fitting) == 1
    return fitting[0]


@pytest.mark.parametrize("family", LANGUAGE)
def test_the_row_that_predicts_a_label_is_found_from_the_loss(family: str) -> None:
    student, teacher, batch = seeded(LANGUAGE[family]), seeded(LANGUAGE[family], 1), labelled()
    shift = shift_of(student, batch)
    student.train()
    seen = Capture(student, {Tap("logits")})(
        {k: v for k, v in batch.items() if k != "labels" or "BART" in family or family == "T5"}
    )
    assert seen.next_token is bool(shift)
    engine = Distillation(student, teacher, [objectives.LogitsKL(temperature=1.0), objectives.TaskLoss()]).eval()
    terms = engine(batch)
    with torch.no_grad():
        s, t = (model(**batch).logits.double().log_softmax(-1) for model in (student, teacher))
    rows = [(b, i - shift) for b, i in (batch["labels"] != -100).nonzero().tolist() if i >= shift]
    values = [(t[b, i].exp() * (t[b, i] - s[b, i])).sum() for b, i in rows]
    torch.testing.assert_close(terms.values["logits_kl"].double(), torch.stack(values).mean(), rtol=1e-5, atol=0)
    assert {int(count.number) for count in terms.counts.values()} == {len(values)}


def test_losses_with_more_than_cross_entropy_tell_it_too() -> None:
    model = tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_hidden_layers=2, **ROUTED))
    assert Capture(model, {Tap("logits")})(labelled()).next_token is True
    routed = tf.SwitchTransformersConfig(**T5, num_experts=2, output_router_logits=True, router_aux_loss_coef=1.0)
    switch = tf.SwitchTransformersForConditionalGeneration(routed)
    assert Capture(switch, {Tap("logits")})(labelled()).next_token is False

    class Smoothed(tf.BertForMaskedLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None):  # type: ignore[no-untyped-def]
            seen = super().forward(input_ids, attention_mask)
            if labels is not None:
                seen.loss = 3 + F.cross_entropy(seen.logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3)
            return seen

    smoothed = seeded(lambda: Smoothed(tf.BertConfig(**BERT, num_hidden_layers=2)))
    assert Capture(smoothed, {Tap("logits")})(labelled()).next_token is False


def test_a_loss_that_fits_neither_is_refused_where_it_matters() -> None:
    """ProphetNet predicts several tokens ahead, in streams of their own."""
    config = tf.ProphetNetConfig(
        hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
        num_decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=50, is_decoder=True,
    )  # fmt: skip
    models = [tf.ProphetNetForCausalLM(config) for _ in range(2)]
    batch = labelled()
    with pytest.raises(ObjectiveError, match="its own loss is the cross-entropy neither of .* Leave the labels out"):
        Distillation(*models, [objectives.LogitsKL()])(batch)
    assert Distillation(models[0], None, [objectives.TaskLoss()])(batch).total > 0
    del batch["labels"]
    assert Distillation(*models, [objectives.LogitsKL()])(batch).total > 0


class Plain(nn.Module):
    """A language model that knows no labels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))  # type: ignore[no-any-return]


def test_without_labels_all_real_tokens_count_whoever_the_model_is() -> None:
    student, teacher, batch = Plain().double(), Plain().double(), labelled()
    engine = Distillation(student, teacher, [objectives.LogitsMSE()])
    with pytest.raises(ObjectiveError, match="isn't known: its forward takes no labels"):
        engine(batch)
    del batch["labels"]
    s, t = student(batch["input_ids"]), teacher(batch["input_ids"])
    rows = [(s[b, i] - t[b, i]).square().mean() for b, i in batch["attention_mask"].nonzero().tolist()]
    torch.testing.assert_close(engine(batch).total, torch.stack(rows).mean())


def test_models_of_other_tokens_are_refused() -> None:
    models = LANGUAGE["Llama"](), LANGUAGE["BERT"]()
    with pytest.raises(ObjectiveError, match="one model predicts the next token, the other doesn't"):
        Distillation(*models, [objectives.LogitsKL()])(labelled())


def test_a_row_of_one_token_decides_nothing() -> None:
    capture = Capture(LANGUAGE["Llama"](), {Tap("logits")})
    batch = labelled()
    first = capture({key: value[:, :1] for key, value in batch.items()})
    assert first.next_token is None
    assert "long enough" in first.why_not_known
    assert capture(batch).next_token


# Layout


def fsmt() -> PreTrainedModel:
    config = tf.FSMTConfig(
        langs=["en", "de"], src_vocab_size=50, tgt_vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_length=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, max_position_embeddings=32,
    )  # fmt: skip
    return tf.FSMTForConditionalGeneration(config)  # type: ignore[no-any-return]


TOKENS_FIRST: dict[str, tuple[Make, str | None]] = {
    "XLNet": (lambda: tf.XLNetModel(tf.XLNetConfig(**XLNET)), None),
    "FSMT, encoder": (fsmt, "encoder"),
    "FSMT, decoder": (fsmt, "decoder"),
}
SHAPES = {"ragged": (7, 4, 6), "one row": (5,), "square": (4, 2, 4, 3), "one token": (1, 1)}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("first", SHAPES)
@pytest.mark.parametrize("family", TOKENS_FIRST)
def test_states_come_by_rows_whatever_the_layers_layout(family: str, first: str, masked: bool) -> None:
    make, stack = TOKENS_FIRST[family]
    torch.manual_seed(0)
    model = make().eval()
    capture = Capture(model, {Tap("hidden", i, stack) for i in range(3)})
    for name in (first, *SHAPES):
        batch = {key: tiny.batch(SHAPES[name])[key] for key in ("input_ids", "attention_mask")}
        if stack:
            batch["decoder_input_ids"] = batch["input_ids"].clamp(min=3)  # no padding
        if not masked:
            del batch["attention_mask"]
        with torch.no_grad():
            seen = capture(batch).stack(stack)
            # What the model returns is by rows.
            states = model(**batch, output_hidden_states=True, use_cache=False)
        expected = states[f"{stack}_hidden_states" if stack else "hidden_states"]
        for layer in range(3):
            assert seen.hidden[layer].shape == (*batch["input_ids"].shape, 32)
            torch.testing.assert_close(seen.hidden[layer], expected[layer], msg=f"{name}, {layer}")
        assert seen.mask.shape == batch["input_ids"].shape


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("tokens", [3, 5])
def test_a_plain_transformer_says_which_dimension_is_the_batch(tokens: int, masked: bool) -> None:
    def plain(batch_first: bool) -> nn.TransformerEncoder:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()

    source = torch.randn(3, tokens, 16)
    padding = {"src_key_padding_mask": torch.arange(tokens).expand(3, tokens) > 1} if masked else {}
    taps = {Tap("hidden", i) for i in range(3)}
    rows = Capture(plain(True), taps)({"src": source, **padding})
    columns = Capture(plain(False), taps)({"src": source.transpose(0, 1), **padding})
    for layer in range(3):
        torch.testing.assert_close(columns.hidden[layer], rows.hidden[layer])
    assert torch.equal(columns.mask, rows.mask)


def test_a_square_batch_that_cannot_be_taken_apart_is_refused() -> None:
    batch = {key: tiny.batch((3, 2, 3))[key] for key in ("input_ids", "attention_mask")}
    mixed = batch | {"perm_mask": torch.zeros(1, 3, 3)}  # one for all rows
    capture = Capture(tf.XLNetModel(tf.XLNetConfig(**XLNET)), {Tap("hidden", 1)})
    with pytest.raises(CaptureError, match="either dimension may be the batch. Begin with a batch of another number"):
        capture(mixed)
    capture({key: tiny.batch()[key] for key in batch})
    assert capture(batch).hidden[1].shape == (3, 3, 32)


# Layers and what is between them


@pytest.mark.parametrize("depth", [1, 3])
def test_the_first_layer_of_deberta_ends_with_its_convolution(depth: int) -> None:
    config = tf.DebertaV2Config(**BERT, num_hidden_layers=depth, conv_kernel_size=3, pos_att_type=[])
    model = tf.DebertaV2Model(config).eval()
    batch = {key: tiny.batch()[key] for key in ("input_ids", "attention_mask")}
    expected = model(**batch, output_hidden_states=True).hidden_states
    capture = Capture(model, {Tap("hidden", i) for i in range(depth + 1)})
    for wanted in (None, {Tap("hidden", 1)}, {Tap("hidden", 1)}):
        for layer, state in capture(batch, wanted=wanted).hidden.items():
            assert torch.equal(state, expected[layer])


def test_states_that_are_changed_between_layers_are_refused() -> None:
    model = tiny.bert(3)
    model.bert.encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    capture = Capture(model, {Tap("hidden", i) for i in (1, 2)})
    assert list(capture(tiny.batch(), wanted={Tap("hidden", 2)}).hidden) == [2]
    with pytest.raises(CaptureError, match=r"hidden\[1\] of the student .* is not what layer 2 is given"):
        capture(tiny.batch())


def test_states_of_other_tokens_are_refused() -> None:
    longformer = tf.LongformerModel(tf.LongformerConfig(**BERT, num_hidden_layers=2, attention_window=4))
    batch = {key: tiny.batch()[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(CaptureError, match=r"has the shape \(3, 8, 32\).* for a batch of 3 rows of 7 tokens"):
        Capture(longformer, {Tap("hidden", 1)})(batch)
    longer = {key: tiny.batch(right=1)[key] for key in batch}
    assert Capture(longformer, {Tap("hidden", 1)})(longer).hidden[1].shape == (3, 8, 32)


@pytest.mark.parametrize("name", ["Hubert", "Wav2Vec2"])
def test_frames_of_speech_know_what_is_padding(name: str) -> None:
    config = getattr(tf, f"{name}Config")(
        **WIDE, num_hidden_layers=2, conv_dim=[16] * 3, conv_stride=[3, 2, 1], conv_kernel=[5, 3, 1],
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, vocab_size=50, layerdrop=0.0, mask_time_prob=0.0,
    )  # fmt: skip
    models = [getattr(tf, f"{name}Model")(config).double().eval() for _ in range(2)]
    mask = torch.arange(60) < torch.tensor([[60], [31], [0]])
    batch = {"input_values": torch.randn(3, 60, dtype=torch.double) * mask, "attention_mask": mask.long()}
    seen = Capture(models[0], {Tap("hidden", 2), Tap("attention", 1)})(batch, verify=True)
    frames = [(((n - 5) // 3 + 1) - 3) // 2 + 1 if n else 0 for n in (60, 31, 0)]
    assert seen.mask.sum(1).tolist() == frames
    assert seen.hidden[2].shape == (3, frames[0], 32)
    engine = Distillation(*models, [objectives.HiddenMSE(), objectives.AttentionKL()]).eval()
    both = engine(batch).values
    alone = [engine({"input_values": batch["input_values"][i : i + 1, :n]}).values for i, n in ((0, 60), (1, 31))]
    for term in both:
        torch.testing.assert_close(both[term], (alone[0][term] + alone[1][term]) / 2)


# What sees what


TEXTS: dict[str, tuple[Make, str | None]] = {
    "BERT": (lambda: tf.BertModel(tf.BertConfig(**BERT, num_hidden_layers=2)), None),
    "BERT as a decoder": (lambda: tf.BertModel(tf.BertConfig(**BERT, num_hidden_layers=2, is_decoder=True)), None),
    "GPT-2": (lambda: tf.GPT2Model(tf.GPT2Config(**GPT2, n_layer=2)), None),
    "Llama": (lambda: tf.LlamaModel(tf.LlamaConfig(**GROUPED, num_hidden_layers=2)), None),
    "Mamba": (lambda: tf.MambaModel(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50)), None),
    "CLIP's text model": (
        lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**BERT, num_hidden_layers=2, eos_token_id=2)), None
    ),
    "XLNet": (lambda: tf.XLNetModel(tf.XLNetConfig(**XLNET)), None),
    "XLNet, one way": (lambda: tf.XLNetModel(tf.XLNetConfig(**XLNET, attn_type="uni")), None),
    "BART's encoder": (lambda: tf.BartModel(tf.BartConfig(**CODERS)), "encoder"),
    "BART's decoder": (lambda: tf.BartModel(tf.BartConfig(**CODERS)), "decoder"),
}  # fmt: skip


@pytest.mark.parametrize("family", TEXTS)
def test_causality_is_what_gradients_say(family: str) -> None:
    make, stack = TEXTS[family]
    model, embedded = seeded(make).eval(), []
    batch = {"input_ids": tiny.batch((7, 7))["input_ids"]}
    if stack is not None:
        batch["decoder_input_ids"] = tiny.batch((6, 6), seed=1)["input_ids"]
    seen = Capture(model, {Tap("hidden", 1, stack), Tap("hidden", 2, stack)})(batch).stack(stack)
    causal, pooling = seen.causal, seen.pooling

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    embedding = getattr(model, f"get_{stack}")().embed_tokens if stack else model.get_input_embeddings()
    embedding.register_forward_hook(keep)
    output = model(**batch)
    state = output.encoder_last_hidden_state if stack == "encoder" else output.last_hidden_state
    (reached,) = torch.autograd.grad(state[0, 0].square().sum(), embedded)
    reached = reached.transpose(0, 1) if family.startswith("XLNet") else reached
    assert causal is not bool(reached[0, 1:].any())
    assert pooling == ("last" if causal and stack is None else "first")


def speech() -> PreTrainedModel:
    config = tf.Wav2Vec2Config(
        **WIDE, num_hidden_layers=2, conv_dim=[16] * 3, conv_stride=[3, 2, 1], conv_kernel=[5, 3, 1],
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, classifier_proj_size=8, layerdrop=0.0,
        mask_time_prob=0.0,
    )  # fmt: skip
    return tf.Wav2Vec2ForSequenceClassification(config)  # type: ignore[no-any-return]


def modern(pooling: str) -> Make:
    config = tf.ModernBertConfig(
        **TEXT, cls_token_id=1, sep_token_id=2, num_hidden_layers=2, classifier_pooling=pooling
    )
    return lambda: tf.ModernBertForSequenceClassification(config)


SWIN = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,), "window_size": 2}
HEADS: dict[str, tuple[Make, str]] = {
    "BERT": (lambda: tf.BertForSequenceClassification(tf.BertConfig(**BERT, num_hidden_layers=2)), "first"),
    "ALBERT": (lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**BERT, num_hidden_layers=3)), "first"),
    "ModernBERT": (modern("cls"), "first"),
    "ModernBERT, mean": (modern("mean"), "mean"),
    "GPT-2": (lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2, n_layer=2)), "last"),
    "XLNet": (lambda: tf.XLNetForSequenceClassification(tf.XLNetConfig(**XLNET)), "last"),
    "Wav2Vec2": (speech, "mean"),
    "Swin": (lambda: tf.SwinForImageClassification(tf.SwinConfig(**SWIN)), "mean"),
    "ViT": (
        lambda: tf.ViTForImageClassification(tf.ViTConfig(**WIDE, num_hidden_layers=2, image_size=8, patch_size=4)),
        "first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [7, 3, 2])
@pytest.mark.parametrize("family", HEADS)
def test_pooling_is_where_the_head_reads(family: str, tokens: int) -> None:
    make, pooling = HEADS[family]
    model = seeded(make).train()
    inputs = {
        "pixel_values": torch.randn(3, 3, *(2 * (getattr(model.config, "image_size", 8),)), dtype=torch.double),
        "input_values": torch.randn(3, 6 * tokens + 8, dtype=torch.double),
        "input_ids": tiny.batch((tokens, tokens - 1, tokens))["input_ids"],
    }
    batch = {model.main_input_name: inputs[model.main_input_name]}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    seen = Capture(model, {Tap("hidden", 1)})(batch)
    torch.set_rng_state(state)
    assert seen.pooling == pooling
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


def mean_pooling(layers: int, seed: int) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    config = tf.ModernBertConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=layers, vocab_size=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, classifier_pooling="mean",
        initializer_range=0.3,
    )  # fmt: skip
    return tf.ModernBertForSequenceClassification(config)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_short_texts_tell_as_much_as_long_ones(tokens: int) -> None:
    """A first batch that is too short to tell anything by itself must not decide for all later ones."""
    text = {k: v for k, v in tiny.batch().items() if k in ("input_ids", "attention_mask")}
    short = {k: v[:, :tokens] for k, v in text.items()}
    capture = Capture(mean_pooling(2, 0), [Tap("hidden", 2)])
    assert (capture(short).causal, capture(short).pooling) == (False, "mean")
    padding = text | {"attention_mask": torch.zeros_like(text["attention_mask"])}
    capture = Capture(mean_pooling(2, 0), [Tap("hidden", 2)])
    _ = capture(padding).pooling  # nothing to tell by
    assert capture(text).pooling == "mean"


def test_what_is_stored_of_a_teacher_does_not_depend_on_the_first_batch(tmp_path: Path) -> None:
    text = {k: v for k, v in tiny.batch().items() if k in ("input_ids", "attention_mask")}
    short = {k: v[:, :1] for k, v in tiny.batch(seed=1).items() if k in ("input_ids", "attention_mask")}
    student, teacher = mean_pooling(2, 0), mean_pooling(4, 1)
    live = Distillation(student, teacher, [objectives.CLSMSE()]).eval()(text).total
    precompute(StoredTeacher(tmp_path, teacher, dtype="float32"), [objectives.CLSMSE()], student, [short, text])
    stored = Distillation(student, StoredTeacher(tmp_path), [objectives.CLSMSE()]).eval()(text).total
    torch.testing.assert_close(stored, live, rtol=1e-4, atol=1e-5)


def test_a_head_that_reads_two_of_many_tokens_is_none_of_a_kind() -> None:
    """AST's reads the class and the distillation token; then it is as without a head."""
    config = tf.ASTConfig(**WIDE, num_hidden_layers=2, max_length=32, num_mel_bins=16, patch_size=8)
    seen = Capture(tf.ASTForAudioClassification(config), {Tap("hidden", 2)})({"input_values": torch.randn(2, 32, 16)})
    assert seen.hidden[2].shape[1] > 4
    assert seen.pooling == "first"


def test_a_model_that_changes_its_weights_in_eval_mode_is_not_tried() -> None:
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    batch = {"input_ids": labelled()["input_ids"]}
    for rescale, message in ((2, "changes its own weights when it runs in eval mode.*rescale_every=0"), (0, None)):
        models = [tf.RwkvForCausalLM(tf.RwkvConfig(**sizes, rescale_every=rescale)) for _ in range(2)]
        engine = Distillation(*models, [objectives.LogitsKL()])
        if message is None:
            engine(batch).total.backward()
        else:
            with pytest.raises(CaptureError, match=message):
                engine(batch)


def test_layers_are_found_in_towers_and_behind_convolutions() -> None:
    eyes, words = EYES | {"patch_size": 8, "num_hidden_layers": 3}, BERT | {"num_hidden_layers": 2}
    clip = tf.CLIPForImageClassification(tf.CLIPConfig(text_config=words, vision_config=eyes))
    info = ModelInfo.of(clip)
    assert (info.depth, info.width, info.heads) == (3, 16, 2)
    seen = Capture(clip, {Tap("hidden", 3)})({"pixel_values": torch.randn(2, 3, 16, 16)})
    assert seen.hidden[3].shape == (2, 5, 16)
    speech = {k: v for k, v in CODERS.items() if k != "max_position_embeddings"} | {"encoder_layers": 3}
    model = tf.Speech2TextForConditionalGeneration(tf.Speech2TextConfig(**speech, input_feat_per_channel=8))
    assert {name: stack.depth for name, stack in ModelInfo.of(model).stacks.items()} == {
        "encoder": 3, "decoder": 2, "cross": 2,
    }  # fmt: skip
    batch = {"input_features": torch.randn(2, 20, 8), "attention_mask": (torch.arange(20) < 20).expand(2, 20).long()}
    seen = Capture(model, {Tap("hidden", 3, "encoder")})(batch | {"labels": torch.ones(2, 4, dtype=torch.long)})
    assert seen.stack("encoder").hidden[3].shape == (2, 5, 32)


def test_sizes_that_no_single_number_says_are_unknown() -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    gemma = tf.Gemma4TextModel(
        tf.Gemma4TextConfig(
            **GROUPED | kinds, global_head_dim=16, hidden_size_per_layer_input=8, vocab_size_per_layer_input=50
        )
    )
    info = ModelInfo.of(gemma)
    assert (info.depth, info.width, info.attention_width, info.value_width) == (2, 32, None, None)
    lxmert = tf.LxmertModel(tf.LxmertConfig(**BERT, l_layers=2, x_layers=1, r_layers=1))
    assert ModelInfo.of(lxmert).depth == 0
    with pytest.raises(CaptureError, match="has no single stack of layers"):
        Capture(lxmert, {Tap("hidden", 1)})
