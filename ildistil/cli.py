"""The command ``ildistil``: fit, validate, test, predict, finetune, export, presets, quickstart."""

import csv
import difflib
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jsonargparse
import lightning as L
import torch
import transformers
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerFn
from transformers import PreTrainedModel

import ildistil
import ildistil.data  # so that a YAML file can name Glue and TextData
from ildistil import presets
from ildistil.errors import CaptureError, ConfigError
from ildistil.mappings import LayerMapping
from ildistil.objectives import Objective, TaskLoss
from ildistil.schedules import Schedule
from ildistil.students.sources import ModelSource, StudentOptions, load
from ildistil.tables import table
from ildistil.teachers import StoredTeacher, estimate, precompute
from ildistil.teachers.layout import Dtype
from ildistil.training.distiller import Distiller
from ildistil.training.export import export
from ildistil.training.monitor import Throughput

__all__ = ["finetuner", "main", "make_distiller"]

_HELP = """\
usage: ildistil COMMAND [options]

Distil a Transformer into a smaller one.

  quickstart   the whole story in three minutes, without any download
  finetune     fine-tune a pretrained model on a task: the teacher
  fit          distil a student from a teacher
  precompute   store what a teacher says of the training set, for many runs without it
  validate     measure a student on the validation set
  test         measure a student on the test set
  predict      write a student's predictions to a file
  export       write the student of a checkpoint as a plain transformers folder
  presets      list the named configurations for 'fit --preset NAME': TinyBERT, MiniLM, PKD ...

'ildistil COMMAND --help' shows the options of a command; '--print_config' with fit, validate,
test, predict or finetune prints its whole configuration as YAML, to edit and give back with '--config FILE'.
"""
_TRAINING = ("fit", "validate", "test", "predict")


def make_distiller(
    teacher: ModelSource,
    student: StudentOptions,
    tokenizer: str | None = None,
    targets: str | None = None,
    targets_dtype: Dtype | None = None,
    **options: Any,
) -> Distiller:
    """Distil a student from a teacher.

    Args:
        teacher: Where the frozen model comes from, usually ``pretrained`` with a path.
        student: Where the student comes from: layers of the teacher, a config, or another model's path.
        tokenizer: Name or folder of the tokenizer; by default the teacher's.
        targets: Folder of stored targets, see 'ildistil precompute': the teacher runs for rows that aren't in it only.
        targets_dtype: Precision of targets in a new folder: float16 (the default), bfloat16 or float32.
        options: Those of :class:`Distiller`.
    """
    tokenizer = tokenizer or teacher.tokenizer
    if targets is None:
        if targets_dtype is not None:
            raise ConfigError(
                f"targets_dtype is {targets_dtype}, and there are no targets. Name their folder (--model.targets "
                "FOLDER), or leave targets_dtype out."
            )
        loaded = teacher.load()
        return Distiller(student.make(loaded, teacher), loaded, tokenizer=tokenizer, **options)
    stored, model = _stored_teacher(teacher, targets, targets_dtype, with_weights=student.copies_weights)
    return Distiller(student.make(model, teacher), stored, tokenizer=tokenizer, **options)


def _stored_teacher(
    source: ModelSource, folder: str, dtype: Dtype | None, *, with_weights: bool
) -> tuple[StoredTeacher, PreTrainedModel]:
    """Give the stored teacher, and the teacher or its skeleton to make a student by.

    The teacher is loaded where its weights are wanted, where they can't be told from their files, and where nothing is
    stored yet; else when a row turns out to be missing.
    """
    digest = source.digest()
    stored = StoredTeacher(folder, source.load, dtype=dtype, source=digest)
    if isinstance(stored.model, PreTrainedModel):
        return stored, stored.model
    known = digest is not None and digest == stored.facts.source
    skeleton = stored.skeleton() if known and not with_weights else None
    if skeleton is not None:
        return stored, skeleton
    model = source.load()
    if not known:
        stored.facts.check(model)
    return stored, model


def finetuner(
    path: str,
    labels: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    **options: Any,
) -> Distiller:
    """Fine-tune a pretrained model on a task.

    Args:
        path: Name on the hub, or a folder, of the pretrained model.
        labels: What the data module says of its labels.
        config: Values to change in the model's config, such as a dropout.
        tokenizer: Name or folder of the tokenizer; by default the model's.
        options: Those of :class:`Distiller`.
    """
    model = load(path, config=(labels or {}) | (config or {}), new_head=True)
    return Distiller(model, None, tokenizer=tokenizer or path, stages=(), balance=None, **options)


