"""The whole story in three minutes, without any download: a teacher, three students, a table and a figure.

The task is made here: the first sentence says what a bag and a box hold, the second says that the bag holds one of
these things, and the question is whether that follows. Swap bag and box in the first sentence: the words stay the same,
the answer turns. So no bag of words can tell, only looking from one sentence for the right place in the other.
"""

import copy
import json
import logging
import math
import random
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning as L
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from ildistil import storage
from ildistil.commands._parser import call
from ildistil.errors import ConfigError, writing
from ildistil.objectives import AttentionKL, LogitsKL, Objective, TaskLoss
from ildistil.students.initialise import init_student
from ildistil.tables import table
from ildistil.training.distiller import Distiller
from ildistil.training.export import save_student

__all__ = ["BagOfThings", "Example", "Result", "main", "make_examples", "quickstart"]

LABELS = ["not_entailment", "entailment"]
THINGS = ["ball", "bell", "book", "coin", "cup", "hat", "key", "lamp", "ring", "shoe"]
GLUE_WORDS = ["the", "bag", "box", "holds", "a", "and", ",", "."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]

TEACHER = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
STUDENT = {"num_hidden_layers": 2}  # random weights: a student has to find out where to look, or be shown
TEACHER_ROWS, STUDENT_ROWS, VALIDATION_ROWS = 32_000, 6_400, 2_000
STUDENT_EPOCHS = 3
TAUGHT = 0.9


@dataclass(frozen=True)
class Example:
    """A pair of sentences; ``label`` is 1 where the second follows from the first."""

    premise: str
    hypothesis: str
    label: int


def make_examples(count: int, seed: int, held_out: bool = False) -> list[Example]:
    """Make examples; the same seed gives the same ones, and none is both held out and not.

    >>> make_examples(1, seed=3)[0].premise.startswith("the bag holds a ")
    True
    """
    draw = random.Random(seed)
    examples: list[Example] = []
    while len(examples) < count:
        numbers, asked = draw.sample(range(len(THINGS)), 4), draw.randrange(4)
        # A fifth of all that can be said, whatever the seed, is kept for validation.
        if (sum(place * number for place, number in enumerate(numbers, 1)) % 5 == 0) == held_out:
            examples.append(_example([THINGS[number] for number in numbers], asked))
    return examples


