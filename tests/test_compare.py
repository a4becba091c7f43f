"""Comparisons of exported models, against loops, statsmodels, torchmetrics and models run by hand."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from statsmodels.stats import contingency_tables
from statsmodels.stats.proportion import proportion_confint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassCalibrationError
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast

import tiny
from ildistil import cli
from ildistil.data import Glue, TextData
from ildistil.errors import DataError, IldistilError
from ildistil.metrics import AveragePrecision, metric_collection
from ildistil.study import statistics
from ildistil.study.comparison import Report, as_markdown, as_text, compare_models, document
from ildistil.study.comparison.cost import joined, peak_memory, speeds
from ildistil.study.comparison.quality import Answers, calibration, flips, measured

LABELS = ["bad", "good", "mixed"]


def answers(rows: int = 400, classes: int = 3, seed: int = 0) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, classes, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(99))
    return Answers(logits + 2 * torch.nn.functional.one_hot(labels, classes), labels)


# Statistics.


@pytest.mark.parametrize("seed", range(3))
def test_mcnemar_is_that_of_statsmodels(seed: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = draw.random(60) < 0.8, draw.random(60) < 0.6
    table = [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
    found = statistics.mcnemar(first, second)
    assert found.p == pytest.approx(contingency_tables.mcnemar(table, exact=True).pvalue)
    assert [[found.both, found.only_first], [found.only_second, found.neither]] == table
    assert found.difference == pytest.approx(first.mean() - second.mean())


def test_mcnemar_says_what_cannot_be_reached() -> None:
    assert statistics.mcnemar([True, True], [True, True]).p == 1
    found = statistics.mcnemar([True] * 4 + [True] * 6, [False] * 4 + [True] * 6)
    assert found.p == pytest.approx(2 / 2**4)
    assert "0.05 cannot be reached" in found.describe()


def test_intervals_over_rows_are_those_of_a_loop() -> None:
    draw = np.random.default_rng(0)
    labels = draw.normal(size=80)
    models = np.stack([labels + draw.normal(size=80), labels + 2 * draw.normal(size=80)])
    found = statistics.over_rows(models, labels, statistics.pearson, draws=3000)
    one, two, share = [], [], []
    for _ in range(3000):
        rows = draw.integers(0, 80, 80)
        a, b = (np.corrcoef(model[rows], labels[rows])[0, 1] for model in models)
        one.append(a)
        two.append(b - a)
        share.append(b / a)
    kept = found.ratio(1, 0)
    assert kept is not None
    for estimate, drawn in ((found.of(0), one), (found.difference(1, 0), two), (kept, share)):
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert max(abs(estimate.low - low), abs(estimate.high - high)) < 0.08 * (high - low)
    assert kept.value == pytest.approx(found.of(1).value / found.of(0).value)


def test_no_share_is_kept_of_what_may_be_nothing() -> None:
    labels = np.arange(40) % 2
    noise = np.random.default_rng(0).integers(0, 2, 40)
    found = statistics.over_rows([noise, labels], labels, statistics.matthews, draws=200)
    assert found.ratio(1, 0) is None
    assert found.ratio(0, 1) is not None


def test_intervals_of_what_is_undefined_are_none() -> None:
    found = statistics.over_rows([np.ones(20)], np.arange(20), statistics.pearson, draws=100).of(0)
    assert math.isnan(found.value)
    assert math.isnan(found.low)


# Quality.


@pytest.mark.parametrize("name", ["accuracy", "f1", "macro_f1", "matthews", "average_precision"])
def test_metrics_are_those_of_the_task(name: str) -> None:
    models = [answers(120, 2, seed) for seed in range(2)]
    found = measured(models, lambda: metric_collection((name,), 2)[name], 0.95, 200)
    for number, model in enumerate(models):
        metric: Any = metric_collection((name,), 2)
        wanted = metric(model.predictions, model.labels, logits=model.logits)[name]
        assert found.of(number).value == pytest.approx(float(wanted), abs=1e-6)
        assert found.of(number).low < found.of(number).value < found.of(number).high


def test_a_metric_without_a_counted_form_is_resampled_from_its_logits() -> None:
    model, draw = answers(100, 2), np.random.default_rng(1)
    found = measured([model], lambda: AveragePrecision([1]), 0.95, 300).of(0)
    drawn = []
    for _ in range(300):
        rows = torch.from_numpy(draw.integers(0, 100, 100))
        drawn.append(float(AveragePrecision([1])(None, model.labels[rows], model.logits[rows])))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert max(abs(found.low - low), abs(found.high - high)) < 0.25 * (high - low)


@pytest.mark.parametrize("classes", [2, 5])
def test_the_calibration_error_is_that_of_a_loop_and_of_torchmetrics(classes: int) -> None:
    model = answers(500, classes)
    found, total = calibration(model, bins=15), 0.0
    for number in range(15):
        inside = [
            (float(p.max()), int(p.argmax()) == int(label))
            for p, label in zip(model.logits.double().softmax(-1), model.labels, strict=True)
            if number / 15 < float(p.max()) <= (number + 1) / 15
        ]
        if inside:
            total += abs(sum(c for c, _ in inside) - sum(r for _, r in inside))
    assert found.error == pytest.approx(total / 500)
    other = MulticlassCalibrationError(classes, n_bins=15, norm="l1")(model.logits.softmax(-1), model.labels)
    assert found.error == pytest.approx(float(other), abs=1e-5)
    assert sum(each.rows for each in found.bins) == 500


def test_flipped_rows_are_those_of_a_loop() -> None:
    teacher, student = answers(seed=0), answers(seed=1)
    ids = [3 * row for row in range(400)]
    texts = [(f"text {row}",) for row in range(1200)]
    lost, gained = flips(teacher, student, ids, LABELS, texts, 5)
    for (count, shown), right in ((lost, teacher), (gained, student)):
        wrong = student if right is teacher else teacher
        rows = [
            (-float(student.logits[row].double().softmax(-1).max()), row)
            for row in range(400)
            if int(right.logits[row].argmax()) == int(right.labels[row]) != int(wrong.logits[row].argmax())
        ]
        assert count == len(rows)
        assert [flip.row for flip in shown] == [3 * row for _, row in sorted(rows)[:5]]
        assert [flip.confidence for flip in shown] == pytest.approx([-sure for sure, _ in sorted(rows)[:5]])
        assert all(flip.texts == (f"text {flip.row}",) for flip in shown)


# Cost.


def test_models_are_timed_in_turns() -> None:
    calls: list[tuple[int, int]] = []
    runs: Sequence[Callable[[int], object]] = [lambda n, m=m: calls.append((m, n)) for m in range(3)]
    found = speeds(runs, 4, 0.0, torch.device("cpu"))
    timed = calls[9:]  # after three rounds of warm-up
    assert found[0].rounds == 20
    assert len(timed) == 60
    for number in range(20):
        turn = timed[3 * number : 3 * number + 3]
        assert [m for m, _ in turn] == [(number + k) % 3 for k in range(3)]
        assert {n for _, n in turn} == {number}
    assert found[0].faster == 1


def test_times_are_quantiles_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    durations = [0.001 * (1 + number % 10) for number in range(20)]

    def run(factor: float) -> Callable[[int], object]:
        return lambda n: clock.__setitem__(0, clock[0] + factor * durations[n])

    slow, fast = speeds([run(2.0), run(1.0)], 32, 0.0, torch.device("cpu"))
    assert (fast.p50, fast.p95) == pytest.approx(tuple(np.quantile(durations, [0.5, 0.95])))
    assert fast.rows_per_second == pytest.approx(32 * 20 / sum(durations))
    assert (slow.faster, fast.faster) == pytest.approx((1, 2))


def test_memory_is_that_of_weights_and_what_is_alive_at_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 2))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(input)
            return found

    weights = 4 * (10 * 1000 + 1000 + 1000 * 2 + 2)
    # The output of the first layer, and that of the ReLU.
    assert peak_memory(Model(), {"input": torch.zeros(8, 10)}) == weights + 2 * 4 * 8 * 1000


def test_joined_rows_give_what_single_rows_give() -> None:
    model = tiny.bert(2, labels=2).eval()
    batch = tiny.batch((7, 4, 6), labels=2)
    rows = [
        {name: batch[name][i : i + 1, :length] for name in ("input_ids", "attention_mask")}
        for i, length in enumerate((7, 4, 6))
    ]
    with torch.no_grad():
        together = model(**joined(rows, padding=0)).logits
        alone = torch.cat([model(**row).logits for row in rows])
    assert torch.allclose(together, alone, atol=1e-5)


# The whole.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a student, another one with its own tokenizer, and data."""
    root = tmp_path_factory.mktemp("compare")
    names = {"label2id": {"negative": 0, "positive": 1}, "id2label": {0: "negative", 1: "positive"}}
    for name, layers, seed in (("teacher", 3, 0), ("student", 1, 1), ("other", 1, 2)):
        model = tiny.bert(layers, labels=2, seed=seed, max_position_embeddings=128, **names)
        model.save_pretrained(root / name)
        (other_words() if name == "other" else tiny.tokenizer()).save_pretrained(root / name)
    tiny.save_data(root / "glue/sst2", rows=100)
    return root