class _Parser(LightningArgumentParser):
    """A parser that suggests the word one may have meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message and close matches of the words it doesn't know, without 60 lines of usage."""
        hint = suggestion(message, self._known_words())
        lines = [f"error: {message}", *([hint] if hint else []), "All options: ildistil COMMAND --help"]
        sys.stderr.write("\n".join(lines) + "\n")
        raise SystemExit(2) from ex

    def _known_words(self) -> set[str]:
        parsers = [self, *(p for a in self._actions for p in (getattr(a, "_name_parser_map", None) or {}).values())]
        options = [option.lstrip("-") for p in parsers for action in p._actions for option in action.option_strings]
        words = {part for option in options for part in option.split(".")}
        words |= set(inspect.signature(ildistil.data.LoadingOptions).parameters)
        for base in (Objective, LayerMapping, Schedule, ModelSource, L.LightningDataModule, L.Callback, Logger):
            for cls in _subclasses(base):
                words |= {cls.__name__, *inspect.signature(cls).parameters}
        return words


def _subclasses(cls: type[Any]) -> set[type[Any]]:
    return {s for direct in cls.__subclasses__() for s in (direct, *_subclasses(direct))}


def suggestion(message: str, known: set[str]) -> str:
    """Find the words of an error message that are close to a known word, but aren't one.

    >>> suggestion("Option 'wieght' is not accepted", {"weight", "name"})
    "Did you mean 'weight' instead of 'wieght'?"
    """
    unknown = re.findall(r"'([\w.]+)'|\"([\w.]+)\"|--([\w.]+)|: (\w+)$", message)
    parts = [part for groups in unknown for word in groups for part in word.split(".") if part and part not in known]
    for part in reversed(parts):  # what was given stands behind what it was given to
        close = difflib.get_close_matches(part, known, n=2, cutoff=0.75)
        if close:
            return f"Did you mean {' or '.join(map(repr, close))} instead of {part!r}?"
    return ""


