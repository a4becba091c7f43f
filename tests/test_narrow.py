"""Narrower students: exact where nothing is lost, understood or refused in every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import tiny
from ildistil import Distillation, init_student, objectives
from ildistil.students.narrow import principal_basis

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50, "num_hidden_layers": 3}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PLAIN = {"max_position_embeddings": 40, "hidden_dropout_prob": 0.3}
DISTIL = {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": 3, "vocab_size": 50, "max_position_embeddings": 40}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 3, "vocab_size": 50, "n_positions": 40, **SPECIAL}
LLAMA = {**SMALL, **SPECIAL, "num_key_value_heads": 2}


def make(model: Callable[[Any], Any], config: tf.PreTrainedConfig, gains: bool = True, seed: int = 0) -> Any:
    """A model whose weights are all random: biases and gains too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = model(config)
        for name, parameter in built.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.2)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
            elif gains:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return built.eval()


def classifiers(gains: bool = True) -> dict[str, Any]:
    return {
        "bert": make(tf.BertForSequenceClassification, tf.BertConfig(**SMALL, **PLAIN), gains),
        "roberta": make(tf.RobertaForSequenceClassification, tf.RobertaConfig(**SMALL, **PLAIN), gains),
        "electra": make(
            tf.ElectraForSequenceClassification, tf.ElectraConfig(**SMALL, **PLAIN, embedding_size=24), gains
        ),
        "distilbert": make(tf.DistilBertForSequenceClassification, tf.DistilBertConfig(**DISTIL), gains),
        "albert": make(tf.AlbertForSequenceClassification, tf.AlbertConfig(**SMALL, embedding_size=24), gains),
        "gpt2": make(tf.GPT2ForSequenceClassification, tf.GPT2Config(**GPT), gains),
        "llama": make(tf.LlamaForSequenceClassification, tf.LlamaConfig(**LLAMA), gains),
        "qwen3": make(tf.Qwen3ForSequenceClassification, tf.Qwen3Config(**LLAMA, head_dim=8), gains),
        "modernbert": make(tf.ModernBertForSequenceClassification, tf.ModernBertConfig(**SMALL, **SPECIAL), gains),
    }


def language_models(gains: bool = True) -> dict[str, Any]:
    return {
        "bert": make(tf.BertForMaskedLM, tf.BertConfig(**SMALL, **PLAIN), gains),
        "roberta": make(tf.RobertaForMaskedLM, tf.RobertaConfig(**SMALL, **PLAIN), gains),
        "electra": make(tf.ElectraForMaskedLM, tf.ElectraConfig(**SMALL, **PLAIN, embedding_size=24), gains),
        "distilbert": make(tf.DistilBertForMaskedLM, tf.DistilBertConfig(**DISTIL), gains),
        "albert": make(tf.AlbertForMaskedLM, tf.AlbertConfig(**SMALL, embedding_size=24), gains),
        "gpt2": make(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT), gains),
        "llama": make(tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA, tie_word_embeddings=True), gains),
        "modernbert": make(tf.ModernBertForMaskedLM, tf.ModernBertConfig(**SMALL, **SPECIAL), gains),
    }


NAMES = list(classifiers())
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", SMALL | PLAIN),
    "roberta": ("Roberta", SMALL | PLAIN),
    "xlm-roberta": ("XLMRoberta", SMALL | PLAIN),
    "camembert": ("Camembert", SMALL | PLAIN),
    "electra": ("Electra", SMALL | PLAIN | {"embedding_size": 32}),
    "distilbert": ("DistilBert", DISTIL),
    "albert": ("Albert", SMALL | {"embedding_size": 24}),
    "gpt2": ("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "modernbert": ("ModernBert", SMALL | SPECIAL),
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", LLAMA),
    "qwen2": ("Qwen2", LLAMA),
    "qwen3": ("Qwen3", LLAMA | {"head_dim": 8}),
}
HEADS = [
    modeling_auto.MODEL_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
]


def batch(**settings: Any) -> dict[str, Tensor]:
    made = tiny.batch(**settings)
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


BATCHES = [batch(lengths=(9, 9, 9), seed=seed) for seed in range(4)]