def _example(things: list[str], asked: int) -> Example:
    bag, box = (f"holds a {first} and a {second}" for first, second in (things[:2], things[2:]))
    return Example(f"the bag {bag} , the box {box} .", f"the bag holds a {things[asked]} .", int(asked < 2))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make the word-level tokenizer of the task."""
    words = {word: number for number, word in enumerate([*SPECIAL, *GLUE_WORDS, *THINGS])}
    core = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])],
    )
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=48, model_input_names=inputs, **names)


class BagOfThings(L.LightningDataModule):
    """The generated task as a data module; see :class:`ildistil.data.Task` for what it declares.

    Args:
        train_rows: Number of training examples.
        seed: Seed of the examples and their order.
        batch_size: Rows per batch.
    """

    task_name = "bag of things"
    label_names = LABELS
    primary_metric = "accuracy"
    max_length = 48

    def __init__(self, train_rows: int, seed: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        self.tokenizer = make_tokenizer()
        self.batch_size, self.seed = batch_size, seed
        self.train = self._rows(make_examples(train_rows, seed))
        self.validation = self._rows(make_examples(VALIDATION_ROWS, seed, held_out=True))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training examples, shuffled by the seed."""
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=order, collate_fn=self._collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation examples, in order."""
        return DataLoader(self.validation, 256, collate_fn=self._collate)  # type: ignore[arg-type]

    def _rows(self, examples: list[Example]) -> list[dict[str, Any]]:
        encoded = self.tokenizer([e.premise for e in examples], [e.hypothesis for e in examples])
        return [
            {**{key: encoded[key][i] for key in encoded}, "labels": e.label, "row_id": i}
            for i, e in enumerate(examples)
        ]

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.tokenizer.pad(rows, return_tensors="pt")
        return dict(batch)


def make_teacher(seed: int) -> PreTrainedModel:
    """Make an untrained teacher that starts where small Transformers learn fast.

    Keys start similar to queries (a token then looks at tokens like itself) and positions start as sines: the start
    of Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", 2023.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        **TEACHER,
        vocab_size=len(SPECIAL) + len(GLUE_WORDS) + len(THINGS),
        max_position_embeddings=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
        problem_type="single_label_classification",
    )
    teacher = BertForSequenceClassification(config)
    width, share = config.hidden_size, 0.7
    with torch.no_grad():
        positions = teacher.bert.embeddings.position_embeddings.weight
        waves = torch.arange(len(positions))[:, None] * torch.exp(-math.log(100.0) * torch.linspace(0, 1, width // 2))
        positions.copy_(0.14 * torch.cat([waves.sin(), waves.cos()], 1))
        for layer in teacher.bert.encoder.layer:
            query, key = layer.attention.self.query.weight, layer.attention.self.key.weight
            query.copy_(torch.randn(width, width) / width**0.5)
            key.copy_(share * query + (1 - share**2) ** 0.5 * torch.randn(width, width) / width**0.5)
    return teacher


STUDENTS: dict[str, Any] = {
    "task": lambda: [TaskLoss()],
    "logits": lambda: [LogitsKL(weight=0.5), TaskLoss(weight=0.5)],
    "attention": lambda: [AttentionKL(), LogitsKL(weight=0.5), TaskLoss(weight=0.5)],
}
DESCRIPTIONS = {
    "teacher": "teacher",
    "start": "student before training",
    "task": "student, task loss only",
    "logits": "student, + logits KL",
    "attention": "student, + attention KL",
}


@dataclass(frozen=True)
class Result:
    """What one model of one seed reached."""

    model: str
    seed: int
    accuracy: float
    parameters: int
    sentences_per_second: float
    seconds: float


def main(command: str, arguments: Sequence[str]) -> None:
    """Run the quickstart."""
    call(quickstart, command, arguments, "overwrite")


def quickstart(output: str = "quickstart", seed: int = 0, seeds: int = 1, overwrite: bool = False) -> None:
    """Train a teacher on a generated task, distil three students, and compare them.

    Args:
        output: the folder to write: table, figure, and the models as plain transformers folders.
        seed: the first seed.
        seeds: how many seeds to run; more than one gives standard deviations.
        overwrite: replace the folder if it is there.
    """
    folder = Path(output)
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}.")
    if folder.is_file():
        raise ConfigError(f"{output!r} is a file. Name a folder.")
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise ConfigError(f"The folder {output!r} is not empty. Name another one, or add --overwrite=true.")
        with writing(folder):
            shutil.rmtree(folder)
    started = time.perf_counter()
    with _quiet():
        results = [result for s in range(seed, seed + seeds) for result in _one_seed(s, folder if s == seed else None)]
    storage.write_text(folder / "results.json", json.dumps([asdict(r) for r in results], indent=2) + "\n")
    text = report(results)
    storage.write_text(folder / "results.txt", text + "\n")
    print(f"\n{text}\n")
    figure = _figure(results, folder / "quickstart.png")
    seconds = time.perf_counter() - started
    print(f"Written to {folder}/ in {seconds:.0f} s: results.json, {figure}and the models; each loads with")
    print(f'AutoModelForSequenceClassification.from_pretrained("{folder}/attention").')


def _one_seed(seed: int, folder: Path | None) -> Iterator[Result]:
    example = make_examples(1, seed)[0]
    if folder is not None:
        print(f"The task: {example.premise} | {example.hypothesis} -> {LABELS[example.label]}", flush=True)
    data = BagOfThings(TEACHER_ROWS, seed)
    # One start in five or so never leaves chance: such a teacher has nothing to teach, and is started anew.
    for attempt in range(4):
        teacher = make_teacher(seed + 1000 * attempt)
        result = _trained("teacher", teacher, None, [TaskLoss()], data, seed, epochs=1, folder=folder)
        if result.accuracy > TAUGHT:
            break
    yield result
    data = BagOfThings(STUDENT_ROWS, seed)
    torch.manual_seed(seed)
    start = init_student(teacher, config=STUDENT)
    yield Result("start", seed, _accuracy(start, data), start.num_parameters(), _speed(start, data), 0.0)
    for name, objectives in STUDENTS.items():
        student = copy.deepcopy(start)
        yield _trained(name, student, teacher, objectives(), data, seed, epochs=STUDENT_EPOCHS, folder=folder)


def _trained(
    name: str, model: PreTrainedModel, teacher: PreTrainedModel | None, objectives: list[Objective],
    data: BagOfThings, seed: int, *, epochs: int, folder: Path | None,
) -> Result:  # fmt: skip
    torch.manual_seed(seed)
    print(f"  seed {seed}: {DESCRIPTIONS[name]} ...", end=" ", flush=True)
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(objectives), gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(Distiller(model, teacher, learning_rate=1e-3), data)
    seconds = time.perf_counter() - started
    result = Result(name, seed, _accuracy(model, data), model.num_parameters(), _speed(model, data), seconds)
    print(f"{100 * result.accuracy:.1f} % after {seconds:.0f} s", flush=True)
    if folder is not None:
        save_student(model, folder / name, data.tokenizer)
    return result


@torch.no_grad()
def _accuracy(model: PreTrainedModel, data: BagOfThings) -> float:
    model.eval()
    hits = [_logits(model, batch).argmax(-1) == batch["labels"] for batch in data.val_dataloader()]
    return float(torch.cat(hits).float().mean())


@torch.no_grad()
def _speed(model: PreTrainedModel, data: BagOfThings) -> float:
    """Sentence pairs a second, the fastest of five batches."""
    model.eval()
    batch = next(iter(data.val_dataloader()))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        _logits(model, batch)
        seconds.append(time.perf_counter() - started)
    return len(batch["labels"]) / min(seconds)


def _logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "row_id")}
    logits: Tensor = model(**inputs).logits
    return logits


