import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny
from ildistil import init_student
from ildistil.capture import find_layers
from ildistil.errors import ModelError
from ildistil.students.sources import ModelSource, StudentOptions, load, pretrained


def test_layers_embeddings_and_head_are_the_teachers() -> None:
    teacher = tiny.bert(6)
    student = init_student(teacher, layers=[2, -1])
    theirs, mine = teacher.state_dict(), student.state_dict()
    for name, value in mine.items():
        old = name.replace("layer.0.", "layer.1.") if "layer.0." in name else name.replace("layer.1.", "layer.5.")
        assert torch.equal(value, theirs[old]), name
    assert student.config.num_hidden_layers == 2
    assert student.config.init_layers == [2, 6]
    assert student.config.id2label == teacher.config.id2label
    assert student.training
    assert {p.data_ptr() for p in student.parameters()}.isdisjoint({p.data_ptr() for p in teacher.parameters()})
    assert teacher.config.num_hidden_layers == 6
    assert student.config is not teacher.config


def test_making_a_student_leaves_the_random_state_alone() -> None:
    teacher = tiny.bert(4)
    before = torch.get_rng_state()
    init_student(teacher, layers=[1])
    assert torch.equal(before, torch.get_rng_state())


def test_the_record_of_layers_survives_saving(tmp_path: object) -> None:
    init_student(tiny.bert(4), layers=[1, 3]).save_pretrained(tmp_path)
    assert tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).config.init_layers == [1, 3]


def test_dropout_can_change_and_shapes_cannot() -> None:
    teacher = tiny.bert(4)
    student = init_student(teacher, layers=[1, 2], config={"hidden_dropout_prob": 0.25})
    assert student.bert.embeddings.dropout.p == 0.25
    with pytest.raises(ValueError, match="the config changes a shape"):
        init_student(teacher, layers=[1, 2], config={"intermediate_size": 8})


