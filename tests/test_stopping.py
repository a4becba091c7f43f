"""Runs that stop where everything wanted is recorded, and logits that are never made whole."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from test_models import FAMILIES, GROUPED, ROWS, TEXT, batch_for
from torch import Tensor, nn
from transformers import PreTrainedModel

import tiny
from ildistil import Distillation, Distiller, mappings, objectives
from ildistil.capture import Capture, Tap
from ildistil.errors import CaptureError, ObjectiveError
from ildistil.kernels import chunked
from ildistil.objectives import Objective
from ildistil.stages import Stage
from test_distiller import loader, trainer

DEEPEST = 2


def taps(model: nn.Module, stack: str | None) -> list[frozenset[Tap]]:
    """Sets of taps whose deepest layer is not the last."""
    attention, hidden = Tap("attention", DEEPEST, stack), Tap("hidden", DEEPEST, stack)
    first = Tap("hidden", 0, stack)
    if stack == "cross":
        return [frozenset({attention})]
    if not hasattr(model, "config"):
        return [frozenset({hidden}), frozenset({first})]
    return [frozenset({hidden}), frozenset({attention}), frozenset({first, attention}), frozenset({hidden, attention})]


def layers_run(model: nn.Module, capture: Capture) -> list[int]:
    """Count the layers that a run finishes; the counters stay on the model."""
    finished: list[int] = []
    for layers in capture._hooks.layers.values():
        for number, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, n=number: finished.append(n))
    return finished


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row.teacher == row.student])
def test_a_run_stops_after_the_deepest_layer_and_gives_the_same(row: str) -> None:
    torch.manual_seed(0)
    stack = ROWS[row].stack
    model = FAMILIES[ROWS[row].teacher](4).eval()
    for wanted in taps(model, stack):
        capture = Capture(model, wanted)
        finished = layers_run(model, capture)
        batch = batch_for(model)
        whole = capture(batch, verify=True).stack(stack)
        all_layers = len(finished)
        finished.clear()
        seen = capture(batch)
        assert seen.output is None
        assert len(finished) < all_layers
        part = seen.stack(stack)
        for layer, state in part.hidden.items():
            torch.testing.assert_close(state, whole.hidden[layer], rtol=0, atol=0)
        for layer, record in part.attention.items():
            for name in ("query", "key", "value"):
                torch.testing.assert_close(getattr(record, name), getattr(whole.attention[layer], name))
        torch.testing.assert_close(part.mask, whole.mask)
        with pytest.raises(CaptureError, match="Name 'logits' in the objective's taps"):
            _ = seen.logits
        capture.close()


def gradients(engine: Distillation, batch: dict[str, Tensor], steps: int = 2, **options: Any) -> dict[str, Tensor]:
    """The last of some steps; the first one verifies, and so runs the models to their end."""
    for _ in range(steps):
        engine.zero_grad()
        engine(batch, **options).total.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in engine.named_parameters()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("change", ["nothing", "checkpointing", "compile", "the student compiled by its owner"])
@pytest.mark.parametrize(
    "terms",
    [[objectives.AttentionKL], [objectives.HiddenMSE], [objectives.AttentionMSE, objectives.HiddenMSE]],
    ids=lambda terms: "+".join(t.__name__ for t in terms),
)
def test_a_student_that_stops_has_the_same_gradients(terms: list[type[Objective]], change: str) -> None:
    def engine() -> Distillation:
        models = tiny.bert(3).double(), tiny.bert(6, seed=1).double()
        return Distillation(*models, [term(mapping=mappings.Explicit([[1, 1], [2, 3]])) for term in terms])

    torch._dynamo.reset()
    whole, stopping = engine(), engine()
    if change == "checkpointing":
        model = stopping.student
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # type: ignore[operator]
    elif change == "compile":
        stopping.compile(backend="aot_eager", fullgraph=True)
    elif change != "nothing":
        stopping.student.compile(backend="aot_eager")
    batch = tiny.batch()
    expected = gradients(whole, batch, verify=True)
    found = gradients(stopping, batch, steps=3)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_compiled_run_leaves_out_what_nobody_wants() -> None:
    sizes: list[int] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        sizes.append(sum(node.target is torch._C._nn.linear for node in module.graph.nodes))
        return module.forward

    torch._dynamo.reset()
    model = tiny.bert(4)
    capture = Capture(model, {Tap("hidden", 2), Tap("logits")})
    capture.compile(backend=backend)
    for _ in range(2):  # the first run of a tap is a plain one, which is checked
        capture(tiny.batch(), wanted=frozenset({Tap("hidden", 2)}))
    for _ in range(2):
        capture(tiny.batch())
    assert sizes == [2 * 6, 4 * 6 + 2]  # six linear maps in a layer, the pooler and the classifier


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_fit_trains_as_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models compiled, in two stages, in the first of which both stop early."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="aot_eager", **options))

    def fitted(compiled: bool) -> dict[str, Tensor]:
        torch._dynamo.reset()
        module = Distiller(
            tiny.bert(2), tiny.bert(4, seed=1), compile=compiled,
            stages=[Stage(["attention_mse"], epochs=1), Stage(["logits_kl", "task_loss"], epochs=1)],
        )  # fmt: skip
        terms = [objectives.AttentionMSE(), objectives.LogitsKL(), objectives.TaskLoss()]
        trainer(*terms, max_epochs=2, precision="64-true").fit(module, loader())
        return {name: p.detach() for name, p in module.student.named_parameters()}

    plain, compiled = fitted(False), fitted(True)
    for name, parameter in compiled.items():
        torch.testing.assert_close(parameter, plain[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_layer_that_was_skipped_is_noticed_before_the_end() -> None:
    model = tiny.bert(4)
    capture = Capture(model, {Tap("hidden", 2)})
    del model.bert.encoder.layer[0]
    with pytest.raises(CaptureError, match="Layer 2 ran as layer 1"):
        capture(tiny.batch())


LANGUAGE = {
    "BERT": FAMILIES["BERT, masked language model"],
    "DistilBERT": lambda depth: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(dim=32, n_layers=depth, n_heads=4, hidden_dim=64, vocab_size=50)
    ),
    "ModernBERT": lambda depth: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2, local_attention=4, num_hidden_layers=depth)
    ),
    "GPT-2": FAMILIES["GPT-2, language model"],
    "Llama": lambda depth: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED, num_hidden_layers=depth)),
    "T5": FAMILIES["T5"],
    "Gemma 2": lambda depth: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**GROUPED, num_hidden_layers=depth, final_logit_softcapping=5.0)
    ),
}
TERMS: dict[str, list[Objective]] = {
    "forward": [objectives.LogitsKL()],
    "reverse": [objectives.LogitsKL(divergence="reverse", temperature=1.0)],
    "Jensen-Shannon": [objectives.LogitsKL(divergence="jensen-shannon")],
    "top 5": [objectives.LogitsKL(top_k=5)],
    "squared": [objectives.LogitsMSE()],
    "correlation": [objectives.LogitsDIST()],
    "with the model's own loss": [objectives.LogitsKL(), objectives.TaskLoss(weight=0.5)],
    "the model's own loss": [objectives.TaskLoss()],
}


def language_models(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    torch.manual_seed(0)
    models = [LANGUAGE[family](depth) for depth in (1, 2)]
    for model in models:
        model.double().eval()
        for parameter in model.parameters():  # random models predict next to nothing
            parameter.data *= 4
    return models[0], models[1]  # type: ignore[return-value]


def text_with_targets(family: str) -> dict[str, Tensor]:
    batch = {key: tiny.batch()[key] for key in ("input_ids", "attention_mask")}
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[0, 2] = labels[1, 1] = -100
    return batch | {"labels": labels}


@pytest.mark.parametrize(
    ("family", "terms", "chunk"),
    [(family, terms, 120) for family in LANGUAGE for terms in ("forward", "with the model's own loss")]
    + [("BERT", terms, chunk) for terms in TERMS for chunk in (1, 2**24)],
)
def test_chunked_logits_have_the_same_losses_and_gradients(
    family: str, terms: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_CHUNK", chunk)
    engines = [Distillation(*language_models(family), copy.deepcopy(TERMS[terms])).eval() for _ in range(2)]
    batch = text_with_targets(family)
    whole, parts = engines[0](batch, verify=True), (engines[1](batch), engines[1](batch))[1]
    for name, value in parts.values.items():
        # Some models make their own loss, and T5 its attention, in float32 whatever they are.
        torch.testing.assert_close(value.double(), whole.values[name].double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(parts.counts[name].number, whole.counts[name].number)
    expected, found = gradients(engines[0], batch, verify=True), gradients(engines[1], batch)
    precision = 1e-6 if "loss" in terms or family == "T5" else 1e-11
    errors = torch.stack([(gradient - expected[name]).norm() for name, gradient in found.items()])
    assert errors.max() <= precision * torch.stack([gradient.norm() for gradient in expected.values()]).norm()


def rows_of_output_layer(model: PreTrainedModel) -> list[int]:
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, output: rows.append(output[..., 0].numel()))
    return rows


@pytest.mark.parametrize("family", LANGUAGE)
def test_only_target_tokens_get_logits(family: str) -> None:
    student, teacher = language_models(family)
    engine = Distillation(student, teacher, [objectives.LogitsKL()]).eval()
    batch = text_with_targets(family)
    engine(batch)
    rows = rows_of_output_layer(student), rows_of_output_layer(teacher)
    engine(batch)
    seen = Capture(student, {Tap("logits")})(batch, verify=True)
    targets = int(engine.objectives["logits_kl"].count(seen, batch).number)
    everything = batch["input_ids"].numel()
    # A cap on the logits comes after Gemma 2's output layer, so there they are taken from the model.
    assert rows[1] == ([everything] if family == "Gemma 2" else [targets])
    assert rows[0][0] == (everything if family == "Gemma 2" else targets)
    assert targets < everything


def test_chunks_have_no_second_derivative_and_cost_nothing_without_a_gradient() -> None:
    layer, states = nn.Linear(2, 3), torch.randn(4, 2, requires_grad=True)
    value = chunked.summed(lambda logits, _: logits.square().sum(-1), layer, layer, states)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, states, create_graph=True)
    with torch.no_grad():
        assert not chunked.summed(lambda logits, _: logits.square().sum(-1), layer, layer, states).requires_grad
    nothing = chunked.summed(lambda logits, _: logits.sum(-1), layer, layer, states[:0])
    assert (nothing.item(), torch.autograd.grad(nothing, layer.weight)[0].abs().sum().item()) == (0, 0)


def test_vocabularies_of_other_sizes_are_refused() -> None:
    student, teacher = language_models("BERT")
    teacher.cls.predictions.decoder = nn.Linear(32, 51).double()
    teacher.config.vocab_size = student.config.vocab_size
    with pytest.raises(ObjectiveError, match="student gives .*50.*, the teacher .*51"):
        Distillation(student, teacher, [objectives.LogitsKL()])(text_with_targets("BERT"))


def test_chunks_are_added_up_in_full_precision() -> None:
    """Of bfloat16 weights, and in float16, where a sum over rows would be infinite."""
    torch.manual_seed(0)
    layer, states = nn.Linear(8, 50), torch.randn(2000, 8)
    layer.weight.data *= 3

    def gradients(dtype: torch.dtype | None, weights: nn.Linear) -> Tensor:
        inputs = states.to(weights.weight.dtype).requires_grad_()

        def logits(rows: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                return weights(rows)  # type: ignore[no-any-return]

        value = chunked.summed(lambda z, _: z.float().logsumexp(-1), logits, weights, inputs)
        return torch.autograd.grad(value, weights.weight)[0].float()

    exact = gradients(None, layer)
    rounded = copy.deepcopy(layer).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "_CHUNK", 16 * 50)
        assert (gradients(None, rounded) - exact).norm() < 5e-3 * exact.norm()
    states = states * 200
    assert torch.isfinite(gradients(torch.float16, layer)).all()


def test_logits_are_made_in_the_precision_that_the_model_ran_in() -> None:
    student, teacher = (model.float() for model in language_models("BERT"))
    engine = Distillation(student, teacher.half(), [objectives.LogitsKL()]).eval()
    batch = text_with_targets("BERT")
    with torch.autocast("cpu", torch.bfloat16):
        whole, parts = engine(batch), engine(batch)
    torch.testing.assert_close(parts.total, whole.total, rtol=1e-4, atol=0)


def test_a_loss_with_more_than_cross_entropy_is_left_to_the_model() -> None:
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        **GROUPED, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True
    )
    engine = Distillation(tf.MixtralForCausalLM(config), None, [objectives.TaskLoss()]).eval()
    batch = text_with_targets("Llama")
    assert engine(batch).total == engine(batch).total


def test_labels_of_another_shape_are_left_to_the_model() -> None:
    """Sparse prediction makes logits of the masked tokens only."""
    torch.manual_seed(0)
    config = tf.ModernBertConfig(
        **TEXT, cls_token_id=1, sep_token_id=2, local_attention=4, num_hidden_layers=1, sparse_prediction=True
    )
    engine = Distillation(tf.ModernBertForMaskedLM(config), None, [objectives.TaskLoss()]).eval()
    batch = text_with_targets("ModernBERT")
    torch.testing.assert_close(engine(batch).total, engine(batch).total)


def test_a_first_batch_without_targets_decides_nothing() -> None:
    engine = Distillation(*language_models("BERT"), [objectives.TaskLoss()]).eval()
    batch = text_with_targets("BERT")
    engine(batch | {"labels": torch.full_like(batch["labels"], -100)})
    assert engine._capture is not None
    assert "loss" not in engine._capture._agrees
    engine(batch)
    assert engine._capture._agrees["loss"]


def test_the_logits_of_a_stack_are_those_of_the_model() -> None:
    capture = Capture(LANGUAGE["T5"](1).eval(), {Tap("logits")})  # type: ignore[arg-type]
    batch = text_with_targets("T5")
    whole = capture(batch, verify=True).stack("decoder").logits
    seen = capture(batch)
    assert seen.output is None
    torch.testing.assert_close(seen.stack("decoder").logits, whole)


def test_what_nobody_wants_is_not_given_in_the_first_step_either() -> None:
    seen = Capture(tiny.bert(2), {Tap("hidden", 2)})(tiny.batch(), verify=True)
    with pytest.raises(CaptureError, match="Nobody asked"):
        _ = seen.logits


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_first_step_checks_a_compiled_model_too() -> None:
    torch._dynamo.reset()
    engine = Distillation(*language_models("BERT"), [objectives.LogitsKL()]).eval()
    engine.compile(backend="aot_eager")
    for _ in range(2):
        engine(text_with_targets("BERT"))
    assert engine._capture is not None
    assert engine._capture._agrees == {"logits": True}


def test_padding_before_a_text_has_no_target() -> None:
    models = [model.double() for model in language_models("Llama")]
    engine = Distillation(*models, [objectives.LogitsKL()]).eval()
    batch = {key: tiny.batch()[key] for key in ("input_ids", "attention_mask", "position_ids")}
    left = {key: tiny.batch(left=3)[key] for key in batch}
    torch.testing.assert_close(engine(batch).total, engine(left).total, rtol=1e-6, atol=1e-9)


def test_a_teacher_of_another_precision() -> None:
    for term in (objectives.AttentionKL, objectives.AttentionMSE, objectives.RelationKL, objectives.LogitsKL):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ildistil.kernels.choice._SHORT", 0)
            engine = Distillation(tiny.bert(2).double(), tiny.bert(4, seed=1), [term()])
            engine(tiny.batch()).total.backward()
