"""Masks that a model passes to its attention: understood, or refused as soon as a batch shows another one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from test_models import BART, GROUPED, WIDE
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from ildistil import Distillation, objectives
from ildistil.capture import Attention, Capture, ModelInfo, Tap
from ildistil.errors import CaptureError, ModelRunError

Make = Callable[[], PreTrainedModel]
NOT_UNDERSTOOD = "uses a mask that is not its padding mask"
SHORT, LONG = (4, 3), (9, 7, 8)
SIDE = GROUPED | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}


def text(lengths: tuple[int, ...], **padding: int) -> dict[str, Tensor]:
    return {key: tiny.batch(lengths, **padding)[key] for key in ("input_ids", "attention_mask")}


def llama4() -> PreTrainedModel:
    config = tf.Llama4TextConfig(
        **GROUPED, num_hidden_layers=2, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=64
    )
    return tf.Llama4TextModel(config)  # type: ignore[no-any-return]


def t5gemma() -> PreTrainedModel:
    return tf.T5GemmaForConditionalGeneration(  # type: ignore[no-any-return]
        tf.T5GemmaConfig(encoder=SIDE, decoder=SIDE, vocab_size=50)
    )


LATER: dict[str, tuple[Make, str | None]] = {
    "chunks of Llama 4": (llama4, None),
    "windows of PhiMoE": (
        lambda: tf.PhimoeModel(
            tf.PhimoeConfig(
                **{k: v for k, v in GROUPED.items() if k != "head_dim"}, num_hidden_layers=2, sliding_window=4,
                num_local_experts=2,
            )
        ),
        None,
    ),
    "windows of T5Gemma's encoder": (t5gemma, "encoder"),
}  # fmt: skip


def probabilities(record: Attention) -> Tensor:
    return record.score_map().masked_fill(~record.allowed_map(), -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [(family, kind) for family in LATER for kind in ("eager", "sdpa") if (family[-7:], kind) != ("encoder", "sdpa")],
)
def test_a_mask_that_shows_in_longer_batches_only_is_refused_there(family: str, implementation: str) -> None:
    make, stack = LATER[family]
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation("eager")
    batch = text(SHORT) | ({"labels": text(SHORT)["input_ids"]} if stack else {})
    maps = model(**batch, output_attentions=True)["attentions" if stack is None else "encoder_attentions"]
    model.set_attn_implementation(implementation)
    capture = Capture(model, {Tap("attention", i, stack) for i in (1, 2)})
    for _ in range(2):
        seen = capture(batch).stack(stack)
    for layer, expected in enumerate(maps, start=1):
        real = seen.attention[layer].real()
        found = probabilities(seen.attention[layer])
        torch.testing.assert_close(found.transpose(1, 2)[real], expected.transpose(1, 2)[real], rtol=1e-4, atol=1e-6)
    longer = text(LONG) | ({"labels": text(LONG)["input_ids"]} if stack else {})
    with pytest.raises(CaptureError, match=NOT_UNDERSTOOD):
        capture(longer)


def changing(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> list[bool]:
    """Change the mask of the second layer's attention while the list says so."""
    active = [False]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if active[-1]:
            return args, kwargs | {"attention_mask": change(kwargs["attention_mask"])}
        return None

    model.bert.encoder.layer[1].attention.self.register_forward_pre_hook(hook, with_kwargs=True)
    return active


def unseen_first_key(mask: Tensor) -> Tensor:
    hidden = torch.arange(mask.shape[-1]) == 0
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, -torch.inf)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_mask_that_depends_on_the_data_is_refused_when_it_comes(implementation: str) -> None:
    """Batches of one shape, as of packed texts or images among words."""
    student = tiny.bert(2)
    student.set_attn_implementation(implementation)
    engine = Distillation(student, tiny.bert(4), [objectives.AttentionKL()])
    active = changing(student, unseen_first_key)
    for _ in range(3):
        engine(tiny.batch())
    active.append(True)
    with pytest.raises(CaptureError, match=r"attention\[2\] of the student .*" + NOT_UNDERSTOOD):
        engine(tiny.batch())


