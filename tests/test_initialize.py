from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import nn

import tiny
from ildistil import init_student
from ildistil.students import ModelSource, StudentOptions, pretrained


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


def test_tied_embeddings_stay_tied() -> None:
    teacher = tf.BertForMaskedLM(
        tf.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=3, vocab_size=50)
    )
    student = init_student(teacher, layers=[1, 3])
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight)


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