def narrow_config(name: str) -> dict[str, int]:
    inner = {"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(name, "intermediate_size")
    grouped = {"num_key_value_heads": 1} if name in ("llama", "qwen3") else {}
    return {"hidden_size": 16, "num_attention_heads": 2, inner: 40} | grouped


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**given).logits


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("width", ["importance", "pca"])
@pytest.mark.parametrize("name", NAMES)
def test_every_family_gets_narrower(name: str, width: str, tmp_path: object) -> None:
    teacher = classifiers()[name]
    student = init_student(teacher, [1, 3], narrow_config(name), width=width, batches=BATCHES)
    assert student.config.hidden_size == 16
    assert student.config.init_layers == [1, 3]
    assert student.training
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(again, BATCHES[0]), logits(student, BATCHES[0]))
    engine = Distillation(student.train(), teacher, [objectives.HiddenMSE()])
    engine(BATCHES[0]).total.backward()


@pytest.mark.parametrize("width", ["importance", "pca"])
@pytest.mark.parametrize("name", list(language_models()))
def test_tied_embeddings_stay_tied(name: str, width: str, tmp_path: object) -> None:
    student = init_student(language_models()[name], None, narrow_config(name), width=width, batches=BATCHES)
    assert student.get_input_embeddings().weight is student.get_output_embeddings().weight
    assert student.config.init_layers == [1, 2, 3]
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path)
    assert torch.equal(logits(again, BATCHES[0]), logits(student, BATCHES[0]))