def test_a_bias_in_the_mask_is_not_a_mask() -> None:
    model = tiny.bert(2)
    model.set_attn_implementation("eager")
    slopes = 0.5 ** torch.arange(1, 5)[:, None, None]
    distance = (torch.arange(7)[:, None] - torch.arange(7)).abs()
    changing(model, lambda mask: mask - slopes * distance).append(True)
    with pytest.raises(CaptureError, match=NOT_UNDERSTOOD):
        Capture(model, {Tap("attention", 2)})(tiny.batch())
    assert Capture(model, {Tap("attention", 1)})(tiny.batch()).attention[1].heads == 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_runs_are_checked_too() -> None:
    torch._dynamo.reset()
    model = tiny.bert(2)
    changing(model, lambda mask: unseen_first_key(mask) if mask.shape[-1] > 5 else mask).append(True)
    capture = Capture(model, {Tap("attention", 2)})
    capture.compile(backend="eager", fullgraph=True)
    for lengths in (SHORT, SHORT, (4, 2)):
        capture(text(lengths))
    with pytest.raises(CaptureError, match=NOT_UNDERSTOOD):
        capture(text(LONG))


def test_the_other_side_of_padding_is_checked() -> None:
    """Left padding after right padding, and none before both: understood, so accepted."""
    model = tf.LlamaModel(tf.LlamaConfig(**GROUPED, num_hidden_layers=1)).eval()
    capture = Capture(model, {Tap("attention", 1)})
    assert [len(capture(text(*b)).attention) for b in ([(4, 4)], [(4, 2)])] == [1, 1]
    assert len(capture(text((4, 2), left=2)).attention) == 1


# Attention that is none of tokens to each other


def test_attention_in_windows_of_an_image_is_refused() -> None:
    config = tf.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    model = tf.SwinForImageClassification(config)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    with pytest.raises(CaptureError, match=r"on a batch of 2 rows: it isn't the attention of the tokens to each other"):
        Capture(model, {Tap("attention", 1)})(batch)
    with pytest.raises(CaptureError, match="have different numbers of tokens"):
        Capture(model, {Tap("hidden", 0), Tap("hidden", 1)})(batch)


@pytest.mark.parametrize("name", ["Beit", "Doge"])
def test_what_is_added_to_scores_by_the_mask_is_refused(name: str) -> None:
    made = {
        "Beit": lambda: tf.BeitModel(
            tf.BeitConfig(**WIDE, num_hidden_layers=2, image_size=16, patch_size=8, use_relative_position_bias=True)
        ),
        "Doge": lambda: tf.DogeModel(tf.DogeConfig(**GROUPED, num_hidden_layers=2, keep_window_size=4)),
    }
    torch.manual_seed(0)
    model = made[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 4
    batch = text(LONG) if name == "Doge" else {"pixel_values": torch.randn(2, 3, 16, 16)}
    with pytest.raises(CaptureError, match=NOT_UNDERSTOOD):
        Capture(model, {Tap("attention", 1), Tap("attention", 2)})(batch)


# Sizes of heads, and decoders' inputs


def test_widths_of_attention_are_those_of_its_vectors() -> None:
    latent = GROUPED | {"num_key_value_heads": 4, "num_hidden_layers": 2}
    models = {
        "DeepSeek": tf.DeepseekV3Model(
            tf.DeepseekV3Config(
                **{k: v for k, v in latent.items() if k != "head_dim"}, qk_nope_head_dim=8, qk_rope_head_dim=4,
                v_head_dim=6, kv_lora_rank=16, q_lora_rank=16, first_k_dense_replace=2, n_routed_experts=4,
                num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16,
            )
        ),
        "MobileBERT": tf.MobileBertModel(
            tf.MobileBertConfig(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, vocab_size=50,
                intra_bottleneck_size=16, embedding_size=16, true_hidden_size=16,
            )
        ),
        "BERT": tiny.bert(2),
        "Qwen 3": tf.Qwen3Model(tf.Qwen3Config(**GROUPED | {"head_dim": 16}, num_hidden_layers=2)),
    }  # fmt: skip
    for name, model in models.items():
        info = ModelInfo.of(model)
        seen = Capture(model.eval(), {Tap("attention", 1)})(text(LONG)).attention[1]
        assert info.attention_width == seen.vectors("q").shape[1] * seen.query.shape[3], name
        assert info.value_width == seen.vectors("v").shape[1] * seen.value.shape[3], name


CODERS = BART | {"encoder_layers": 2, "decoder_layers": 2}
WHISPER = {k: v for k, v in CODERS.items() if k != "max_position_embeddings"} | {
    "max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 8,
}  # fmt: skip
FROM_LABELS: dict[str, Make] = {
    "Whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
    "Blenderbot": lambda: tf.BlenderbotForConditionalGeneration(tf.BlenderbotConfig(**CODERS)),
    "BART": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**CODERS)),
}


