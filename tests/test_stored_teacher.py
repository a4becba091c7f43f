"""Stored targets: the same training as with the teacher, and never targets of something else."""

import copy
import dataclasses
import fcntl
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ConvBertConfig,
    ConvBertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

import tiny
from ildistil import Distillation, Distiller, Stage, mappings, objectives
from ildistil.capture import Tap
from ildistil.errors import ObjectiveError, TargetsError, WriteError
from ildistil.objectives import Objective
from ildistil.stages import Step
from ildistil.teachers import Estimate, StoredTeacher, estimate, precompute
from ildistil.teachers.rows import Rows
from ildistil.teachers.shard import _Hashed
from ildistil.teachers.store import Store
from ildistil.training import describe
from table import CASES
from test_distiller import loader, trainer

LENGTHS = (7, 4, 6, 2)
TRIALS = 4  # runs that tell of a model what only runs tell


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return tiny.bert(2, seed=1), tiny.bert(4, seed=2)


def stored(folder: Path, terms: Iterable[Objective], batches: Any = None, **options: Any) -> StoredTeacher:
    """The targets of these terms, without the teacher."""
    student, teacher = models()
    made = StoredTeacher(folder, teacher, **options)
    precompute(made, terms, student, [tiny.batch(LENGTHS)] if batches is None else batches)
    return StoredTeacher(folder)


def step(
    terms: list[Objective], teacher: nn.Module, batch: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms and the gradients by parameter name, always from the same student and projections."""
    torch.manual_seed(3)
    engine = Distillation(models()[0], teacher, terms)
    found = engine(batch, Step(0))
    found.total.backward()
    gradients = {n: p.grad for n, p in engine.named_parameters() if p.grad is not None}
    return {n: v.detach() for n, v in found.values.items()}, gradients


def assert_same(left: Any, right: Any, tolerance: float) -> None:
    for mine, theirs in zip(left, right, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def values(teacher: StoredTeacher, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is stored of a batch."""
    header = teacher.store.header
    assert header is not None
    keys = Rows.of(batch, teacher.facts.read).keys
    return teacher.store.read(teacher.store.find(keys), header.layout.columns)


def masked_language_model(seed: int, **config: Any) -> PreTrainedModel:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(seed)
    return BertForMaskedLM(BertConfig(**small, vocab_size=tiny.VOCABULARY, initializer_range=0.3, **config))


def masked_text(seed: int = 0) -> dict[str, Tensor]:
    batch = {k: v for k, v in tiny.batch(seed=seed).items() if k in ("input_ids", "attention_mask")}
    return batch | {"labels": torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)}


def selected() -> list[Objective]:
    return [
        objectives.AttentionKL(),
        objectives.HiddenMSE(projection="always", mapping=mappings.Random()),
        objectives.LogitsKL(weight=0.5),
        objectives.TaskLoss(weight=0.5),
    ]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> StoredTeacher:
    return stored(tmp_path_factory.mktemp("targets"), [case.make() for case in CASES.values()], dtype="float32")


@pytest.mark.parametrize("name", [n for n in CASES if n != "TaskLoss"])
def test_the_same_losses_and_gradients_as_with_the_teacher(name: str, everything: StoredTeacher) -> None:
    batch = tiny.batch(LENGTHS)
    assert_same(step([CASES[name].make()], everything, batch), step([CASES[name].make()], models()[1], batch), 1e-6)