def test_random_from_changed_values_or_a_whole_config() -> None:
    teacher = tiny.bert(4)
    student = init_student(teacher, config={"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2})
    assert student.bert.encoder.layer[1].attention.self.query.weight.shape == (16, 16)
    whole = init_student(teacher, config=student.config)
    assert whole.config.hidden_size == 16
    assert whole.config.init_layers is None


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 4}
TEXT = SIZES | {
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = GROUPED | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
GPT2 = {
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 4,
    "vocab_size": 50,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOWS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
PLACES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT": ("Bert", TEXT),
    "RoBERTa": ("Roberta", TEXT),
    "ELECTRA": ("Electra", TEXT | {"embedding_size": 16}),
    "DistilBERT": ("DistilBert", {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 4, "vocab_size": 50}),
    "DeBERTa-v3": ("DebertaV2", TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "GPT-2": ("GPT2", GPT2),
    "GPT-2 with scores by layer": ("GPT2", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-Neo": (
        "GPTNeo",
        {"hidden_size": 32, "num_heads": 4, "num_layers": 4, "vocab_size": 50, "window_size": 3, "bos_token_id": 1}
        | {"eos_token_id": 2, "attention_types": [[["global", "local"], 2]]},
    ),
    "Longformer": ("Longformer", TEXT | {"attention_window": [4, 8, 8, 4]}),
    "Llama": ("Llama", GROUPED),
    "Qwen2 with windows": (
        "Qwen2",
        TEXT | {"num_key_value_heads": 2, "sliding_window": 3, "use_sliding_window": True, "layer_types": WINDOWS},
    ),
    "Qwen3": ("Qwen3", GROUPED),
    "Qwen3 with experts": ("Qwen3Moe", EXPERTS | {"num_experts": 4, "mlp_only_layers": [0, 3]}),
    "Gemma 2": ("Gemma2", GROUPED | {"sliding_window": 3}),
    "SmolLM3": ("SmolLM3", GROUPED | {"no_rope_layers": [1, 0, 1, 0]}),
    "DeepSeek-V3, with experts": (
        "DeepseekV3",
        TEXT | LATENT | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1}
        | {"topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    ),
    "BEiT": ("Beit", SIZES | {"image_size": 8, "patch_size": 4, "drop_path_rate": 0.1, "out_features": None}),
}  # fmt: skip


def of_family(name: str) -> tuple[tf.PreTrainedModel, dict[str, Tensor]]:
    """A model whose weights are all random, and large enough to tell layers apart, with a batch for it."""
    family, config = PLACES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(tf, f"{family}Model")(getattr(tf, f"{family}Config")(**config)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        batch = {"input_ids": torch.randint(3, 50, (2, 12))}
        batch = {"pixel_values": torch.randn(2, 3, 8, 8).double()} if name == "BEiT" else batch
    # The kernels of experts don't take double precision.
    return model if "experts" in name else model.double(), batch


def states(model: nn.Module, batch: dict[str, Tensor], keep: list[int]) -> list[Tensor]:
    """The outputs of the kept layers; the others give back what they get."""
    seen: list[Tensor] = []

    def hook(number: int, state: Tensor, output: Any) -> Any:
        if number in keep:
            seen.append(output[0] if isinstance(output, tuple) else output)
            return None
        return (state, *output[1:]) if isinstance(output, tuple) else state

    for n, layer in enumerate(find_layers(model), start=1):
        layer.register_forward_hook(lambda _, args, output, n=n: hook(n, args[0], output))
    with torch.no_grad():
        model(**batch)
    return seen


@pytest.mark.parametrize("layers", [[1, 2, 3, 4], [2, 4]])
@pytest.mark.parametrize("name", PLACES)
def test_copied_layers_compute_what_they_did(name: str, layers: list[int], tmp_path: Path) -> None:
    """Against the teacher itself without its other layers; and once more after the student was saved and loaded."""
    teacher, batch = of_family(name)
    student = init_student(teacher, layers=layers).eval()
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    want = states(teacher, batch, layers)
    assert len(want) == len(layers)
    for made in (student, again):
        got = states(made.to(teacher.dtype), batch, [*range(1, len(layers) + 1)])
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("family", "config", "layers", "message"),
    [
        ("DiffLlama", GROUPED, [2, 4], "self_attn: lambda_init is 0.2.*, and was 0.3"),
        ("ImageGPT", GPT2 | {"scale_attn_by_inverse_layer_idx": True}, [2, 4], "divides its scores by the layer's num"),
        ("Qwen2Moe", EXPERTS | {"decoder_sparse_step": 2, "num_experts": 4}, [1, 3], "and was a Qwen2MoeMLP"),
        ("Albert", TEXT | {"num_hidden_groups": 2}, [1, 2], "layer 2 would be of another group as layer 2 of 2"),
        ("DebertaV2", TEXT | {"conv_kernel_size": 3, "conv_act": "gelu"}, [2, 4], "Keep layer 1 as the first"),
        ("Swin", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "image_size": 32}, [1], "no single stack"),
        ("Lxmert", {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50}, [1], "no single stack"),
        ("WavLM", SIZES | {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2]}, [2], "was nothing"),
        ("T5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}, [1], "no single stack"),
        ("Bart", {"d_model": 32, "vocab_size": 50, "encoder_layers": 1, "decoder_layers": 1}, [1], "no single stack"),
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}, [1], "no single stack"),
        ("Bert", TEXT, [[1, 2], {"num_hidden_layers": 3}], "leave their number out of config"),
        ("Bert", TEXT, [[1], {"hidden_size": "wide"}], "BertConfig doesn't take hidden_size='wide'"),
        ("Bert", TEXT, [[1], {"hidden_act": "unknown"}], "transformers can't build a BertModel by this config"),
        ("Bert", TEXT, [None, {"num_attention_heads": 5}], "can't build a BertModel by this config: The hidden size"),
    ],
)
def test_layers_whose_place_counts_are_refused(family: str, config: Any, layers: Any, message: str) -> None:
    teacher = getattr(tf, f"{family}Model")(getattr(tf, f"{family}Config")(**config))
    arguments = layers if len(layers) == 2 and not isinstance(layers[-1], int) else [layers]
    with pytest.raises(ModelError, match=message):
        init_student(teacher, *arguments)


def test_a_config_without_one_number_of_layers_is_refused() -> None:
    sizes = {"hidden_size": 32, "vocab_size": 50, "num_decoder_layers": 2, "num_encoder_layers": 2}
    teacher = tf.ProphetNetForCausalLM(tf.ProphetNetConfig(**sizes, num_decoder_attention_heads=4))
    with pytest.raises(ModelError, match="ProphetNetConfig doesn't take a number of layers"):
        init_student(teacher, layers=[1])


def test_layers_of_a_group_find_its_weights() -> None:
    """Two of four layers of ALBERT, one of each of two groups, against the groups run by hand."""
    teacher = tf.AlbertModel(tf.AlbertConfig(**TEXT, num_hidden_groups=2, embedding_size=16)).eval()
    student = init_student(teacher, layers=[2, 3]).eval()
    ids = torch.randint(3, 50, (2, 7))
    with torch.no_grad():
        wanted = teacher.encoder.embedding_hidden_mapping_in(teacher.embeddings(ids))
        for group in teacher.encoder.albert_layer_groups:
            wanted = group.albert_layers[0](wanted)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        torch.testing.assert_close(student(ids).last_hidden_state, wanted)


def test_a_shallower_random_student_has_settings_for_its_layers(tmp_path: Path) -> None:
    """Those with a value for each layer are cut, so that the student can be loaded again."""
    teacher = tf.Qwen2Model(tf.Qwen2Config(**PLACES["Qwen2 with windows"][1]))
    init_student(teacher, config={"num_hidden_layers": 2}).save_pretrained(tmp_path)
    assert tf.AutoConfig.from_pretrained(tmp_path).layer_types == WINDOWS[:2]


def test_tied_embeddings_stay_tied() -> None:
    teacher = tf.BertForMaskedLM(
        tf.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3, vocab_size=50)
    )
    student = init_student(teacher, layers=[1, 3])
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)


