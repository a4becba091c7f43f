"""What the losses refuse: arguments that torch would broadcast, convert or compute with silently."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ildistil import functional, kernels, mappings, objectives, schedules
from ildistil.attention import Masks, Scores
from ildistil.capture import ModelInfo
from ildistil.errors import ConfigError, IldistilError, ObjectiveError

STATES, SCORES, LOGITS = torch.randn(2, 3, 4), torch.randn(2, 4, 3, 3), torch.randn(2, 5)
MASK, ALLOWED = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 1, 3, 3, dtype=torch.bool)
BATCH = torch.ones(2, dtype=torch.bool)

# Name -> the loss, and arguments that it takes.
LOSSES: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "attention_dist": (
        functional.attention_dist,
        {"student": SCORES, "teacher": SCORES, "allowed": ALLOWED, "query_mask": MASK},
    ),
    "attention_dist_over_batch": (
        functional.attention_dist_over_batch,
        {"student": SCORES, "teacher": SCORES, "allowed": ALLOWED, "query_mask": MASK},
    ),
    "attention_kl": (
        functional.attention_kl,
        {"student": SCORES, "teacher": SCORES, "allowed": ALLOWED, "query_mask": MASK},
    ),
    "attention_mse": (
        functional.attention_mse,
        {"student": SCORES, "teacher": SCORES, "allowed": ALLOWED, "query_mask": MASK},
    ),
    "attention_output": (
        functional.attention_output,
        {"scores": SCORES, "value": torch.randn(2, 2, 3, 6), "allowed": ALLOWED},
    ),
    "cls_mse": (functional.cls_mse, {"student": STATES, "teacher": STATES, "mask": MASK}),
    "example_mean": (functional.example_mean, {"values": LOGITS[:, 0], "counts": BATCH}),
    "first_token": (functional.first_token, {"states": STATES, "mask": MASK}),
    "hidden_cka": (functional.hidden_cka, {"student": STATES, "teacher": STATES, "mask": MASK}),
    "hidden_cosine": (functional.hidden_cosine, {"student": STATES, "teacher": STATES, "mask": MASK}),
    "hidden_mse": (functional.hidden_mse, {"student": STATES, "teacher": STATES, "mask": MASK}),
    "info_nce": (
        lambda **given: functional.info_nce(**given, temperature=1.0),
        {"anchors": LOGITS, "positives": LOGITS, "negatives": torch.randn(3, 5), "allowed": MASK},
    ),
    "last_token": (functional.last_token, {"states": STATES, "mask": MASK}),
    "log_normalizer": (
        lambda **given: functional.log_normalizer(**given, temperature=1.0),
        {"anchors": LOGITS, "positives": LOGITS, "negatives": torch.randn(3, 5), "allowed": MASK},
    ),
    "logits_dist": (functional.logits_dist, {"student": LOGITS, "teacher": LOGITS}),
    "logits_dist_over_batch": (
        functional.logits_dist_over_batch,
        {"student": LOGITS, "teacher": LOGITS, "mask": BATCH},
    ),
    "logits_kl": (functional.logits_kl, {"student": LOGITS, "teacher": LOGITS}),
    "logits_mse": (functional.logits_mse, {"student": LOGITS, "teacher": LOGITS}),
    "masked_mean": (functional.masked_mean, {"values": LOGITS, "mask": torch.ones(2, 5, dtype=torch.bool)}),
    "nce": (
        lambda **given: functional.nce(**given, temperature=1.0),
        {"anchors": LOGITS, "positives": LOGITS, "negatives": torch.randn(3, 5), "allowed": MASK}
        | {"log_normalizer": torch.tensor(0.0)},
    ),
    "pool": (lambda **given: functional.pool(**given, pooling="last"), {"states": STATES, "mask": MASK}),
    "token_mean": (functional.token_mean, {"states": STATES, "mask": MASK}),
}
COUNTS = [("example_mean", "counts")]  # may be boolean or numbers
ARGUMENTS = [(name, argument) for name, (_, given) in LOSSES.items() for argument in given]


def test_every_loss_is_here() -> None:
    assert sorted(LOSSES) == sorted(set(functional.__all__) - {"full_precision"})


@pytest.mark.parametrize(("name", "argument"), [place for place in ARGUMENTS if place not in COUNTS])
def test_another_dtype_is_refused(name: str, argument: str) -> None:
    loss, given = LOSSES[name]
    loss(**given)
    wanted = given[argument].dtype
    for dtype in (torch.int64, torch.complex64, torch.float32 if wanted == torch.bool else torch.bool):
        with pytest.raises(ObjectiveError, match=rf"{argument} must be a .*, got {dtype}"):
            loss(**given | {argument: given[argument].to(dtype)})


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_another_number_of_dimensions_is_refused(name: str, argument: str) -> None:
    loss, given = LOSSES[name]
    value = given[argument]
    for wrong in [value.unsqueeze(0), *([value[0]] if value.ndim else [])]:
        with pytest.raises(ObjectiveError, match="must be of shape"):
            loss(**given | {argument: wrong})


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        ("logits_kl", "teacher", (5,)),
        ("logits_mse", "teacher", (1, 5)),
        ("logits_mse", "teacher", (2, 1)),
        ("logits_dist_over_batch", "mask", (1,)),
        ("hidden_mse", "mask", (2, 1)),
        ("hidden_mse", "mask", (1, 3)),
        ("hidden_mse", "teacher", (2, 3, 1)),
        ("hidden_cosine", "teacher", (1, 3, 4)),
        ("hidden_cka", "teacher", (2, 1, 4)),
        ("attention_mse", "teacher", (2, 1, 3, 3)),
        ("attention_kl", "query_mask", (2, 1)),
        ("attention_kl", "allowed", (3, 3)),
        ("attention_kl", "allowed", (2, 4, 3, 3)),
        ("attention_output", "value", (2, 3, 3, 6)),
        ("info_nce", "allowed", (2, 1)),
        ("masked_mean", "mask", (5,)),
        ("masked_mean", "mask", (1, 5)),
        ("example_mean", "counts", (2, 1)),
    ],
)
def test_what_would_be_broadcast_is_refused(name: str, argument: str, shape: tuple[int, ...]) -> None:
    loss, given = LOSSES[name]
    value = torch.ones(shape).to(given[argument].dtype)
    with pytest.raises(ObjectiveError, match="must be of shape|can't share"):
        loss(**given | {argument: value})


def test_masks_of_attention_may_be_broadcast_where_that_is_said() -> None:
    padding = torch.tensor([[True, True, False], [True, True, True]])
    whole = functional.attention_kl(SCORES, 2 * SCORES, padding[:, None, None, :].expand(2, 1, 3, 3), padding)
    assert torch.equal(functional.attention_kl(SCORES, 2 * SCORES, padding[:, None, None, :], padding), whole)


def test_another_device_is_refused() -> None:
    with pytest.raises(ObjectiveError, match="teacher is on meta, student on cpu. Move them to one device"):
        functional.logits_mse(LOGITS, LOGITS.to("meta"))


def test_tensors_only() -> None:
    with pytest.raises(ObjectiveError, match="teacher must be a tensor of floating-point numbers, got ndarray"):
        functional.logits_mse(LOGITS, LOGITS.numpy())  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, 1e30, 1e200, 1e-30, True, "2", None])
def test_a_temperature_out_of_range_is_refused(temperature: Any) -> None:
    for refuse in (
        lambda: functional.logits_kl(LOGITS, LOGITS, temperature),
        lambda: functional.logits_dist(LOGITS, LOGITS, temperature),
        lambda: functional.logits_dist_over_batch(LOGITS, LOGITS, BATCH, temperature),
        lambda: functional.info_nce(LOGITS, LOGITS, torch.randn(3, 5), MASK, temperature),
        lambda: objectives.LogitsKL(temperature=temperature),
        lambda: objectives.LogitsDIST(temperature=temperature),
        lambda: objectives.CLSContrast(temperature=temperature),
        lambda: objectives.CLSInBatchContrast(temperature=temperature),
    ):
        with pytest.raises(ConfigError, match="temperature must be a number between 0.01 and 1000, got"):
            refuse()


@pytest.mark.parametrize("temperature", [0.01, 0.1, 100, 1000])
@pytest.mark.parametrize("near", [0.1, 1.0])
def test_gradients_hold_over_the_whole_range_of_temperatures(temperature: float, near: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 3 * torch.randn(16, 1000, generator=generator)
    student = teacher + near * torch.randn(16, 1000, generator=generator)

    def gradient(loss: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        s = student.to(dtype).requires_grad_()
        value = loss(s, teacher.to(dtype), temperature)
        return torch.autograd.grad((value[0] if isinstance(value, tuple) else value).sum(), s)[0].double()

    for loss in (functional.logits_kl, functional.logits_dist):
        found, wanted = gradient(loss, torch.float32), gradient(loss, torch.float64)
        assert (found - wanted).norm() <= 5e-3 * wanted.norm() + 1e-9


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: functional.logits_kl(LOGITS, LOGITS, divergence="revers"),  # type: ignore[arg-type]
        lambda: functional.logits_kl(LOGITS, LOGITS, divergence="jensen-shannon", beta=0.0),
        lambda: functional.logits_kl(LOGITS, LOGITS, divergence="jensen-shannon", beta=1),
        lambda: functional.logits_kl(LOGITS, LOGITS, divergence="jensen-shannon", beta=math.nan),
        lambda: functional.logits_kl(LOGITS, LOGITS, top_k=0),
        lambda: functional.logits_kl(LOGITS, LOGITS, top_k=2.5),  # type: ignore[arg-type]
        lambda: functional.logits_kl(LOGITS, LOGITS, top_k=True),
        lambda: functional.attention_dist(SCORES, SCORES, ALLOWED, MASK, "sentences"),  # type: ignore[arg-type]
        lambda: functional.pool(STATES, MASK, "max"),  # type: ignore[arg-type]
        lambda: objectives.CLSMSE(pool="max"),  # type: ignore[arg-type]
        lambda: objectives.CLSAttentiveMSE(pool=True),  # type: ignore[arg-type]
        lambda: objectives.CLSContrast(size=0),
        lambda: objectives.CLSContrast(size=1.5),  # type: ignore[arg-type]
        lambda: objectives.CLSContrast(negatives=True),
        lambda: objectives.CLSContrast(momentum=1.0),
        lambda: objectives.CLSContrast(momentum=math.nan),
        lambda: objectives.CLSContrast(seed=0.5),  # type: ignore[arg-type]
        lambda: objectives.CLSContrast(estimator="crd"),  # type: ignore[arg-type]
        lambda: objectives.RelationKL(heads=0),
        lambda: objectives.RelationKL(heads=2.0),  # type: ignore[arg-type]
        lambda: objectives.AttentionKL(heads=True),  # type: ignore[arg-type]
        lambda: objectives.AttentionDIST(over="words"),  # type: ignore[arg-type]
        lambda: schedules.Linear("1", 0.0),  # type: ignore[arg-type]
        lambda: schedules.Linear(True, 0.0),
        lambda: schedules.Linear(1.0, 0.0, begin=math.nan),
        lambda: schedules.Window(0.5, until="1"),  # type: ignore[arg-type]
    ],
)
def test_a_setting_out_of_range_is_refused(refuse: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=r"(must be|are) .*(got|not all 0)"):
        refuse()


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: objectives.HiddenMSE(weight=True),
        lambda: objectives.HiddenMSE(weight="1"),  # type: ignore[arg-type]
        lambda: objectives.HiddenMSE(weight=math.nan),
        lambda: objectives.HiddenMSE(weight=torch.tensor(1.0)),  # type: ignore[arg-type]
        lambda: objectives.HiddenMSE(name=3),  # type: ignore[arg-type]
        lambda: objectives.HiddenMSE(mapping=mappings.Uniform),  # type: ignore[arg-type]
        lambda: objectives.HiddenMSE(projection=True),  # type: ignore[arg-type]
        lambda: objectives.HiddenMSE(stack="both"),  # type: ignore[arg-type]
        lambda: objectives.RelationKL(relations="q-q"),
        lambda: objectives.RelationKL(relations=[1]),  # type: ignore[list-item]
        lambda: objectives.RelationKL(relations=[]),
        lambda: objectives.QKVMSE(parts=["q", 1]),  # type: ignore[list-item]
        lambda: objectives.QKVMSE(parts=[]),
    ],
)
def test_an_objective_says_what_it_got(refuse: Callable[[], object]) -> None:
    with pytest.raises(IldistilError, match="got"):
        refuse()


def test_numbers_of_numpy_are_numbers() -> None:
    assert objectives.HiddenMSE(weight=np.float32(0.5)).weight == 0.5
    assert objectives.HiddenMSE(weight=-0.0).weight_at(None) == 0
    assert mappings.Last(np.int64(2))(3, 12) == [(2, 11), (3, 12)]
    assert mappings.Explicit([[np.int64(1), 4]])(3, 12) == [(1, 4)]


def test_all_classes_kept_apart_is_the_whole_divergence() -> None:
    whole = functional.logits_kl(LOGITS, 2 * LOGITS)
    for top_k in (5, 6, 1000):
        assert torch.equal(functional.logits_kl(LOGITS, 2 * LOGITS, top_k=top_k), whole)


@pytest.mark.parametrize("objective", [objectives.HiddenMSE, objectives.CLSAttentiveMSE, objectives.CLSInBatchContrast])
def test_an_unknown_width_is_refused(objective: type[objectives.MappedObjective]) -> None:
    with pytest.raises(ObjectiveError, match="needs the width"):
        objective().build(ModelInfo("student", 2, width=4), ModelInfo("teacher", 4))


def test_one_head_has_nothing_to_correlate_with() -> None:
    student, teacher = ModelInfo("student", 2, heads=4), ModelInfo("teacher", 4, heads=3)
    with pytest.raises(ObjectiveError, match=r"over='heads' .* of \[4, 3\] one is left after merging"):
        objectives.AttentionDIST(over="heads", heads="merge").build(student, teacher)


@pytest.mark.parametrize("loss", [kernels.attention_kl, kernels.attention_mse, kernels.attention_dist])
@pytest.mark.parametrize("backend", ["plain", "blockwise"])
def test_kernels_refuse_what_would_be_broadcast(loss: Callable[..., Any], backend: kernels.Backend) -> None:
    query, key = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 5, 6)
    good, masks = Scores(query, key), Masks(torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool))
    with kernels.use(backend):
        loss(good, good, masks)
        for bad in (
            Scores(query[:1], key[:1]),
            Scores(query[:, :, :1], key),
            Scores(query, key[:, :, :1]),
            Scores(query, key[..., :2]),
            Scores(query.int(), key),
        ):
            with pytest.raises(ObjectiveError, match=r"teacher\.(query|key) must be"):
                loss(good, bad, masks)
        for wrong in (Masks(torch.ones(2, 1, dtype=torch.bool)), Masks(None, torch.ones(2, 5))):
            with pytest.raises(ObjectiveError, match="(query|key)_mask must be"):
                loss(good, good, wrong)