@pytest.mark.parametrize("name", NAMES)
def test_importance_at_full_width_copies(name: str) -> None:
    teacher = classifiers()[name]
    student = init_student(teacher, config={"hidden_size": 32}, width="importance", batches=BATCHES)
    for key, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_pca_at_full_width_is_a_rotation(name: str) -> None:
    """Exact: gains move into the readers, or, where the norm comes last, are all one; so is the last norm's."""
    before = ("gpt2", "llama", "qwen3", "modernbert")
    teacher = classifiers(gains=name in before)[name]
    for path, module in teacher.named_modules():
        if path.split(".")[-1] in ("ln_f", "norm", "final_norm") and name in before:
            nn.init.ones_(module.weight)
    if name == "modernbert":
        # Its head has a nonlinearity in the residual stream's basis.
        teacher.head.act = nn.Identity()
    student = init_student(teacher, config={"hidden_size": 32}, width="pca", batches=BATCHES)
    if name == "modernbert":
        student.head.act = nn.Identity()
    assert not torch.allclose(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight) or name in (
        "electra", "albert",
    )  # fmt: skip
    torch.testing.assert_close(logits(student, BATCHES[0]), logits(teacher, BATCHES[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", ["importance", "pca"])
@pytest.mark.parametrize("name", FAMILIES)
def test_at_full_width_every_head_gives_the_same(name: str, width: str) -> None:
    """Whatever the gains, with the decoder tied to the embeddings and on its own."""
    family, config = FAMILIES[name]
    classes = {table[name] for table in HEADS if name in table}
    assert len(classes) > 3
    for made in sorted(classes):
        for tied in (True, False) if made.endswith("LM") else (True,):
            settings = getattr(tf, f"{family}Config")(**config, tie_word_embeddings=tied, num_labels=2)
            teacher = make(getattr(tf, made), settings).double()
            student = init_student(teacher, config={"hidden_size": 32}, width=width, batches=BATCHES[:2])
            got, want = (model.double().eval()(**BATCHES[0]) for model in (student, teacher))
            for key in ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output"):
                # A base model's last state is in the rotated basis; what is read from it is not.
                if getattr(want, key, None) is not None and not (key == "last_hidden_state" and width == "pca"):
                    error = (got[key] - want[key]).abs().max() / want[key].abs().max()
                    assert error < 1e-5, (made, tied, key)


@pytest.mark.parametrize("made", [tf.ModernBertForSequenceClassification, tf.ModernBertForMaskedLM])
def test_what_is_inside_a_head_is_not_rotated(made: Any) -> None:
    """Its activation works on single dimensions; its gains are all different."""
    config = tf.ModernBertConfig(**SMALL, **SPECIAL, tie_word_embeddings=False)
    teacher = make(made, config)
    for norm in (teacher.model.embeddings.norm, teacher.model.final_norm):
        nn.init.ones_(norm.weight)
    student = init_student(teacher, config={"hidden_size": 32}, width="pca", batches=BATCHES)
    assert not torch.allclose(student.head.dense.weight, teacher.head.dense.weight)
    torch.testing.assert_close(logits(student, BATCHES[0]), logits(teacher, BATCHES[0]), rtol=1e-4, atol=1e-4)
    small = init_student(teacher, None, narrow_config("modernbert"), width="pca", batches=BATCHES)
    kept = [int((small.head.norm.weight[i] == teacher.head.norm.weight).nonzero()) for i in range(16)]
    assert kept == sorted(set(kept))  # entries of the teacher's, chosen and not mixed
    score = torch.zeros(32)
    teacher.head.register_forward_hook(lambda _, x, y: score.add_(y.abs().flatten(0, -2).sum(0)))
    for given in BATCHES:
        logits(teacher, given)
    assert kept == sorted(score.argsort(descending=True)[:16].tolist())


def test_removed_neurons_that_nobody_reads_change_nothing() -> None:
    for name, teacher in classifiers().items():
        config = narrow_config(name)
        inner = {k: v for k, v in config.items() if v == 40}
        idle = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:24]
        for path, module in teacher.named_modules():
            if (
                path.endswith(("output.dense", "ffn.lin2", "ffn_output", "down_proj", "mlp.Wo"))
                and "attention" not in path
            ):
                module.weight.data[:, idle] = 0
            if path.endswith("mlp.c_proj"):
                idle = torch.arange(0, 128, 4)
                inner = {"n_inner": 96}
                module.weight.data[idle] = 0
        student = init_student(teacher, config=inner, width="importance")
        torch.testing.assert_close(logits(student, BATCHES[0]), logits(teacher, BATCHES[0]), rtol=1e-5, atol=1e-5)


def test_removed_heads_that_nobody_reads_change_nothing() -> None:
    teacher = classifiers()["llama"]
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.data[:, 8:16] = 0  # one head of each group
        layer.self_attn.o_proj.weight.data[:, 16:24] = 0
    student = init_student(teacher, config={"num_attention_heads": 2}, width="importance")
    assert student.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    torch.testing.assert_close(logits(student, BATCHES[0]), logits(teacher, BATCHES[0]), rtol=1e-5, atol=1e-5)


def test_removed_key_value_heads_take_their_heads_along() -> None:
    teacher = classifiers()["llama"]
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.data[:, :16] = 0
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    student = init_student(teacher, config=config, width="importance")
    assert torch.equal(
        student.model.layers[0].self_attn.k_proj.weight, teacher.model.layers[0].self_attn.k_proj.weight[8:]
    )
    torch.testing.assert_close(logits(student, BATCHES[0]), logits(teacher, BATCHES[0]), rtol=1e-5, atol=1e-5)


def unused_dimensions(teacher: Any, idle: Tensor) -> None:
    """Make a Llama never write to some dimensions of its residual stream."""
    teacher.model.embed_tokens.weight.data[:, idle] = 0
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.data[idle] = 0
        layer.mlp.down_proj.weight.data[idle] = 0


@pytest.mark.parametrize("width", ["importance", "pca"])
def test_unused_residual_dimensions_change_nothing(width: str) -> None:
    """The norms divide by the mean square over fewer dimensions: the factor makes up for it."""
    teacher = classifiers(gains=width == "importance")["llama"]
    unused_dimensions(teacher, torch.arange(0, 32, 2))
    student = init_student(teacher, config={"hidden_size": 16}, width=width, batches=BATCHES)
    torch.testing.assert_close(logits(student, BATCHES[0]), logits(teacher, BATCHES[0]), rtol=1e-3, atol=1e-3)


IDLE = torch.tensor([h * 8 + k for h in range(4) for k in (0, 3, 4, 7)])  # half the features of each head


def half_a_bert(inside: Tensor) -> Any:
    teacher = classifiers(gains=False)["bert"]
    for path, module in teacher.named_modules():
        if isinstance(module, nn.Embedding):
            module.weight.data @= inside
        elif path.endswith("output.dense"):
            module.weight.data = inside @ module.weight
            module.bias.data = inside @ module.bias
        elif path.endswith("LayerNorm"):
            module.bias.data = inside @ module.bias
        elif path.endswith(("query", "key", "value")):
            module.weight.data[IDLE], module.bias.data[IDLE] = 0, 0
    return teacher


def half_a_gpt2(inside: Tensor) -> Any:
    teacher = classifiers()["gpt2"]
    body = teacher.transformer
    for module in (body.wte, body.wpe, *(m for h in body.h for m in (h.attn.c_proj, h.mlp.c_proj))):
        module.weight.data = module.weight @ inside
        if hasattr(module, "bias"):
            module.bias.data = inside @ module.bias
    for block in body.h:
        for part in range(3):
            block.attn.c_attn.weight.data[:, IDLE + 32 * part] = 0
            block.attn.c_attn.bias.data[IDLE + 32 * part] = 0
        block.ln_1.bias.data.zero_()  # else it would wake the idle features up
    nn.init.ones_(body.ln_f.weight)
    nn.init.zeros_(body.ln_f.bias)
    return teacher


def half_a_gpt2_with_other_scales(inside: Tensor) -> Any:
    """Its scores aren't divided by the root of the head's size, but by the layer's number."""
    teacher = half_a_gpt2(inside)
    teacher.config.scale_attn_weights, teacher.config.scale_attn_by_inverse_layer_idx = False, True
    for number, block in enumerate(teacher.transformer.h, start=1):
        block.attn.scaling = 1 / number
    return teacher


@pytest.mark.parametrize("make_teacher", [half_a_bert, half_a_gpt2, half_a_gpt2_with_other_scales])
def test_a_teacher_that_uses_half_its_width_is_found_in_it(make_teacher: Callable[[Tensor], Any]) -> None:
    """Its residual stream stays in a subspace of 16 dimensions, heads use half their features: pca loses nothing."""
    generator = torch.Generator().manual_seed(0)
    span = torch.linalg.qr(torch.cat([torch.ones(32, 1), torch.randn(32, 15, generator=generator)], 1)).Q
    teacher = make_teacher(span @ span.T)
    config = {"hidden_size": 16} | ({} if make_teacher is half_a_bert else {"n_inner": 128})
    student = init_student(teacher, config=config, width="pca", batches=BATCHES)
    assert student.config.num_attention_heads == 4
    if make_teacher is half_a_bert:  # all neurons of the pooler are kept in no student of 16
        hidden = [model.eval()(**BATCHES[0], output_hidden_states=True).hidden_states for model in (student, teacher)]
        for mine, theirs in zip(*hidden, strict=True):
            torch.testing.assert_close(mine @ mine.mT, theirs @ theirs.mT, rtol=1e-3, atol=1e-3)
    else:
        torch.testing.assert_close(logits(student, BATCHES[0]), logits(teacher, BATCHES[0]), rtol=1e-3, atol=1e-3)


def test_importance_keeps_what_is_largest_and_matches_loops() -> None:
    """One layer of a BERT against loops written by hand."""
    teacher = classifiers()["bert"]
    config = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 40}
    student = init_student(teacher, [2], config, width="importance", batches=BATCHES)
    total, count, context, inner = torch.zeros(32), 0, torch.zeros(32), torch.zeros(64)
    layer = teacher.bert.encoder.layer[1]
    with torch.no_grad():
        for given in BATCHES:
            seen: dict[str, Tensor] = {}
            hooks = [
                layer.attention.output.dense.register_forward_pre_hook(lambda _, x, s=seen: s.update(c=x[0])),
                layer.output.dense.register_forward_pre_hook(lambda _, x, s=seen: s.update(f=x[0])),
            ]
            output = teacher(**given, output_hidden_states=True)
            for hook in hooks:
                hook.remove()
            for row in range(3):
                for token in range(9):
                    total += sum(h[row, token].abs() for h in output.hidden_states)
                    context += seen["c"][row, token].abs()
                    inner += seen["f"][row, token].abs()
                    count += 1
    keep = sorted(total.argsort(descending=True)[:16].tolist())
    head_scores = [float(context[h * 8 : h * 8 + 8].sum()) for h in range(4)]
    heads = sorted(sorted(range(4), key=lambda h: -head_scores[h])[:2])
    rows = [h * 8 + k for h in heads for k in range(8)]
    neurons = sorted(inner.argsort(descending=True)[:40].tolist())
    mine = student.bert.encoder.layer[0]
    assert torch.equal(mine.attention.self.key.weight, layer.attention.self.key.weight[rows][:, keep])
    assert torch.equal(mine.attention.output.dense.weight, layer.attention.output.dense.weight[keep][:, rows])
    assert torch.equal(mine.intermediate.dense.bias, layer.intermediate.dense.bias[neurons])
    assert torch.equal(mine.output.dense.weight, layer.output.dense.weight[keep][:, neurons])
    assert torch.equal(
        student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight[:, keep]
    )


def test_pca_matches_loops() -> None:
    teacher = classifiers()["bert"]
    student = init_student(teacher, [2], {"hidden_size": 16, "num_attention_heads": 2}, width="pca", batches=BATCHES)
    moment = torch.zeros(32, 32, dtype=torch.double)
    with torch.no_grad():
        for given in BATCHES:
            for hidden in teacher(**given, output_hidden_states=True).hidden_states:
                for vector in hidden.reshape(-1, 32).double():
                    moment += torch.outer(vector, vector)
    basis = principal_basis(moment, 16, centred=True).float()
    torch.testing.assert_close(basis.T @ basis, torch.eye(16))
    mine, theirs = student.bert.encoder.layer[0], teacher.bert.encoder.layer[1]
    torch.testing.assert_close(mine.intermediate.dense.weight, theirs.intermediate.dense.weight @ basis)
    torch.testing.assert_close(mine.output.dense.weight, basis.T @ theirs.output.dense.weight)
    torch.testing.assert_close(mine.output.dense.bias, basis.T @ theirs.output.dense.bias)
    gain = torch.stack(
        [sum(basis[i, j] ** 2 * theirs.output.LayerNorm.weight[i] for i in range(32)) for j in range(16)]
    )
    ratio = mine.output.LayerNorm.weight / gain
    torch.testing.assert_close(ratio, ratio[0].expand(16))
    assert 1 < ratio[0] <= 2**0.5


def test_the_basis_keeps_the_most_energy() -> None:
    states = torch.randn(200, 12, dtype=torch.double, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    moment = states.T @ states
    for centred in (False, True):
        basis = principal_basis(moment, 5, centred)
        projection = basis @ basis.T
        ones = torch.ones(12, dtype=torch.double)
        if centred:
            torch.testing.assert_close(basis.T @ ones / 12**0.5, torch.ones(5, dtype=torch.double) / 5**0.5)
            inner = states - states.mean(1, keepdim=True)
        else:
            inner = states
        best = torch.linalg.svdvals(inner)[: 5 - centred].square().sum()
        torch.testing.assert_close((inner @ projection).square().sum(), best)


def test_the_teacher_and_the_random_state_are_left_as_they_were() -> None:
    teacher = classifiers()["bert"].train()
    teacher.bert.encoder.layer[0].eval()
    teacher.bert.pooler.dense.weight.requires_grad_(False)
    before, modes = state(teacher), [m.training for m in teacher.modules()]
    grads, random = [p.requires_grad for p in teacher.parameters()], torch.get_rng_state()
    for width in ("importance", "pca"):
        init_student(teacher, None, narrow_config("bert"), width=width, batches=BATCHES)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert [m.training for m in teacher.modules()] == modes
    assert [p.requires_grad for p in teacher.parameters()] == grads
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert teacher.config.hidden_size == 32


def test_captured_and_half_precision_teachers() -> None:
    teacher = classifiers()["bert"]
    Distillation(tiny.bert(2, width=32), teacher, [objectives.HiddenMSE(), objectives.AttentionKL()])
    student = init_student(teacher, None, narrow_config("bert"), width="pca", batches=BATCHES)
    assert student.config._attn_implementation == "sdpa"
    half = init_student(teacher.bfloat16(), None, narrow_config("bert"), width="pca", batches=BATCHES)
    assert half.dtype == torch.float32
    assert (logits(half, BATCHES[0]) - logits(student, BATCHES[0])).abs().max() < 1


def test_padding_does_not_count() -> None:
    teacher = classifiers()["bert"]
    given = [tiny.batch(), tiny.batch(right=3)]
    students = [init_student(teacher, None, narrow_config("bert"), width="pca", batches=[one]) for one in given]
    for mine, padded in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(mine, padded, rtol=1e-3, atol=1e-3)


def test_narrowing_keeps_more_than_chance() -> None:
    """A student of the leading components is nearer to the teacher than one of random weights."""
    teacher = classifiers()["llama"]
    unused = torch.arange(12, 32)
    teacher.model.embed_tokens.weight.data[:, unused] *= 0.02
    for layer in teacher.model.layers:
        layer.self_attn.o_proj.weight.data[unused] *= 0.02
        layer.mlp.down_proj.weight.data[unused] *= 0.02
    want = logits(teacher, BATCHES[0])
    fresh = init_student(teacher, config={"hidden_size": 16})
    for width in ("importance", "pca"):
        student = init_student(teacher, config={"hidden_size": 16}, width=width, batches=BATCHES)
        assert (logits(student, BATCHES[0]) - want).norm() < 0.5 * (logits(fresh, BATCHES[0]) - want).norm()


@pytest.mark.parametrize(
    ("name", "config", "settings", "message"),
    [
        ("bert", {"hidden_size": 16}, {"width": "svd"}, "width must be 'importance', 'pca' or None, got 'svd'"),
        ("bert", {"hidden_size": 16}, {"width": "pca"}, "width='pca' needs calibration batches"),
        ("bert", {"hidden_size": 16}, {"width": "pca", "batches": []}, "batches has no batch"),
        ("bert", None, {"width": "importance"}, "say how narrow"),
        ("bert", {"hidden_size": 64}, {"width": "importance"}, "head size is 16, the teacher's 8: heads can't grow"),
        (
            "bert",
            {"hidden_size": 40, "num_attention_heads": 5},
            {"width": "importance"},
            "it can't grow|can't be chosen",
        ),
        ("bert", {"intermediate_size": 80}, {"width": "importance"}, "80 inner neurons, the teacher 64"),
        ("bert", {"num_attention_heads": 2}, {"width": "importance"}, "heads can't grow"),
        ("llama", {"head_dim": 4}, {"width": "importance"}, "Rotary position embeddings"),
        ("modernbert", {"hidden_size": 16}, {"width": "importance"}, "Rotary position embeddings"),
        ("electra", {"hidden_size": 24}, {"width": "importance"}, "Only one of student and teacher has electra.embed"),
        ("llama", {"num_attention_heads": 3}, {"width": "importance"}, "can't be chosen"),
        ("bert", {"hidden_size": 16}, {"layers": [1], "batches": []}, "batches are for width"),
    ],
)
def test_what_is_not_possible_is_refused(name: str, config: Any, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_student(classifiers()[name], config=config, **settings)


def test_electra_without_a_projection_changes_both_sizes() -> None:
    teacher = make(tf.ElectraForMaskedLM, tf.ElectraConfig(**SMALL, embedding_size=32))
    student = init_student(teacher, config={"hidden_size": 16, "embedding_size": 16}, width="importance")
    assert student.get_input_embeddings().weight.shape == (50, 16)
    with pytest.raises(ValueError, match="set embedding_size to the new hidden_size"):
        init_student(teacher, config={"hidden_size": 16}, width="importance")


def test_weights_alone_find_the_dimensions_that_count() -> None:
    """By the gains and biases where norms write to the stream, else by the weights that write to it."""
    keep = torch.arange(1, 32, 2)
    bert, llama = classifiers()["bert"], classifiers()["llama"]
    for path, module in bert.named_modules():
        if path.endswith("LayerNorm"):
            module.weight.data[keep] += 2
    unused_dimensions(llama, keep - 1)
    for teacher in (bert, llama):
        student = init_student(teacher, config={"hidden_size": 16}, width="importance")
        assert torch.equal(student.get_input_embeddings().weight, teacher.get_input_embeddings().weight[:, keep])


def test_unknown_families_and_weights_are_refused() -> None:
    mpnet = tf.MPNetForSequenceClassification(tf.MPNetConfig(**SMALL))
    with pytest.raises(ValueError, match="doesn't know how MPNetForSequenceClassification uses its weights"):
        init_student(mpnet, config={"hidden_size": 16}, width="importance")
    teacher = classifiers()["bert"]
    teacher.bert.extra = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="The weights bert.extra.weight of BertForSequenceClassification have no role"):
        init_student(teacher, config={"hidden_size": 16}, width="importance")