def test_the_body_of_a_language_model_has_no_pooler() -> None:
    body, other = (
        tf.BertForMaskedLM(tf.BertConfig(hidden_size=8, num_attention_heads=2, vocab_size=11)).bert for _ in range(2)
    )
    assert not any("pooler" in name for name in init_student(body, layers=[1, 2]).state_dict())
    student = init_student(body, layers=[1, 2], source=other)
    assert student.state_dict().keys() == init_student(body, layers=[1, 2]).state_dict().keys()
    assert torch.equal(student.encoder.layer[0].output.dense.weight, other.encoder.layer[0].output.dense.weight)


def test_shared_and_alternating_layers() -> None:
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    albert = tf.AlbertForSequenceClassification(tf.AlbertConfig(**small, num_hidden_layers=4, embedding_size=16))
    assert init_student(albert, layers=[1, 2]).config.num_hidden_layers == 2
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    modern = tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**small, **special, num_hidden_layers=6))
    with pytest.raises(ValueError, match="it must stay the first"):
        init_student(modern, layers=[3, 4])
    student = init_student(modern, layers=[1, 4])
    assert student.config.layer_types == [modern.config.layer_types[0], modern.config.layer_types[3]]
    assert torch.equal(student.model.layers[1].mlp.Wi.weight, modern.model.layers[3].mlp.Wi.weight)