def other_words() -> PreTrainedTokenizerFast:
    """A tokenizer with other ids for the same words."""
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *reversed(tiny.WORDS)])}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", model_max_length=128)


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ILDISTIL_CACHE", "cache")


def compared(*models: str, data: L.LightningDataModule | None = None, **options: Any) -> Report:
    options = {"seconds": 0, "accelerator": "cpu", "draws": 200} | options
    return compare_models(models, data or Glue("sst2", path="glue"), **options)


def by_hand(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels, one row at a time, with the model's own tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name)
    rows = [line.split("\t") for line in Path("glue/sst2/validation.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        said = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text, _ in rows]
    return np.array(said), np.array([int(label) for _, label in rows])


def test_each_model_reads_the_texts_with_its_own_tokenizer() -> None:
    report = compared("teacher", "student", "other")
    assert report.rows == 50
    for model in report.models:
        said, labels = by_hand(model.name)
        right = int((said == labels).sum())
        estimate = model.metrics["accuracy"]
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
            (right / 50, *proportion_confint(right, 50, method="wilson"))
        )
        for number, of_class in enumerate(model.classes):
            true, predicted = labels == number, said == number
            assert of_class.rows == true.sum()
            assert of_class.recall is not None
            assert of_class.recall.value == pytest.approx((said[true] == number).mean())
            assert (of_class.precision is None) == (not predicted.any())
            assert of_class.f1 == pytest.approx(2 * (true & predicted).sum() / (true.sum() + predicted.sum()))
    teacher = by_hand("teacher")[0]
    for each in report.against:
        assert isinstance(each.agreement, statistics.Proportion)
        assert each.agreement.share.value == pytest.approx((by_hand(each.student)[0] == teacher).mean())


def test_size_is_that_of_the_model_and_its_file() -> None:
    report = compared("teacher", "student", seconds=0.01)
    for model in report.models:
        loaded = AutoModel.from_pretrained(model.name)
        head = AutoModelForSequenceClassification.from_pretrained(model.name)
        assert model.cost.parameters == head.num_parameters() > loaded.num_parameters()
        assert model.cost.bytes_on_disk == Path(model.name, "model.safetensors").stat().st_size
        assert [speed.batch_size for speed in model.cost.speeds] == [1, 32]
    assert report.settings.threads == torch.get_num_threads()


def test_a_model_beside_itself_keeps_all(folder: Path) -> None:
    again = folder / "again"
    if not again.exists():
        again.symlink_to(folder / "teacher")
    (against,) = compared("teacher", "again").against
    assert against.kept is not None
    assert (against.kept.value, against.kept.low, against.kept.high) == (1, 1, 1)
    assert against.mcnemar is not None
    assert against.mcnemar.p == 1
    assert against.lost == against.gained == (0, ())


def test_a_teacher_alone() -> None:
    report = compared("teacher")
    assert report.students == report.against == ()
    assert "teacher: accuracy" in as_text(document(report))


def test_rows_that_were_trained_on_are_counted() -> None:
    trained = set(Path("glue/sst2/train.tsv").read_text().splitlines()[1:])
    texts = {line.split("\t")[0] for line in trained}
    rows = [line.split("\t")[0] for line in Path("glue/sst2/validation.tsv").read_text().splitlines()[1:]]
    assert compared("teacher").overlap == (sum(row in texts for row in rows), 100)
    Path("fresh.tsv").write_text("sentence\tlabel\nfilm film film\tnegative\nplot plot\tpositive\n")
    data = TextData("glue/sst2/train.tsv", "fresh.tsv", text_column="sentence", label_names=["negative", "positive"])
    report = compared("teacher", data=data)
    assert report.overlap == (0, 100)
    assert "Warning" not in as_text(document(report))


def test_a_regression(tmp_path: Path) -> None:
    for name, seed in (("teacher", 0), ("student", 1)):
        tiny.bert(1, labels=1, seed=seed, max_position_embeddings=128).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    rows = Path("glue/sst2/train.tsv").read_text().splitlines()[1:]
    lines = [f"{row.split(chr(9))[0]}\t{number / 7}" for number, row in enumerate(rows)]
    (tmp_path / "all.tsv").write_text("\n".join(["text\tlabel", *lines]))
    data = TextData(validation_file=str(tmp_path / "all.tsv"), regression=True)
    report = compared(str(tmp_path / "teacher"), str(tmp_path / "student"), data=data)
    assert list(report.teacher.metrics) == ["pearson", "spearman"]
    assert report.teacher.classes == ()
    assert report.teacher.calibration is report.majority is None
    (against,) = report.against
    assert against.mcnemar is None
    assert isinstance(against.agreement, statistics.Estimate)
    count, shown = against.lost
    off = [
        abs(float(flip.student) - float(flip.label)) - abs(float(flip.teacher) - float(flip.label)) for flip in shown
    ]
    assert off == pytest.approx(sorted(off, reverse=True), abs=0.2)  # as shown, with three digits
    assert 0 < count < 100
    assert "further off" in as_text(document(report))


class Own(L.LightningDataModule):
    """A data module that tokenises by itself, with the teacher's tokenizer, and says little."""

    label_names = ("negative", "positive")

    def __init__(self, rows: int = 40, labels: bool = True) -> None:
        super().__init__()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained("teacher")
        encoded = self.tokenizer([" ".join(tiny.WORDS[i % 12 :][: 1 + i % 5]) for i in range(rows)] or ["a"])
        columns = {k: encoded[k] for k in ("input_ids", "attention_mask")}
        self.rows = [{k: v[i] for k, v in columns.items()} | ({"labels": i % 2} if labels else {}) for i in range(rows)]

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows, 8, collate_fn=lambda rows: dict(self.tokenizer.pad(rows, return_tensors="pt")))  # type: ignore[arg-type]


def test_a_data_module_of_ones_own() -> None:
    report = compared("teacher", "student", data=Own(), seconds=0.01)
    assert (report.rows, report.overlap, report.task) == (40, None, "Own")
    assert all(flip.texts is None for flip in report.against[0].lost[1])


@pytest.mark.parametrize(
    ("models", "data", "options", "message"),
    [
        ((), None, {}, "Name at least one model"),
        (("teacher", "teacher"), None, {}, "named twice"),
        (("teacher", "./nowhere"), None, {}, "There is no folder './nowhere'"),
        (("teacher", "base"), None, {}, "its head would be random"),
        (("teacher", "three"), None, {}, "has 3 labels, the teacher 'teacher' has 2"),
        (("teacher", "swapped"), None, {}, "Bring them into one order"),
        (("swapped",), None, {}, "Bring them into one order"),
        (("teacher", "other"), Own, {}, "another tokenizer"),
        (("teacher",), lambda: Own(rows=0), {}, "set is empty"),
        (("teacher",), lambda: Own(labels=False), {}, "has no labels"),
        (("teacher",), None, {"set_name": "tset"}, "no set 'tset'. Its sets: val"),
        (("teacher",), lambda: Glue("sst2", path="glue", tokenizer="other"), {}, "Leave out --data.tokenizer"),
        (("teacher",), lambda: Glue("stsb", path="glue/sst2"), {}, "The data has 1 labels"),
        (
            ("teacher",),
            lambda: TextData("glue/sst2/train.tsv", "glue/sst2/validation.tsv", "sentence", label_column=None),
            {},
            "has no labels",
        ),
        (("teacher",), None, {"seconds": -1}, "can't be negative"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    folder: Path, models: Sequence[str], data: Any, options: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (folder / "base").exists():
        AutoModel.from_pretrained("teacher").save_pretrained("base")
        swapped = {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
        for name, config in (("three", {"labels": 3}), ("swapped", {"labels": 2} | swapped)):
            tiny.bert(1, max_position_embeddings=128, **config).save_pretrained(name)
        for name in ("base", "three", "swapped"):
            tiny.tokenizer().save_pretrained(name)

    def runs(*_: Any, **__: Any) -> None:
        raise AssertionError("a model ran")

    if message != "has no labels":
        monkeypatch.setattr("transformers.BertForSequenceClassification.forward", runs)
    with pytest.raises(IldistilError, match=message.replace("(", r"\(")):
        compared(*models, data=None if data is None else data(), **options)


def test_rows_that_differ_between_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Own()
    loader, calls = data.val_dataloader, []

    def other_rows() -> Any:
        calls.append(1)
        data.rows = data.rows[: 40 - 8 * len(calls)]
        return loader()

    monkeypatch.setattr(data, "val_dataloader", other_rows)
    with pytest.raises(DataError, match="gave student other rows"):
        compared("teacher", "student", data=data)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = "compare teacher student --data Glue --data.task sst2 --data.path glue --seconds 0.01 --flips 1"
    cli.main([*words.split(), "--accelerator=cpu", "--json=report.json", "--markdown=report.md"])
    printed = capsys.readouterr().out
    for part in ("student: keeps", "McNemar, exact", "Calibration", "rounds in turns", "most confident first"):
        assert part in printed
    assert max(map(len, printed.splitlines())) <= 120
    found = json.loads(Path("report.json").read_text(encoding="utf-8"))
    said, labels = by_hand("student")
    assert found["students"][0]["metrics"]["accuracy"]["value"] == pytest.approx((said == labels).mean())
    assert len(found["against"][0]["lost"][1]) <= 1
    page = Path("report.md").read_text(encoding="utf-8")
    assert page.startswith("# teacher and student\n")
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) > 15


def test_the_data_of_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"model": {"student": {"layers": [1]}}, "data": {"class_path": "Glue", "init_args": {"task": "sst2"}}}
    Path("run.yaml").write_text(json.dumps(parts | {"seed_everything": 3}))
    cli.main(["compare", "teacher", "--config=run.yaml", "--data.path=glue", "--seconds=0", "--accelerator=cpu"])
    assert "sst2, val: 50 rows" in capsys.readouterr().out


@pytest.mark.parametrize("targets", [False, True])
def test_a_training_ends_with_the_short_form(targets: bool, capsys: pytest.CaptureFixture[str]) -> None:
    models = "--model.teacher pretrained --model.teacher.path ./teacher --model.student.layers [1]"
    words = f"fit {models} --data Glue --data.task sst2 --data.path glue"
    terms = '{"logits": {"class_path": "LogitsKL"}}'
    trainer = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    stored = ["--model.targets=stored"] if targets else []
    cli.main([*words.split(), f"--objectives={terms}", *trainer, *stored, "--run", f"run-{targets}"])
    printed = capsys.readouterr().out
    said, labels = by_hand("teacher")
    score = float(re.findall(r"val/accuracy = ([\d.]+)", printed)[0])
    kept = 100 * score / (said == labels).mean()
    wanted = f"The student keeps {kept:.1f} % of the teacher's accuracy, "
    assert (wanted in printed) == (not targets)
    assert ("The student" in printed) == (not targets)


def test_pages_escape_what_rows_hold() -> None:
    Path("odd.tsv").write_text("sentence\tlabel\n" + "<b>good</b> | *film*\tnegative\nbad | film\tpositive\n" * 4)
    data = TextData(validation_file="odd.tsv", text_column="sentence", label_names=["negative", "positive"])
    page = as_markdown(document(compared("teacher", "student", data=data, flips=9)))
    assert "<b>" not in page
    for line in page.splitlines():
        if line.startswith("| ") and "film" in line:
            assert line.replace(r"\|", "").count("|") == 7