def report(results: Sequence[Result]) -> str:
    """Write the table, and say in a sentence what came out."""
    by_model = {name: [r for r in results if r.model == name] for name in DESCRIPTIONS}
    best = mean(r.accuracy for r in by_model["teacher"])
    speed = mean(r.sentences_per_second for r in by_model["teacher"])
    rows = []
    for name, runs in by_model.items():
        accuracy = mean(r.accuracy for r in runs)
        spread = f" ± {100 * stdev(r.accuracy for r in runs):.1f}" if len(runs) > 1 else ""
        faster = mean(r.sentences_per_second for r in runs) / speed
        kept = f"{100 * accuracy / best:.1f} %"
        size = f"{runs[0].parameters:,}"
        rows.append((DESCRIPTIONS[name], f"{100 * accuracy:.1f} %{spread}", kept, size, f"{faster:.1f} x"))
    header = ("model", "accuracy", "of teacher", "parameters", "speed")
    return f"{table(header, rows)}\n\n{_verdict(by_model)}"


def _verdict(by_model: dict[str, list[Result]]) -> str:
    accuracy = {name: mean(r.accuracy for r in by_model[name]) for name in STUDENTS}
    winner = max(accuracy, key=lambda name: accuracy[name])
    others = ", ".join(
        f"{100 * (accuracy[winner] - a):+.1f} points over {n}" for n, a in accuracy.items() if n != winner
    )
    seeds = len(by_model["teacher"])
    wins = sum(
        max(STUDENTS, key=lambda n: next(r.accuracy for r in by_model[n] if r.seed == t.seed)) == winner
        for t in by_model["teacher"]
    )
    over = f"; it is the best student in {wins} of {seeds} seeds" if seeds > 1 else " (one seed: try --seeds=5)"
    return f"Best student: {winner}, {others}{over}."


def _figure(results: Sequence[Result], path: Path) -> str:
    """Draw the accuracies, and return the file's name for the closing line."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("No figure: matplotlib is not installed (pip install 'ildistil[demo]').")
        return ""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = ["start", *STUDENTS]
    values = {name: [100 * r.accuracy for r in results if r.model == name] for name in names}
    teacher = mean(100 * r.accuracy for r in results if r.model == "teacher")
    colours = ["#c8ccd0", "#9db4c0", "#5c8ea6", "#1f5673"]
    figure, axes = plt.subplots(figsize=(7.2, 3.0), layout="constrained")
    labels = [DESCRIPTIONS[name].removeprefix("student, ").removeprefix("student ") for name in names]
    heights = [mean(values[name]) for name in names]
    errors = [stdev(values[name]) if len(values[name]) > 1 else 0.0 for name in names]
    bars = axes.barh(labels, heights, xerr=errors if any(errors) else None, color=colours, height=0.62, capsize=3)
    axes.bar_label(bars, [f"{h:.1f} %" for h in heights], padding=6, fontsize=10)
    axes.axvline(teacher, color="#b5482a", linewidth=1.5, linestyle="--")
    axes.text(teacher - 1, 0, f"teacher {teacher:.1f} %", color="#b5482a", ha="right", va="center", fontsize=10)
    axes.axvline(50, color="#888888", linewidth=1)
    axes.set(xlim=(40, 112), xlabel="validation accuracy (chance is 50 %)", xticks=range(40, 101, 10))
    axes.set_title("Three students of the same size and start, three losses", loc="left", fontsize=11)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    with storage.replacing(path) as draft:
        figure.savefig(draft, dpi=160, format="png")
    plt.close(figure)
    return f"{path.name} "


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on hardware, and our plans, out of the story; use one thread."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for a second thread
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