@pytest.mark.parametrize("name", ["AttentionKL", "AttentionMSE", "AttentionDIST", "RelationKL-heads", "QKVMSE"])
def test_no_more_is_read_than_an_objective_says(name: str, tmp_path: Path) -> None:
    """What isn't among the vectors it reads isn't stored, and would make its loss not a number."""
    batch, term = tiny.batch(LENGTHS), CASES[name].make()
    teacher = stored(tmp_path, [term], dtype="float32")
    header = teacher.store.header
    assert header is not None
    assert "".join(sorted({column.part for column in header.layout.columns})) == "".join(sorted(term.vectors))
    assert_same(step([CASES[name].make()], teacher, batch), step([CASES[name].make()], models()[1], batch), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_half_precision_is_close(dtype: Any, tolerance: float, tmp_path: Path) -> None:
    batch, teacher = tiny.batch(LENGTHS), stored(tmp_path, selected(), dtype=dtype)
    live, half = step(selected(), models()[1], batch), step(selected(), teacher, batch)
    assert_same(live[:1], half[:1], tolerance)
    norms = [torch.stack([g.norm() for g in of.values()]) for of in (live[1], half[1])]
    torch.testing.assert_close(norms[0], norms[1], rtol=10 * tolerance, atol=10 * tolerance)


def test_order_and_padding_do_not_matter(tmp_path: Path) -> None:
    teacher = stored(tmp_path, selected(), dtype="float32")
    wide = tiny.batch(LENGTHS, right=5)
    shuffled = {k: v[[2, 0, 3]] for k, v in wide.items()}
    assert_same(step(selected(), teacher, shuffled), step(selected(), models()[1], shuffled), 1e-6)
    left = tiny.batch(LENGTHS, left=3)  # with its position_ids, so that only the head knows of the padding
    terms = [objectives.HiddenMSE(), objectives.AttentionKL()]
    inner = stored(tmp_path / "inner", terms, dtype="float32")
    assert_same(step(terms, inner, left), step(terms, models()[1], left), 1e-6)
    with pytest.raises(TargetsError, match="padded on the left.*Pad on the right"):
        step(selected(), teacher, left)
    del left["position_ids"]
    with pytest.raises(TargetsError, match="padded on the left"):
        step(terms, inner, left)
    wide["attention_mask"][0, 2] = 0
    with pytest.raises(TargetsError, match="hides tokens between real ones"):
        step(selected(), teacher, wide)


def test_left_padding_of_rotated_positions_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = ModernBertConfig(**small, vocab_size=tiny.VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                              cls_token_id=1, sep_token_id=2)  # fmt: skip
    teacher = ModernBertForSequenceClassification(config)  # its head reads the first position
    right, left = (
        {k: tiny.batch(**{side: 2})[k] for k in ("input_ids", "attention_mask")} for side in ("right", "left")
    )
    for term in (objectives.LogitsKL(), objectives.HiddenMSE()):
        empty = StoredTeacher(tmp_path / term.name, teacher)
        precompute(empty, [term], teacher, [right])
        with pytest.raises(TargetsError, match="padded on the left"):
            precompute(empty, [term], teacher, [left])


def test_teachers_that_read_their_padding_are_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = ConvBertConfig(
        **small, vocab_size=tiny.VOCABULARY, embedding_size=16, conv_kernel_size=3, initializer_range=0.3
    )
    convolving = ConvBertForSequenceClassification(config)
    mixing = FNetForSequenceClassification(FNetConfig(**small, vocab_size=tiny.VOCABULARY))
    ids = {k: tiny.batch()[k] for k in ("input_ids", "attention_mask")}
    for number, teacher in enumerate((convolving, mixing)):
        folder = tmp_path / str(number)
        with pytest.raises(TargetsError, match=r"makes of a row depends on its padding: hidden\[1\]"):
            precompute(StoredTeacher(folder, teacher), [objectives.HiddenMSE()], teacher, [ids])
        assert not list(tmp_path.glob(f"{number}/*"))
        bare = {"input_ids": ids["input_ids"].clamp(min=3)}
        precompute(StoredTeacher(folder, teacher), [objectives.HiddenMSE()], teacher, [bare])


def test_a_teacher_whose_positions_are_all_taken_is_tried_too(tmp_path: Path) -> None:
    teacher = tiny.bert(4, seed=2, max_position_embeddings=7)
    batch = tiny.batch((7, 4, 1))
    precompute(StoredTeacher(tmp_path, teacher.bfloat16()), selected(), models()[0], [batch])


def test_rows_without_tokens_need_no_targets(tmp_path: Path) -> None:
    teacher, batch = stored(tmp_path, selected(), dtype="float32"), tiny.batch(LENGTHS)
    batch["attention_mask"][1], batch["input_ids"][1] = 0, 49
    assert_same(step(selected(), teacher, batch), step(selected(), models()[1], batch), 1e-6)


def test_rows_of_the_same_bytes_and_another_shape_are_others() -> None:
    pixels = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    wide, high = ({"pixel_values": p} for p in (pixels, pixels.view(2, 3, 6, 4)))
    assert not set(Rows.of(wide, ()).keys) & set(Rows.of(high, ()).keys)
    tokens = {"inputs_embeds": torch.ones(1, 4, 6), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    fewer = {"inputs_embeds": torch.ones(1, 3, 4), "attention_mask": torch.ones(1, 3)}  # both have twelve real numbers
    assert Rows.of(tokens, ()).keys != Rows.of(fewer, ()).keys


def test_what_is_not_stored_is_an_error(tmp_path: Path) -> None:
    teacher, batch = stored(tmp_path, selected()), tiny.batch(LENGTHS)
    changed = {k: v.clone() for k, v in batch.items()}
    changed["input_ids"][2, 1] += 1
    with pytest.raises(TargetsError, match=r"1 of the 4 rows of a batch \(the first has the row_id 2\) aren't among"):
        step(selected(), teacher, changed)
    shorter = {k: v[:, :6] if v.ndim == 2 else v for k, v in batch.items()}
    with pytest.raises(TargetsError, match=r"the first has the row_id 0.*cut or tokenised otherwise"):
        step(selected(), teacher, shorter)
    del batch["position_ids"]
    with pytest.raises(TargetsError, match="from input_ids, position_ids; this batch gives the teacher input_ids"):
        step(selected(), teacher, batch)
    with pytest.raises(TargetsError, match=r"have no attention\[2\]\.v, attention\[4\]\.v, which the objectives want"):
        step([objectives.AttentionOutputMSE()], teacher, batch)
    with pytest.raises(TargetsError, match="first dimension is the batch"):
        step(selected(), teacher, tiny.batch(LENGTHS) | {"head_mask": [1], "inputs_embeds": [1.0]})


def test_targets_of_something_else_are_refused(tmp_path: Path) -> None:
    stored(tmp_path, selected(), tokenizer="one")
    other = models()[1]
    next(other.parameters()).data[0, 0] += 1
    with pytest.raises(TargetsError, match="targets are of another teacher"):
        StoredTeacher(tmp_path, other)
    with pytest.raises(TargetsError, match="targets are of another teacher"):
        StoredTeacher(tmp_path, lambda: other).load()
    with pytest.raises(TargetsError, match="made with another tokenizer"):
        StoredTeacher(tmp_path).check_tokenizer("two")
    with pytest.raises(TargetsError, match="are in float16, not in float32"):
        StoredTeacher(tmp_path, dtype="float32")
    with pytest.raises(TargetsError, match="There are no targets in nowhere. Make them first: ildistil precompute"):
        StoredTeacher("nowhere")
    with pytest.raises(TargetsError, match="one of float16, bfloat16, float32; got 'int8'"):
        StoredTeacher("nowhere", models()[1], dtype="int8")  # type: ignore[arg-type]
    reordered = models()[0]
    reordered.config.id2label = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}
    with pytest.raises(ValueError, match="numbers its labels"):
        Distillation(reordered, StoredTeacher(tmp_path))


def test_a_folder_that_another_run_began_meanwhile_is_looked_at(tmp_path: Path) -> None:
    terms, batch = [objectives.HiddenMSE()], tiny.batch(LENGTHS)
    student, teacher = models()
    other, narrow, same = (StoredTeacher(tmp_path, m, dtype=d) for m, d in
                           ((tiny.bert(4, seed=5), None), (teacher, "bfloat16"), (teacher, None)))  # fmt: skip
    precompute(StoredTeacher(tmp_path, teacher), terms, student, [batch])
    for _ in range(2):  # what was refused once isn't taken the second time
        with pytest.raises(TargetsError, match="targets are of another teacher"):
            other.store.refresh()
        with pytest.raises(TargetsError, match="are in float16, not in bfloat16"):
            narrow.open([Tap("hidden", 2)])
    header = same.store.header
    same.store.refresh()
    assert (header, len(same.store)) == (None, 4)
    made = same.store.header
    assert made is not None
    empty = StoredTeacher(tmp_path / "other", teacher)
    with pytest.raises(TargetsError, match="No targets are stored in .*other yet. Make them before the training"):
        Distillation(student, empty, [objectives.AttentionKL()])
    precompute(StoredTeacher(tmp_path / "other", teacher), terms, student, [batch])
    with pytest.raises(TargetsError, match=r"have no attention\[2\]\.k, .* which the objectives want"):
        Distillation(student, empty, [objectives.AttentionKL()])
    late = Store(tmp_path / "late")
    Store(tmp_path / "late").create(made)
    for _ in range(2):
        with pytest.raises(TargetsError, match="has just begun to write other targets"):
            late.create(dataclasses.replace(made, tokenizer="another"))


def test_shards_of_another_folder_are_refused(tmp_path: Path) -> None:
    terms, (student, teacher) = [objectives.HiddenMSE()], models()
    stored(tmp_path / "a", terms)
    for name, model, dtype, error in (
        ("b", tiny.bert(4, seed=5), "float16", r"written for another targets\.json"),
        ("c", teacher, "bfloat16", r"it is in torch\.float16, the description says bfloat16"),
    ):
        precompute(StoredTeacher(tmp_path / name, model, dtype=dtype), terms, student, batches(1))
        (shard,) = (tmp_path / "a").glob("shard-*")
        shutil.copy(shard, tmp_path / name)
        with pytest.raises(TargetsError, match=error):
            StoredTeacher(tmp_path / name)


def test_the_same_weights_with_another_config_are_refused(tmp_path: Path) -> None:
    stored(tmp_path, [objectives.HiddenMSE()])
    twin = tiny.bert(4, seed=2, hidden_dropout_prob=0.5, classifier_dropout=0.1, id2label={0: "a", 1: "b", 2: "c"})
    StoredTeacher(tmp_path, twin)
    twin.config.hidden_act, twin.config.layer_norm_eps = "relu", 1e-3
    for make in (lambda: StoredTeacher(tmp_path, twin), lambda: StoredTeacher(tmp_path, lambda: twin).load()):
        with pytest.raises(
            TargetsError, match="config: hidden_act is 'relu' and was 'gelu', layer_norm_eps is 0.001 and"
        ):
            make()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    stored(tmp_path, selected())
    (shard,) = tmp_path.glob("shard-*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(TargetsError, match=rf"The targets in {shard} can't be read: .* Delete this file"):
        StoredTeacher(tmp_path)
    shard.write_bytes(content)
    description = tmp_path / "targets.json"
    said = json.loads(description.read_text())
    description.write_text(json.dumps(said | {"format": 0}))
    with pytest.raises(TargetsError, match="in format 0; this version of ildistil reads format 4"):
        StoredTeacher(tmp_path)
    description.write_text("{")
    with pytest.raises(TargetsError, match="damaged"):
        StoredTeacher(tmp_path)
    description.unlink()
    with pytest.raises(TargetsError, match="has shards but no targets.json"):
        StoredTeacher(tmp_path, models()[1])


def test_numbers_too_large_for_half_precision(tmp_path: Path) -> None:
    student, teacher = models()
    teacher.classifier.bias.data[1] = 1e5
    with pytest.raises(TargetsError, match="logits of the teacher is as large as 1e.05, and float16 ends at 65504"):
        precompute(StoredTeacher(tmp_path, teacher), [objectives.LogitsMSE()], student, [tiny.batch()])
    precompute(StoredTeacher(tmp_path, teacher, dtype="bfloat16"), [objectives.LogitsMSE()], student, [tiny.batch()])
    teacher.classifier.bias.data[1] = 3.4e38
    with pytest.raises(TargetsError, match=r"as large as 3.4e.38, and bfloat16 ends at 3.3895e.38. Store float32"):
        precompute(
            StoredTeacher(tmp_path / "b", teacher, dtype="bfloat16"), [objectives.LogitsMSE()], student, batches()
        )
    double = teacher.double()
    double.classifier.bias.data[1] = 1e39
    with pytest.raises(TargetsError, match=r"and float32 ends at 3.4028e.38. Run the teacher in each step"):
        precompute(StoredTeacher(tmp_path / "c", double, dtype="float32"), [objectives.LogitsMSE()], student, batches())


def batches(count: int = 6) -> list[dict[str, Tensor]]:
    return [tiny.batch((5, 3), seed=seed) for seed in range(count)]


class Interrupted(nn.Module):
    """A teacher whose machine goes away."""

    def __init__(self, model: nn.Module, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self._orig_mod, self.after, self.error = model, after, error  # wrapped as torch.compile does it

    def forward(self, **inputs: Any) -> Any:
        self.after -= 1
        if self.after < 0:
            raise self.error
        return self._orig_mod(**inputs)


def test_an_interrupted_precompute_goes_on(tmp_path: Path) -> None:
    student, teacher = models()
    terms, seen = [objectives.HiddenMSE()], []
    with pytest.raises(KeyboardInterrupt):
        precompute(StoredTeacher(tmp_path, Interrupted(teacher, 2 + 6)), terms, student, batches())
    assert (
        len(StoredTeacher(tmp_path).store) == 6
    )  # three batches: one run was for the estimate, two to see that padding isn't read
    found = precompute(StoredTeacher(tmp_path, teacher), terms, student, batches(), report=seen.append)
    assert (found.rows, found.missing_rows) == (12, 6)
    assert "rows    12 different ones, of which 6 are stored" in seen[0]
    assert len(list(tmp_path.glob("shard-*"))) == 2
    whole = stored(tmp_path / "whole", terms, batches())
    for batch in batches():
        mine, theirs = (step(terms, t, batch) for t in (StoredTeacher(tmp_path), whole))
        assert_same(mine, theirs, 0)
    again = precompute(StoredTeacher(tmp_path, Interrupted(teacher, 0)), terms, student, batches())
    assert again.missing_bytes == 0
    with pytest.raises(TargetsError, match="gone through twice"):
        precompute(StoredTeacher(tmp_path, teacher), terms, student, iter(batches()))


def test_the_estimate_is_what_gets_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms, data = [objectives.RelationKL(relations=["k-k"]), objectives.HiddenMSE(), objectives.LogitsKL()], batches(40)
    student, teacher = models()
    empty = StoredTeacher(tmp_path, teacher)
    needed = estimate(empty, terms, student, [*data, *data])
    assert not list(tmp_path.iterdir())
    per_token, per_row = (
        2 * (32 + 2 * 32),
        2 * 3 + 24 + 4 * 8,
    )  # keys, two states; logits, key, place, checks
    assert needed.bytes == 40 * 8 * per_token + 80 * per_row
    precompute(empty, terms, student, data)
    written = sum(shard.stat().st_size for shard in tmp_path.glob("shard-*"))
    assert written == pytest.approx(needed.bytes, rel=0.02)
    assert f"needed  {needed.bytes / 1e6:.2f} MB, of which 0.00 MB" in str(estimate(empty, terms, student, data))
    full = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(TargetsError, match=r"need 0.07 MB more, and 0.00 MB are free on the disk.*map fewer layers"):
        precompute(StoredTeacher(tmp_path / "b", teacher), terms, student, data)
    monkeypatch.setattr(Estimate, "check_space", lambda self: None)  # it was filled since
    with pytest.raises(TargetsError, match=r"The disk of .* is full: 0 MB are free"):
        precompute(StoredTeacher(tmp_path / "c", teacher), terms, student, data)


def test_the_estimate_of_batches_of_other_widths_without_a_mask(tmp_path: Path) -> None:
    student, teacher = models()
    data = [{"input_ids": torch.randint(3, 50, (2, width))} for width in (3, 12, 30)]
    assert precompute(StoredTeacher(tmp_path, teacher), [objectives.HiddenMSE()], student, data).tokens == 2 * 45
    assert estimate(StoredTeacher(tmp_path), [objectives.HiddenMSE()], student, data).tokens == 2 * 45


def test_small_shards_and_many_rows(tmp_path: Path) -> None:
    teacher = stored(tmp_path, [objectives.HiddenMSE()], batches(), shard_bytes=1000)
    assert len(list(tmp_path.glob("shard-*"))) > 3
    both = {k: torch.cat([b[k] for b in batches()]) for k in batches()[0]}
    assert_same(
        step([objectives.HiddenMSE()], teacher, both)[:1], step([objectives.HiddenMSE()], models()[1], both)[:1], 1e-3
    )
    copied = copy.deepcopy(teacher)  # opens the files itself
    assert len(copied.store) == len(teacher.store) == 12


class Kinds(Objective):
    """Reads a module for each token, one for each row, and the logits."""

    taps = ("logits", "bert.pooler", "bert.encoder.layer.0.output")

    def loss(self, student: Any, teacher: Any, batch: Any) -> Tensor:
        s, t = ([a.logits, *(a.modules[p] for p in self.taps[1:])] for a in (student, teacher))
        real = batch["attention_mask"][..., None]
        return sum(((x - y) * (real if x.ndim == 3 else 1)).square().mean() for x, y in zip(s, t, strict=True))


def test_module_paths(tmp_path: Path) -> None:
    terms, batch = [Kinds()], tiny.batch((32, 30))  # as many tokens as the pooler is wide
    teacher = stored(tmp_path, terms, [batch], dtype="float32")
    assert_same(step([Kinds()], teacher, batch), step([Kinds()], models()[1], batch), 1e-6)

    class Tuples(Kinds):
        taps = ("bert.encoder.layer.0.attention",)

    with pytest.raises(TargetsError, match="attention of the teacher gives a tuple; only tensors of shape"):
        stored(tmp_path / "tuples", [Tuples()], [batch])

    class Loss(Kinds):
        taps = ("loss",)

    with pytest.raises(TargetsError, match="one number for a whole batch and can't be stored"):
        stored(tmp_path / "loss", [Loss()], [batch])


class Liar(objectives.AttentionOutputMSE):
    vectors = "qk"


def test_who_reads_more_than_is_stored_has_no_loss(tmp_path: Path) -> None:
    teacher = stored(tmp_path, [Liar()])
    engine = Distillation(models()[0], teacher, [Liar()])
    with pytest.raises(ObjectiveError, match="is nan in the dry run"):
        engine.dry_run(tiny.batch(LENGTHS))


def test_language_models_and_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    text = {"input_ids": torch.randint(3, 50, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    text["attention_mask"][1, 4:] = 0
    labels = torch.where(text["attention_mask"] == 1, text["input_ids"], -100)
    gemma = Gemma2Config(**small, vocab_size=50, num_hidden_layers=2, num_key_value_heads=1, head_dim=8,
                         attn_logit_softcapping=5.0, attn_implementation="eager")  # fmt: skip
    image = ViTConfig(**small, num_hidden_layers=2, image_size=8, patch_size=4)
    masked = BertConfig(**small, num_hidden_layers=2, vocab_size=50)
    pixels = {"pixel_values": torch.randn(3, 3, 8, 8), "labels": torch.tensor([0, 1, 1])}
    terms = (objectives.AttentionKL, objectives.HiddenMSE, objectives.LogitsKL, objectives.RelationKL)
    for number, (kind, config, batch) in enumerate(
        [
            (Gemma2ForCausalLM, gemma, text | {"labels": labels}),
            (BertForMaskedLM, masked, text | {"labels": labels}),
            (ViTForImageClassification, image, pixels),
        ]
    ):
        teacher, student = kind(copy.deepcopy(config)), kind(copy.deepcopy(config))
        folder = tmp_path / str(number)
        precompute(StoredTeacher(folder, teacher, dtype="float32"), [t() for t in terms], student, [batch])
        live, read = (
            Distillation(copy.deepcopy(student), t, [t() for t in terms]) for t in (teacher, StoredTeacher(folder))
        )
        read.dry_run(read.synthetic_batch())
        turned = {k: v.flip(0) for k, v in batch.items()}
        torch.testing.assert_close(read.eval()(turned).total, live.eval()(turned).total, rtol=1e-5, atol=1e-6)
        if batch["labels"].ndim == 2:
            with pytest.raises(TargetsError, match="labels of padding aren't -100"):
                read(batch | {"labels": text["input_ids"]})


def test_models_whose_attention_cannot_be_stored(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    deberta = DebertaV2Config(
        **small, vocab_size=50, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False
    )
    teacher = DebertaV2ForSequenceClassification(deberta)
    batch = {k: v for k, v in tiny.batch().items() if k != "position_ids"}
    with pytest.raises(TargetsError, match=r"adds a bias to the scores of attention\[1\]"):
        precompute(StoredTeacher(tmp_path / "a", teacher), [objectives.AttentionKL()], teacher, [batch])
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartModel(BartConfig(d_model=8, encoder_layers=1, decoder_layers=1, vocab_size=20, **heads))
    with pytest.raises(TargetsError, match="encoder-decoder .* can't be stored"):
        StoredTeacher(tmp_path / "b", bart)


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["labels"]))]


class Watch(L.Callback):
    """Notes how often a model ran, and the losses."""

    def __init__(self, model: nn.Module) -> None:
        self.runs, self.losses = 0, []
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.runs += 1

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # type: ignore[override]
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(teacher: nn.Module, watch: Watch, data: Any, **options: Any) -> Distiller:
    torch.manual_seed(4)
    module = Distiller(models()[0], teacher, **{k: v for k, v in options.items() if k == "stages"})
    run = trainer(watch, *selected(), **{k: v for k, v in options.items() if k != "stages"})
    run.fit(module, data, loader())
    return module


def test_fit_stores_what_is_missing_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = loader(rows=16)
    live, teacher = Watch(models()[1]), models()[1]
    fit(models()[1], live, data, max_epochs=3)
    watch = Watch(teacher)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        module = fit(StoredTeacher(tmp_path, teacher, dtype="float32"), watch, data, max_epochs=3)
    assert watch.runs == 1 + 2 + 4 + TRIALS  # for the layout, does it read padding, and every row once in four batches
    assert watch.losses == pytest.approx(live.losses, rel=1e-5)
    assert "rows    16 different ones, of which 0 are stored" in caplog.text
    assert f"stored: 16 rows in {tmp_path}" in caplog.text
    assert len(module.teacher.store) == 16
    for again in (StoredTeacher(tmp_path), StoredTeacher(tmp_path, lambda: teacher)):
        watch = Watch(teacher)
        fit(again, watch, data, max_epochs=3)
        assert watch.runs == 0
        assert watch.losses == pytest.approx(live.losses, rel=1e-5)


def test_fit_adds_rows_that_are_new(tmp_path: Path) -> None:
    data = DataLoader(rows_of(tiny.batch((5,) * 10)), 4, shuffle=True, drop_last=True)
    fit(StoredTeacher(tmp_path, models()[1]), Watch(nn.Identity()), data, max_epochs=1)
    assert len(StoredTeacher(tmp_path).store) == 10  # those that an epoch leaves out too
    more = DataLoader(rows_of(tiny.batch((5,) * 4, seed=9)), 2)
    fit(StoredTeacher(tmp_path, models()[1]), Watch(nn.Identity()), more, max_epochs=1)
    assert len(StoredTeacher(tmp_path).store) == 14


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_of_the_run_does_not_change_the_targets(precision: str, tmp_path: Path) -> None:
    data, teacher = loader(rows=4), models()[1]
    read, watch = stored(tmp_path / "before", selected(), list(data)), Watch(teacher)
    fit(StoredTeacher(tmp_path / "along", teacher, shard_bytes=1), watch, data, precision=precision)
    again = Watch(nn.Identity())
    fit(read, again, data, precision=precision)
    assert watch.losses == again.losses
    assert next(teacher.parameters()).dtype == torch.float32


def test_a_language_models_logits_are_not_made_in_the_precision_of_the_run(tmp_path: Path) -> None:
    """Its run stops before the output layer, which is asked later."""
    data = [masked_text(seed) for seed in (0, 1)]
    teacher, student = (masked_language_model(seed) for seed in (1, 2))
    precompute(StoredTeacher(tmp_path / "before", teacher, dtype="float32"), [objectives.LogitsKL()], student, data)
    along = StoredTeacher(tmp_path / "along", teacher, dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        precompute(along, [objectives.LogitsKL()], student, data)
    for batch in data:
        before, after = (values(StoredTeacher(tmp_path / name), batch)["logits"] for name in ("before", "along"))
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_a_run_that_breaks_off_leaves_what_it_made(tmp_path: Path) -> None:
    teacher = models()[1]
    with pytest.raises(MemoryError):
        fit(StoredTeacher(tmp_path, Interrupted(teacher, 2 + 6, MemoryError)), Watch(teacher), loader(rows=16))
    assert len(StoredTeacher(tmp_path).store) == 12  # three batches, after three runs to see what there is to store


def test_rows_that_are_other_ones_in_each_epoch_are_refused(tmp_path: Path) -> None:
    class New(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {k: v[0] for k, v in tiny.batch((5,), seed=int(torch.randint(10**6, ()))).items()}

    with pytest.raises(TargetsError, match="Batches that are other ones in each epoch .* can't be stored"):
        fit(StoredTeacher(tmp_path, models()[1]), Watch(nn.Identity()), DataLoader(New(), 2))


def test_what_a_sampler_leaves_out_need_not_be_stored(tmp_path: Path) -> None:
    rows = rows_of(tiny.batch((5,) * 10))
    data = DataLoader(rows, 2, sampler=SubsetRandomSampler([8, 9, 7, 6]))
    teacher = stored(tmp_path, selected(), data)
    watch = Watch(nn.Identity())
    fit(teacher, watch, data, max_epochs=1)
    assert len(watch.losses) == 2
    with pytest.raises(TargetsError, match="aren't among the 4"):
        fit(teacher, Watch(nn.Identity()), DataLoader(rows, 2), max_epochs=1)


class Fussy(BertForSequenceClassification):
    """Refuses the synthetic batch, which has no position_ids."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None) -> Any:
        if position_ids is None:
            raise IndexError("no position_ids")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


def test_a_teacher_that_refuses_the_synthetic_batch(tmp_path: Path) -> None:
    teacher = models()[1]
    teacher.__class__ = Fussy
    torch.manual_seed(4)
    module = Distiller(models()[0], StoredTeacher(tmp_path, teacher))
    trainer(objectives.HiddenMSE(), max_epochs=1).fit(module, loader(rows=4))
    assert len(StoredTeacher(tmp_path).store) == 4


def test_inputs_that_the_trainer_rounds_are_told_of(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 2}
    teacher = ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4))
    batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    precompute(StoredTeacher(tmp_path, teacher), [objectives.LogitsKL()], teacher, [batch])
    engine = Distillation(copy.deepcopy(teacher).bfloat16(), StoredTeacher(tmp_path), [objectives.LogitsKL()])
    with pytest.raises(TargetsError, match=r"pixel_values is in torch\.bfloat16 here: precision='bf16-true'"):
        engine({"pixel_values": batch["pixel_values"].bfloat16()})


def test_the_plan_says_no_more_of_a_stored_teacher_than_is_so(tmp_path: Path) -> None:
    told = describe(Distillation(models()[0], stored(tmp_path, terms := [objectives.AttentionKL()]), terms))
    assert "teacher: attention 2 4\n" in told + "\n"
    assert "student: attention 1 2; it runs no further than layer 2" in told


def test_drafts_that_a_killed_run_left_are_deleted(tmp_path: Path) -> None:
    left, locked = tmp_path / ".shard-a.safetensors.draft-1", tmp_path / ".shard-b.safetensors.draft-2"
    left.touch()
    with locked.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # another process is writing it
        stored(tmp_path, selected())
        assert (left.exists(), locked.exists()) == (False, True)


def test_every_flip_in_targets_is_noticed(tmp_path: Path) -> None:
    """Whatever is damaged is noticed when the folder is opened or its rows are read, and nothing else is raised."""
    data, draw = batches(3), random.Random(0)
    stored(tmp_path, [objectives.AttentionKL(), objectives.LogitsKL()], data)
    description = tmp_path / "targets.json"
    (shard,) = tmp_path.glob("shard-*")
    for path in (shard, description):
        whole = path.read_bytes()
        for place in draw.sample(range(len(whole)), 100):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(TargetsError, match=r"targets\.json|shard-\w+\.safetensors.*Delete this file|in format"):
                read_all(tmp_path, data)
        path.write_bytes(whole)
    read_all(tmp_path, data)


def read_all(folder: Path, data: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    teacher = StoredTeacher(folder)
    return [values(teacher, batch) for batch in data]


def test_zeroed_blocks_and_swapped_rows_of_targets_are_noticed(tmp_path: Path) -> None:
    data = batches(3)
    stored(tmp_path, [objectives.AttentionKL(), objectives.HiddenMSE()], data)
    (shard,) = tmp_path.glob("shard-*")
    with safe_open(shard, framework="pt") as file:
        whole = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        said = file.metadata()

    def refuses(**changed: Tensor) -> None:
        save_file(whole | changed, shard, said)
        with pytest.raises(TargetsError, match=r"shard-\w+\.safetensors can't be read: .*Delete this file"):
            read_all(tmp_path, data)

    def swapped(tensor: Tensor, first: int = 0, second: int = 1) -> Tensor:
        return tensor.index_copy(0, torch.tensor([first, second]), tensor[[second, first]])

    names = [name for name in whole if not name.startswith("row.")]
    starts = whole["row.starts"]
    assert starts[1] == 5  # the rows have five and three tokens, in turn
    for name in names:
        refuses(**{name: torch.zeros_like(whole[name])})
        refuses(**{name: swapped(whole[name])})  # two tokens of a row
        refuses(**{name: torch.cat([whole[name][8:16], whole[name][:8], whole[name][16:]])})  # the rows of two batches
    refuses(**{"row.keys": swapped(whole["row.keys"])})
    refuses(**{"row.keys": swapped(whole["row.keys"], 0, 2), "row.checks": swapped(whole["row.checks"], 0, 2)})
    refuses(**{"row.starts": starts.index_fill(0, torch.tensor([1]), 4)})
    refuses(**{names[0]: whole[names[1]], names[1]: whole[names[0]]})
    save_file(whole, shard, said)
    read_all(tmp_path, data)


def test_a_row_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, made = batches(2), []
    stored(tmp_path, selected(), data)
    original = _Hashed.__call__

    def counted(self: _Hashed, row: int, starts: Any) -> int:
        made.append(row)
        return original(self, row, starts)

    monkeypatch.setattr(_Hashed, "__call__", counted)
    teacher = StoredTeacher(tmp_path)
    assert made == []
    for _ in range(2):
        for batch in data:
            values(teacher, batch)
        header = teacher.store.header
        assert header is not None
        assert len(made) == 4 * len(header.layout.columns)


READ_ONLY = """
import os, sys, torch
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import test_stored_teacher as t
from ildistil import storage
os.setuid(65534)
folder = Path(sys.argv[1])
try:
    (folder / "a").touch()
except PermissionError:
    data = t.batches(2)
    storage.sweep(folder)
    t.precompute(t.StoredTeacher(folder, t.models()[1]), t.selected(), t.models()[0], data, report=str)
    t.read_all(folder, data)
    module = t.Distiller(t.models()[0], t.StoredTeacher(folder, t.models()[1]))
    t.step(t.selected(), t.StoredTeacher(folder), data[0])
    print("read")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes somebody whom a folder refuses")
def test_targets_in_a_folder_that_is_read_only(tmp_path: Path) -> None:
    stored(tmp_path / "targets", selected(), batches(2))
    (tmp_path / "targets" / ".shard-a.safetensors.draft-1").touch()
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    tests = Path(__file__).resolve().parent
    if not all(folder.stat().st_mode & 0o005 == 0o005 for folder in (*tests.parents, Path(torch.__file__).parent)):
        pytest.skip("another user can't read this checkout")
    paths = [str(tests), str(tests / "objectives"), str(tests.parent)]
    ran = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(tmp_path / "targets"), *paths], capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.stdout == "read\n", ran.stderr


def test_targets_are_read_before_a_batch_moves_and_only_what_a_stage_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = loader(rows=8), []
    teacher = stored(tmp_path, selected(), list(data))
    original = StoredTeacher._read

    def reading(self: StoredTeacher, batch: Any, taps: Iterable[Tap]) -> Any:
        found = original(self, batch, taps)
        read.append({column.split("[")[0] for column in found.values})
        return found

    monkeypatch.setattr(StoredTeacher, "_read", reading)
    stages = [Stage(["attention_kl", "hidden_mse"], 1), Stage(["logits_kl", "task_loss"], 1)]
    fit(teacher, Watch(nn.Identity()), data, stages=stages, max_epochs=2)
    assert read == [{"attention", "hidden", "logits"}, *2 * [{"attention", "hidden"}], *2 * [{"logits"}]]


def test_accumulated_batches_and_validation_without_targets(tmp_path: Path) -> None:
    data = loader(rows=16)
    teacher = stored(tmp_path, selected(), list(data), dtype="float32")
    live, read = Watch(nn.Identity()), Watch(nn.Identity())
    fit(models()[1], live, data, accumulate_grad_batches=2)
    fit(teacher, read, data, accumulate_grad_batches=2)
    assert read.losses == pytest.approx(live.losses, rel=1e-5)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("a")
    with pytest.raises(TargetsError, match=r"holds no targets but other files, such as train.tsv. Name a folder"):
        StoredTeacher(tmp_path, tiny.bert(4))
    assert [x.name for x in tmp_path.iterdir()] == ["train.tsv"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(
        WriteError,
        match=r"full/shard-\w+\.safetensors can't be written \(.*No space left on device\). Free some space, or",
    ):
        stored(tmp_path / "full", [objectives.HiddenMSE()])
    assert not list((tmp_path / "full").glob("*shard*"))