@pytest.mark.parametrize("family", FROM_LABELS)
def test_labels_alone_are_enough_for_a_decoder(family: str) -> None:
    """Also where only the model itself knows how to make its decoder's input of them."""
    torch.manual_seed(0)
    model = FROM_LABELS[family]().double().eval()
    labels = torch.where(text(LONG)["attention_mask"] == 1, text(LONG)["input_ids"], -100)
    batch = {"input_features": torch.randn(3, 8, 32, dtype=torch.double)} if family == "Whisper" else text((6, 6, 6))
    batch["labels"] = labels
    model.set_attn_implementation("eager")
    expected = model(**batch, output_attentions=True, output_hidden_states=True)
    taps = {Tap("hidden", 1, "decoder"), Tap("attention", 2, "decoder"), Tap("attention", 2, "cross"), Tap("logits")}
    for role in ("student", "teacher"):
        capture = Capture(model, taps, role)  # type: ignore[arg-type]
        for verify in (True, False):
            seen = capture(batch, verify=verify)
            assert torch.equal(seen.mask, labels != -100)
            torch.testing.assert_close(seen.logits, expected.logits)
            torch.testing.assert_close(seen.stack("decoder").hidden[1], expected.decoder_hidden_states[1])
            for stack in ("decoder", "cross"):
                found = probabilities(seen.stack(stack).attention[2]).transpose(1, 2)[seen.mask]
                maps = expected[f"{stack}_attentions"][1].transpose(1, 2)[seen.mask]
                torch.testing.assert_close(found, maps, rtol=1e-9, atol=1e-12)
        capture.close()


def test_labels_that_make_no_input_are_the_models_failure() -> None:
    model = FROM_LABELS["BART"]()
    model.config.decoder_start_token_id = model.config.pad_token_id = None
    batch = text((6, 6)) | {"labels": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ModelRunError, match="The teacher BartForConditionalGeneration failed on a batch"):
        Capture(model, {Tap("logits")}, "teacher")(batch)


class Subclassed(tf.models.bert.modeling_bert.BertSelfAttention):
    """In another file than the eager attention of its family."""


def test_eager_attention_is_that_of_the_family() -> None:
    model = tiny.bert(2)
    model.set_attn_implementation("eager")
    for layer in model.bert.encoder.layer:
        layer.attention.self.__class__ = Subclassed
    assert list(Capture(model, {Tap("attention", 2)})(tiny.batch()).attention) == [2]


class Unmasked(tf.LlamaModel):
    """Attends to padding, which nobody sees while it stands behind the text."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return super().forward(input_ids)


def test_padding_that_a_model_attends_to_is_noticed_where_it_counts() -> None:
    capture = Capture(Unmasked(tf.LlamaConfig(**GROUPED, num_hidden_layers=1)), {Tap("attention", 1)})
    for _ in range(2):
        assert list(capture(text(LONG)).attention) == [1]
    with pytest.raises(CaptureError, match=NOT_UNDERSTOOD):
        capture(text(LONG, left=1))


class Handing(tf.LlamaModel):
    """Hands the mask down without naming it."""

    def forward(self, input_ids: Tensor, **more: Any) -> Any:
        return super().forward(input_ids, **more)


def test_a_mask_that_is_handed_down_unnamed_reaches_the_model() -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(**GROUPED, num_hidden_layers=2)
    model, plain = Handing(config).eval(), tf.LlamaModel(config).eval()
    model.load_state_dict(plain.state_dict())
    batch = text(LONG, left=2)
    seen = Capture(model, {Tap("hidden", 1), Tap("attention", 2)})(batch)
    expected = plain(**batch, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(seen.hidden[1][seen.mask], expected[seen.mask])
