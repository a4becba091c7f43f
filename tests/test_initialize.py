import pytest
import torch
import transformers as tf
from torch import nn

import tiny
from ildistil import init_student


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


def test_other_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="copies transformers models, got Linear"):
        init_student(nn.Linear(1, 1), layers=[1])  # type: ignore[arg-type]