def test_a_student_of_a_captured_teacher_has_plain_attention() -> None:
    teacher = tiny.bert(4)
    from ildistil import Distillation, objectives

    Distillation(tiny.bert(2), teacher, [objectives.AttentionKL()])
    assert init_student(teacher, layers=[1]).config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [5]}, r"teacher layers 1..4 \(or -1..-4 from the end\), got 5"),
        ({"layers": [0]}, "got 0"),
        ({"layers": []}, "got none"),
        ({}, r"needs layers=\[...\] to copy, or config="),
        ({"config": {"num_labels": 7}}, "number of labels is 7, the teacher's 3"),
        ({"config": {"vocab_size": 9}}, "vocabulary is 9, the teacher's 50"),
        ({"config": {"hiden_size": 9}}, "BertConfig has no 'hiden_size'"),
        ({"config": tf.RobertaConfig(vocab_size=50, num_labels=3)}, "got a RobertaConfig"),
        ({"layers": [1], "config": tf.BertConfig()}, "config takes only changed values"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_student(tiny.bert(4), **arguments)  # type: ignore[arg-type]


def lm(seed: int, layers: int = 4, **config: int) -> tf.BertForMaskedLM:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.BertForMaskedLM(
            tf.BertConfig(**sizes | {"num_hidden_layers": layers, "max_position_embeddings": 32} | config)
        )


def test_the_body_comes_from_the_source_and_the_head_from_the_teacher() -> None:
    teacher, source = tiny.bert(4), lm(seed=1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    random = torch.get_rng_state()
    student = init_student(teacher, layers=[2, -1], source=source)
    theirs, other = teacher.state_dict(), source.state_dict()
    for name, value in student.state_dict().items():
        old = name.replace("layer.0.", "layer.1.") if "layer.0." in name else name.replace("layer.1.", "layer.3.")
        origin = theirs if old.startswith(("classifier", "bert.pooler")) else other
        assert torch.equal(value, origin[old]), name
    assert student.config.init_layers == [2, 4]
    assert student.config.id2label == teacher.config.id2label
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_a_pooler_of_the_source_is_used() -> None:
    teacher, source = tiny.bert(4), tiny.bert(4, seed=1).bert
    student = init_student(teacher, layers=[1], source=source)
    assert torch.equal(student.bert.pooler.dense.weight, source.pooler.dense.weight)
    assert torch.equal(student.classifier.weight, teacher.classifier.weight)


def test_a_tied_decoder_follows_the_embeddings_of_the_source() -> None:
    source = tiny.bert(4, seed=1)
    student = init_student(lm(seed=0), layers=[1, 3], source=source)
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert torch.equal(student.get_input_embeddings().weight, source.get_input_embeddings().weight)


def test_a_source_can_be_made_narrower() -> None:
    teacher, source = tiny.bert(4), lm(seed=1)
    student = init_student(teacher, [1, 4], {"intermediate_size": 40}, width="importance", source=source)
    theirs = source.bert.encoder.layer[3].output.dense.weight
    assert student.bert.encoder.layer[1].output.dense.weight.shape == (32, 40)
    assert all(any(torch.equal(c, t) for t in theirs.T) for c in student.bert.encoder.layer[1].output.dense.weight.T)


@pytest.mark.parametrize(
    ("source", "layers", "message"),
    [
        (
            tf.RobertaModel(tf.RobertaConfig(vocab_size=50, num_hidden_layers=1, hidden_size=24)),
            [1],
            "got a RobertaModel",
        ),
        (lm(0, vocab_size=60), [1], "The source's vocabulary is 60, the teacher's 50"),
        (lm(0, layers=3), [1], "The source's number of layers is 3, the teacher's 4"),
        (lm(0, intermediate_size=60), [1], r"has the shape \(60, 32\), the teacher's \(64, 32\)"),
        (lm(0), None, r"source=... gives layers to copy: name them"),
    ],
)
def test_a_source_that_does_not_fit_is_refused(source: tf.PreTrainedModel, layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_student(tiny.bert(4), layers, source=source)


def test_options_of_yaml(tmp_path: Path) -> None:
    tiny.save_teacher(tmp_path / "teacher", layers=4)
    options = pretrained(str(tmp_path / "teacher"))
    teacher = options.load()
    source = lm(seed=1, max_position_embeddings=128)
    body = tiny.bert(4, seed=2, max_position_embeddings=128).bert
    for name, model in (("lm", source), ("body", body)):
        model.save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    random = torch.get_rng_state()
    student = StudentOptions(layers=[1, 4], source=str(tmp_path / "lm")).make(teacher, options)
    assert torch.equal(student.get_input_embeddings().weight, source.get_input_embeddings().weight)
    assert torch.equal(student.bert.pooler.dense.weight, teacher.bert.pooler.dense.weight)
    student = StudentOptions(layers=[1, 4], source=str(tmp_path / "body")).make(teacher, options)
    assert torch.equal(student.bert.pooler.dense.weight, body.pooler.dense.weight)
    narrow = {"hidden_size": 16, "num_attention_heads": 2}
    student = StudentOptions(width="importance", config=narrow).make(teacher, options)
    assert (student.config.hidden_size, student.config.init_layers) == (16, [1, 2, 3, 4])
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (StudentOptions(width="pca", config={"hidden_size": 16}), "which a YAML file can't give"),
        (StudentOptions(path="x", width="importance"), "leave out width and source, or the path"),
        (StudentOptions(layers=[1], source="./nowhere"), "There is no folder './nowhere'"),
    ],
)
def test_bad_options_of_yaml_are_refused(options: StudentOptions, message: str) -> None:
    class Made(ModelSource):
        def load(self) -> tf.PreTrainedModel:
            return tiny.bert(4)

    with pytest.raises(ValueError, match=message):
        options.make(tiny.bert(4), Made())


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="copies transformers models, got Linear"):
        init_student(nn.Linear(1, 1), layers=[1])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tiny.save_teacher(folder, layers=2)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "causal-lms"}, "A bert has the heads sequence-classification, masked-lm, causal-lm, none"),
        ({"dtype": "float8"}, "the precisions are float32, bfloat16, float16"),
        ({"head": "masked-lm"}, "no weights for cls.*: its head would be random"),
        ({"config": {"hiden_size": 8}}, "BertConfig has no 'hiden_size'. Name values of its config"),
        ({"config": {"hidden_size": "x"}}, "BertConfig doesn't take hidden_size='x'"),
        ({"config": {"trust_remote_code": True}}, "BertConfig has no 'trust_remote_code'"),
        ({"config": {"device_map": "auto"}}, "BertConfig has no 'device_map'"),
        ({"config": {"dtype": "float16"}}, "dtype is no value of a config, but an option beside it"),
        ({"config": {"hidden_act": "unknown"}}, "The weights of the model .* can't be loaded: "),
        (
            {"config": {"intermediate_size": 8}},
            r"has the shape \(64.*\) in the checkpoint .*, and \(8.*\) by its config",
        ),
        ({"config": {"num_labels": 5}}, r"classifier.bias has the shape \(2,\) in the checkpoint"),
    ],
)
def test_options_that_do_not_fit_the_checkpoint_are_refused(saved: Path, options: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        pretrained(str(saved), **options).load()


def test_values_of_the_config_change(saved: Path) -> None:
    model = pretrained(str(saved), dtype="bfloat16", config={"hidden_dropout_prob": 0.25}).load()
    assert (model.dtype, model.bert.embeddings.dropout.p) == (torch.bfloat16, 0.25)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json, but model.safetensors, token"),
        (lambda f: (f / "config.json").write_text("{"), "can't be loaded. Name a folder made by save_pretrained"),
        (lambda f: (f / "config.json").write_text('{"hidden_size": 8}'), "can't be loaded. Name a folder made by"),
        (lambda f: os.truncate(f / "model.safetensors", 1000), "The weights of the model .* can't be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no weights"), "The weights of the model .* can't be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "The weights of the model .* can't be loaded"),
    ],
)
def test_damaged_checkpoints_are_refused(saved: Path, tmp_path: Path, spoil: Any, message: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "copy")
    spoil(folder)
    with pytest.raises(ModelError, match=message):
        load(str(folder))


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_no_code_of_a_checkpoint_is_run(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = shutil.copytree(saved, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"classifier.bias": Bomb()}, pickled / "pytorch_model.bin")
    coded = shutil.copytree(saved, tmp_path / "coded")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}}
    (coded / "config.json").write_text(json.dumps(config))
    (coded / "code.py").write_text("import os\nos.mkdir('exploded')\nclass C: ...\nclass M: ...\n")
    for folder in (pickled, coded):
        with pytest.raises(ModelError, match="can't be loaded"):
            load(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_a_model_of_the_hub_needs_a_connection() -> None:
    with pytest.raises(ModelError, match="or a model of the hub \\(which needs a connection\\)"):
        load("nobody/nothing")


def test_a_new_head_does_not_excuse_random_layers(saved: Path, tmp_path: Path) -> None:
    """Weights under names that the model doesn't have would silently be left aside."""
    model = tiny.bert(2, labels=2, max_position_embeddings=128)
    renamed = {name.replace("bert.encoder.layer.1", "bert.layers.1"): v for name, v in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=dict(renamed))
    with pytest.raises(ModelError, match="bert.encoder.layer.1.*: weights of its layers would be random"):
        load(str(tmp_path), new_head=True)
    body = {name.removeprefix("bert."): v for name, v in renamed.items() if name.startswith("bert.")}
    save_file(body, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="layer.1.*: weights of its layers would be random"):
        load(str(tmp_path), "none", new_head=True)
    model.bert.save_pretrained(tmp_path / "body")
    assert load(str(tmp_path / "body"), new_head=True).config.num_labels == 2


def test_a_student_of_another_checkpoint(saved: Path, tmp_path: Path) -> None:
    lm(seed=1, layers=2, max_position_embeddings=128).save_pretrained(tmp_path)
    source, teacher = pretrained(str(saved)), pretrained(str(saved)).load()
    with pytest.raises(ModelError, match="has no tokenizer. Save it beside the model"):
        StudentOptions(path=str(tmp_path)).make(teacher, source)
    tiny.tokenizer().save_pretrained(tmp_path)
    student = StudentOptions(path=str(tmp_path)).make(teacher, source)
    assert type(student) is type(teacher)
    assert (student.config.id2label, student.training) == (teacher.config.id2label, True)
    tagger = tf.BertForTokenClassification(teacher.config)
    with pytest.raises(ModelError, match="the teacher is a BertForTokenClassification. Build the student in Python"):
        StudentOptions(path=str(tmp_path)).make(tagger, source)