class _CLI(LightningCLI):
    """Lightning's CLI with named objectives, and a checkpoint of the best student."""

    def __init__(self, model: Callable[..., Distiller], kind: str, **kwargs: Any) -> None:
        super().__init__(
            model_class=model,
            datamodule_class=L.LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            parser_class=_Parser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            trainer_defaults={
                "max_epochs": 3,
                "enable_model_summary": False,
                "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": kind}},
            },
            **kwargs,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Precision of float32 matrix products, torch.set_float32_matmul_precision: 'high' is TF32 on GPUs "
            "that have it, 'medium' bfloat16 there and on CPUs that have it. Losses are then less exact too.",
        )

    def before_instantiate_classes(self) -> None:
        """Set what holds for the whole process."""
        torch.set_float32_matmul_precision(self._get(self.config, "matmul_precision"))

    def objectives(self) -> dict[str, Objective]:
        """Give the named objectives of this run."""
        named: dict[str, Objective] = self._get(self.config_init, "objectives") or {}
        return named

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Add the objectives and the usual callbacks."""
        named = self.objectives()
        for name, objective in named.items():
            objective.name = name
        config = self._get(self.config_init, "trainer")
        configured = list(config.get("callbacks") or [])
        usual: list[L.Callback] = [Throughput()]
        if config.get("logger") is not False:
            usual.append(LearningRateMonitor("step"))
        trains = self.subcommand in (None, "fit") and not config.get("fast_dev_run")
        trains = trains and config.get("enable_checkpointing") is not False
        if trains and not any(isinstance(c, ModelCheckpoint) for c in configured):
            usual += self._checkpoints()
        return super().instantiate_trainer(callbacks=[*configured, *named.values(), *usual], **kwargs)

    def _checkpoints(self) -> list[ModelCheckpoint]:
        """Keep the best student and the last; the last one alone where nothing is measured."""
        names = getattr(self.datamodule, "validation_names", ["val"])
        first = names[0] if names else "val"
        measured = names and self._get(self.config_init, "trainer").get("limit_val_batches") != 0
        primary = getattr(self.datamodule, "primary_metric", None) if measured else None
        best: dict[str, Any] = {"monitor": f"{first}/{primary}", "mode": "max", "filename": "best"}
        if not primary:
            options: list[dict[str, Any]] = [{"filename": "last"}]
        elif self.model.stages:
            options = [best, {"filename": "last"}]  # the best is watched for in the last stage only
        else:
            options = [best | {"save_last": True}]
        checkpoints = [ModelCheckpoint(enable_version_counter=False, **o) for o in options]
        path = self._get(self.config, "ckpt_path")
        if path and Path(path).is_file():
            # A run that goes on keeps its folder of checkpoints, and so what was best before.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            for checkpoint in checkpoints:
                checkpoint.dirpath = _folder_of(path)
        return checkpoints


def _folder_of(checkpoint: str) -> str:
    """The folder of a checkpoint, spelled as when it was written: Lightning compares the words."""
    callbacks = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True).get("callbacks", {})
    folder = str(Path(checkpoint).parent)
    spelled = (state.get("dirpath") for key, state in callbacks.items() if key.startswith("ModelCheckpoint"))
    return next((s for s in spelled if s and Path(s).resolve() == Path(folder).resolve()), folder)


class _DistillCLI(_CLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--objectives",
            type=dict[str, Objective] | None,
            default=None,
            help="The terms of the loss: a name for each, and its class_path and init_args.",
        )

    def before_fit(self) -> None:
        """Refuse a run without objectives before any data is prepared."""
        self.model.distillation.set_objectives(self.objectives())

    def after_fit(self) -> None:
        _say_what_next(self.trainer)

    def predict(self, **kwargs: Any) -> None:
        """Write the predictions to a file."""
        results = self.trainer.predict(**kwargs)
        folder = Path(self.trainer.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        sets: Any = results if results and isinstance(results[0], list) else [results or []]
        for name, batches in zip(self._set_names(len(sets)), sets, strict=True):
            path = folder / f"predictions{name}.tsv"
            _write_predictions(batches, getattr(self.datamodule, "label_names", None), path)
            print(f"Predictions: {path}")

    def _set_names(self, count: int) -> list[str]:
        if count == 1:
            return [""]
        known = (getattr(self.datamodule, names, None) or [] for names in ("test_names", "validation_names"))
        names = next((names for names in known if len(names) == count), range(count))
        return [f"_{name}" for name in names]


class _PrecomputeCLI(_DistillCLI):
    """Takes what ``fit`` takes, and runs on one device."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"model.targets": "targets"})
        parser.add_argument("--estimate", type=bool, default=False, help="Say how large the targets get, and stop.")
        for name in inspect.signature(L.Trainer.fit).parameters:
            if name not in ("self", "model", "train_dataloaders", "val_dataloaders", "datamodule"):
                parser.add_argument(f"--{name}", default=None, help="Not used.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Take only the device from the configuration: nothing is trained."""
        config = self._get(self.config_init, "trainer")
        devices = config.get("devices")
        off: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        one = devices[:1] if isinstance(devices, list) else 1
        return L.Trainer(accelerator=config.get("accelerator", "auto"), devices=one, **off)

    def run(self) -> None:
        """Say what is needed, and store what is missing."""
        stored = self.model.teacher
        if not isinstance(stored, StoredTeacher):
            raise ConfigError("Name the folder of the targets: --model.targets FOLDER.")
        batches = self._training_batches()
        device = self.trainer.strategy.root_device
        work = (stored, self.objectives(), self.model.student, batches)
        if self._get(self.config, "estimate"):
            print(estimate(*work, device=device))
            return
        try:
            precompute(*work, device=device, report=print)
        except KeyboardInterrupt:
            print(f"Interrupted: {len(stored.store):,} rows are stored. The same command goes on from there.")
            raise SystemExit(130) from None
        folder = stored.store.folder
        print(f"{len(stored.store):,} rows are stored. Add --model.targets {folder} to your ildistil fit command.")

    def _training_batches(self) -> Any:
        """Prepare and check the data as a fit does, and give the loader of the training set."""
        self.trainer.strategy.connect(self.model)
        self.trainer.state.fn = TrainerFn.FITTING
        self.trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        self.datamodule.trainer = self.model.trainer = self.trainer
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.model.setup("fit")
        return self.datamodule.train_dataloader()


class _FinetuneCLI(_CLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint to go on from.")
        parser.link_arguments("data", "model.labels", compute_fn=_labels, apply_on="instantiate")

    def objectives(self) -> dict[str, Objective]:
        return {"task_loss": TaskLoss()}


def _labels(module: Any) -> dict[str, Any]:
    """The values of a model's config that say what a data module's labels are."""
    if getattr(module, "regression", False):
        return {"num_labels": 1, "problem_type": "regression"}
    names = getattr(module, "label_names", None)
    if not names:
        return {}
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "single_label_classification",
    }


def _write_predictions(results: Sequence[Any], names: Sequence[str] | None, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        for number, batch in enumerate(results):
            logits = batch["logits"].float()
            classes = logits.shape[-1]
            header = [] if classes == 1 else [f"p_{n}" for n in (names or range(classes))]
            if number == 0:
                writer.writerow(["row_id", "prediction", *header])
            probabilities = [[]] * len(logits) if classes == 1 else logits.softmax(-1).tolist()
            for row, value, p in zip(
                batch["row_id"].tolist(), batch["prediction"].tolist(), probabilities, strict=True
            ):
                label = names[value] if names and classes > 1 else value
                writer.writerow([row, label, *(f"{x:.6f}" for x in p)])


def _say_what_next(trainer: L.Trainer) -> None:
    checkpoint = trainer.checkpoint_callback
    if not trainer.is_global_zero or not isinstance(checkpoint, ModelCheckpoint):
        return
    path = checkpoint.best_model_path or checkpoint.last_model_path
    if not path:
        return
    best = os.path.relpath(path)
    score = (
        "" if checkpoint.best_model_score is None else f" ({checkpoint.monitor} = {checkpoint.best_model_score:.4f})"
    )
    print(f"Best student: {best}{score}\nExport it:    ildistil export {best} FOLDER")


def _finetune(arguments: list[str]) -> None:
    cli = _FinetuneCLI(finetuner, "finetune", args=arguments, run=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.get("ckpt_path"))
    _say_what_next(cli.trainer)


def _precompute(arguments: list[str]) -> None:
    words = ["--estimate=true" if word == "--estimate" else word for word in _with_preset(arguments)[1:]]
    _PrecomputeCLI(make_distiller, "precompute", args=words, run=False).run()


def _distill(arguments: list[str]) -> None:
    _DistillCLI(make_distiller, arguments[0], args=_with_preset(arguments))


def _with_preset(arguments: list[str]) -> list[str]:
    """Replace ``--preset NAME`` by the preset's file, before all other configuration."""
    command, *rest = arguments
    for i, word in enumerate(rest):
        if word == "--preset" or word.startswith("--preset="):
            _, equals, name = word.partition("=")
            used = 1 if equals else 2
            if not equals:
                name = rest[i + 1] if i + 1 < len(rest) else ""
            return [command, "--config", str(presets.file(name)), *rest[:i], *rest[i + used :]]
    return arguments


def _list_presets() -> None:
    print(table(("preset", "what it is"), [(name, presets.title(name)) for name in presets.names()]))
    print("\nUse one: ildistil fit --preset NAME --config run.yaml, a file without objectives of its own.")
    print("See one: add --print_config.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; wrong input ends with a message and exit code 2, not with a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _quieten()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that a YAML file can name a class of a file beside it
    command = words[0] if words else "--help"
    try:
        if command in ("--help", "-h"):
            print(_HELP, end="")
        elif command == "--version":
            print(f"ildistil {ildistil.__version__}, torch {torch.__version__}, lightning {L.__version__}")
        elif command in _TRAINING:
            _distill(words)
        elif command == "finetune":
            _finetune(words[1:])
        elif command == "precompute":
            _precompute(words)
        elif command == "presets":
            _list_presets()
        elif command in ("export", "quickstart"):
            jsonargparse.auto_cli(_function(command), args=words[1:], prog=f"ildistil {command}")
        else:
            commands = [*_TRAINING, "precompute", "finetune", "export", "presets", "quickstart"]
            close = difflib.get_close_matches(command, commands, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Commands: {', '.join(commands)}."
            raise ConfigError(f"There is no command {command!r}.{hint}")
    except (ValueError, FileNotFoundError, FloatingPointError, RuntimeError, MisconfigurationException) as error:
        ours = not isinstance(error, RuntimeError) or isinstance(error, CaptureError | MisconfigurationException)
        if os.environ.get("ILDISTIL_TRACEBACK") or not (ours or "Early stopping conditioned" in str(error)):
            raise
        print(f"ildistil {command}: error: {error}\n(ILDISTIL_TRACEBACK=1 shows where.)", file=sys.stderr)
        raise SystemExit(2) from None


def _function(command: str) -> Callable[..., object]:
    if command == "export":
        return export
    from ildistil.commands.quickstart import quickstart  # it needs none of its parts loaded for other commands

    return quickstart


def _quieten() -> None:
    """Silence what users can do nothing about: other libraries' tips and deprecations."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(
            lambda record: "litlogger" not in record.getMessage() and "litmodels" not in record.getMessage()
        )


if __name__ == "__main__":
    main()
