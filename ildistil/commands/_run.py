"""What the commands with a Trainer share: their options, models, data and callbacks, and Lightning's errors."""

import os
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import transformers
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Checkpoint, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

import ildistil.data  # so that a YAML file can name Glue and TextData  # noqa: F401
from ildistil.capture import ModelInfo
from ildistil.commands._config import ConfigFile
from ildistil.commands._failures import process_errors
from ildistil.commands._folder import KeepConfig, RunFolder, keep_metrics
from ildistil.commands._parser import Parser, own_errors
from ildistil.data.task import task_of
from ildistil.errors import ConfigError, IldistilError, Stopped
from ildistil.objectives import Objective
from ildistil.training import checkpoint_files
from ildistil.training.checkpoint import Saved
from ildistil.training.distiller import Distiller
from ildistil.training.evaluation import measures_terms
from ildistil.training.monitor import Throughput, Validations
from ildistil.training.progress import ResumeCheckpoint

__all__ = ["Run", "lightning_errors"]

_RUNS = {
    True: """\
'--run FOLDER' names the folder of the run, by default a new one. '--resume' goes on from its newest checkpoint with
its configuration; without '--run' that is the run which was saved last, and where there is none the run starts.
""",
    False: """\
'--run FOLDER' takes the configuration and the best student of a run.
""",
}
_EPILOG = """\
'--data.help TextData' shows the options of one class; the other options that end in .help do the same."""


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Raise as a `ConfigError` what Lightning refuses: it was told so by the configuration.

    That is its own exception, and others that its code, or that of its callbacks and loggers, raises by itself. What
    comes from further inside, such as an objective, passes.
    """
    try:
        yield
    except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError, OSError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        # Lightning watches what torch does while a module is configured: that it was in between tells nothing.
        raised_in = [f.f_globals.get("__name__", "") for f in frames if f.f_code.co_name != "__torch_function__"][-1]
        by_lightning = isinstance(error, MisconfigurationException) or raised_in.startswith("lightning.")
        if isinstance(error, IldistilError) or not by_lightning:
            raise
        raise ConfigError(str(error)) from error


class Run(LightningCLI):
    """One command's models, data and Trainer, made from its arguments.

    Args:
        command: Name of the command.
        model: What makes the module; its parameters are the options ``--model.NAME``.
        arguments: The words after the command.
        description: What the command does, for its help.

    Raises:
        IldistilError: The configuration is wrong.
    """

    trains: ClassVar[bool] = False
    usage: ClassVar[str] = "[--config FILE]"

    def __init__(
        self, command: str, model: Callable[..., Distiller], arguments: Sequence[str], description: str | None
    ) -> None:
        self.command = command
        self.folder = RunFolder.training(command, arguments) if self.trains else RunFolder.measuring(arguments)
        usage = f"ildistil {command} {self.usage} [--run FOLDER] {'[--resume] ' if self.trains else ''}[options]"
        with lightning_errors(), own_errors():
            super().__init__(
                model_class=model,
                datamodule_class=L.LightningDataModule,
                subclass_mode_data=True,
                run=False,
                args=self.folder.arguments,
                save_config_callback=KeepConfig,
                save_config_kwargs={"folder": self.folder.path},
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={"usage": usage, "description": description, "epilog": _RUNS[self.trains] + _EPILOG},
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                trainer_defaults={
                    "max_epochs": 3,
                    "enable_model_summary": False,
                    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": command}},
                },
            )

    # Options

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser."""
        parser = Parser(**kwargs)
        help = "A YAML file with any of the options below; of several, the later wins."
        parser.add_argument("-c", "--config", action=ConfigFile, metavar="FILE", help=help)
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that hold for the whole process."""
        parser.add_argument(
            "--seed_everything", type=NonNegativeInt | bool, default=0, metavar="SEED",
            help="Seed of initial weights, dropout and the order of the data; true draws one.",
        )  # fmt: skip
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"],
            default="highest",
            help="Precision of float32 matrix products: 'high' is TF32 on GPUs that have it, 'medium' bfloat16 there "
            "and on CPUs that have it. Losses are then less exact, too.",
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, metavar="FILE", help="Checkpoint to start from."
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is our own before the Trainer's many options."""
        parser.add_lightning_class_args(self._model_class, "model")
        self.add_objectives(parser)
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        titles = {
            "data": "The data: Glue, TextData, Corpus, or a data module of your own",
            "trainer": "Lightning's Trainer",
        }
        for name, group in (parser.groups or {}).items():
            group.title = titles.get(name, group.title)

    def add_objectives(self, parser: LightningArgumentParser) -> None:
        """Add options for the objectives, if they can be chosen."""

    # Parts

    def before_instantiate_classes(self) -> None:
        """Set what holds for the whole process, and look at the checkpoint before a model is loaded."""
        transformers.utils.logging.disable_progress_bar()
        torch.set_float32_matmul_precision(self.config.matmul_precision)
        self._begins_at = 0
        if self.config.ckpt_path is not None:
            content = checkpoint_files.load(self.config.ckpt_path)
            Saved.read(content, repr(self.config.ckpt_path))
            self._begins_at = content["global_step"]

    def objectives(self) -> dict[str, Objective]:
        """Return the named objectives of this run."""
        return {}

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Make the Trainer, with the objectives and the usual callbacks."""
        config = self.config_init.trainer
        configured = config.callbacks if isinstance(config.callbacks, list) else [config.callbacks]
        callbacks = [callback for callback in configured if callback is not None]
        for name, objective in self.objectives().items():
            objective.name = name
            callbacks.append(objective)
        # First, so that it comes before what writes checkpoints.
        callbacks = [Validations(), *callbacks, Throughput()]
        if config.logger is False:
            self.save_config_callback = None  # it would write to the working folder
        else:
            callbacks.append(LearningRateMonitor("step"))
        if not self.trains:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
            kwargs["enable_checkpointing"] = False
        elif not config.fast_dev_run and config.enable_checkpointing is not False:
            callbacks += self._checkpoints(callbacks)
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        _check_processes(trainer, config.strategy)
        return trainer

    def _checkpoints(self, given: Sequence[Callback]) -> list[Checkpoint]:
        """Keep the best student, and what the run needs to go on."""
        # Without a folder they stand in the logger's.
        folder = None if self.folder.path is None or self._own_logger else str(self.folder.path / "checkpoints")
        made: list[Checkpoint] = []
        if not any(isinstance(callback, ResumeCheckpoint) for callback in given):
            made.append(ResumeCheckpoint(folder))
        task = task_of(self.datamodule)
        names = task.validation_names if self.config_init.trainer.limit_val_batches != 0 else []
        if names and task.primary_metric is not None and not any(isinstance(c, ModelCheckpoint) for c in given):
            by_terms = measures_terms(task, self.objectives().values(), ModelInfo.of(self.model.student))
            metric, mode = ("loss", "min") if by_terms else (task.primary_metric, task.primary_mode)
            monitor = f"{names[0]}/{metric}"
            # A run that goes on keeps its folder of checkpoints, and so what was best; another folder begins anew.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message="The dirpath has changed")
            # A training that ends before a validation: that is said at its end.
            warnings.filterwarnings(
                "ignore", message=rf".*monitor='{re.escape(monitor)}'.* could not find the monitored"
            )
            best = ModelCheckpoint(folder, "best", monitor=monitor, mode=mode, enable_version_counter=False)
            made.insert(0, best)
        return made

    # Running

    @property
    def _own_logger(self) -> bool:
        """Whether the logger is the default, which writes into the run's folder."""
        return bool(self.config.trainer.logger == self.parser.get_defaults().trainer.logger)

    def start(self, method: Callable[..., Any]) -> Any:
        """Call a method of the Trainer.

        Raises:
            IldistilError: The configuration turns out to be wrong.
        """
        path, before = self.config.ckpt_path, self._begins_at
        if self.trains and 0 in (self.trainer.max_epochs, self.trainer.max_steps):
            raise ConfigError("max_epochs or max_steps is 0, so nothing would be trained. Set it to more.")
        with _ended_with_children(self.trainer), process_errors(), lightning_errors(), self._own_folder(before):
            found = method(self.model, datamodule=self.datamodule, ckpt_path=path, weights_only=True)
        if self.trains and self.trainer.global_step == before and self.trainer.is_global_zero:
            print(f"There was nothing left to train: {path or 'the run'} is at step {before}, where it ends.")
        return found

    @contextmanager
    def _own_folder(self, step: int) -> Iterator[None]:
        """Make the run's folder, which no other process gets; with a logger of one's own that one decides.

        Args:
            step: from where the run goes on.
        """
        if self.trainer.fast_dev_run or not (self._own_logger or self.folder.path):  # type: ignore[attr-defined]
            yield
            return
        with self.folder.owned(self.command, lock=self.trains) as folder:
            if self._own_logger:
                warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
                self.trainer.logger = CSVLogger(str(folder.parent), "", folder.name)
            if self.folder.resume and step:
                keep_metrics(self.trainer, step)
            yield

    def report_best(self) -> None:
        """Print where the best student is, and how to go on."""
        kept = [c for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint | ResumeCheckpoint)]
        if not self.trainer.is_global_zero or not kept or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        measured = [c for c in kept if isinstance(c, ModelCheckpoint) and c.best_model_path]
        last = [c.last for c in kept if isinstance(c, ResumeCheckpoint) and c.last.is_file()]
        if measured:
            best, score = os.path.relpath(measured[0].best_model_path), measured[0].best_model_score
            print(f"Best student: {best}{'' if score is None else f' ({measured[0].monitor} = {score:.4f})'}")
        elif last:
            best, step = os.path.relpath(last[0]), self.trainer.global_step
            print(f"The student after {step} steps: {best}. It was not measured: no validation came before the end.")
        else:
            return
        print(f"Export it:    ildistil export {best} FOLDER")
        if self.model.head_untrained or ModelInfo.of(self.model.student).is_body:
            print("No term trains a head: fine-tune it on a task next: ildistil finetune --model.path FOLDER")


@contextmanager
def _ended_with_children(trainer: L.Trainer) -> Iterator[None]:
    """End the processes that a failing one has started, and end by Ctrl-C as all programs do."""
    try:
        yield
    except BaseException as error:
        kill = getattr(trainer.strategy.launcher, "kill", None)
        if kill is not None and not isinstance(error, Stopped):
            kill(signal.SIGTERM)
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # Lightning exits with 1
        raise


def _check_processes(trainer: L.Trainer, strategy: object) -> None:
    """Refuse processes that would each train by itself, or that a command can't be handed on to.

    Raises:
        ConfigError: a launcher started several processes, and the Trainer is told of one; or they would be forked.
    """
    if re.search("spawn|fork|notebook", str(strategy)):
        raise ConfigError(f"The strategy {strategy!r} is for notebooks. Use 'ddp', which starts the command anew.")
    started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or 1)
    if started > 1 and trainer.world_size == 1:
        raise ConfigError(
            f"{started} processes were started (by torchrun, srun or the like), and the Trainer is to use one: each "
            f"would train by itself. Set --trainer.devices to the processes of a machine and --trainer.num_nodes to "
            "the machines, or start one process."
        )
