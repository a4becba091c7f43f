"""The LightningModule around the engine: Lightning's hooks, each handed on to the unit that does the work."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ildistil.capture import ModelInfo, real_labels, unwrapped
from ildistil.data.position import keeps_position
from ildistil.data.task import task_of
from ildistil.engine import Balance, Distillation, DryRun
from ildistil.errors import CheckpointError, ConfigError
from ildistil.objectives import Objective
from ildistil.schedules import has_schedules
from ildistil.stages import Stage, Step, Timeline
from ildistil.students.heads import is_untrained
from ildistil.teachers import Teacher
from ildistil.training import checks
from ildistil.training.accumulation import Window, over_processes
from ildistil.training.checkpoint import Saved, restore, run_settings, write
from ildistil.training.checkpoint_files import CheckpointFiles, load
from ildistil.training.evaluation import Evaluation, batch_size, check_predicted, measures_terms
from ildistil.training.finite import FiniteSteps, NonFinite
from ildistil.training.lifecycle import Lifecycle
from ildistil.training.optimization import Optimization, Shape
from ildistil.training.plan import describe
from ildistil.training.randomness import reseed, seeds_of_run
from ildistil.training.rehearsal import try_first_batch, try_synthetic_batch
from ildistil.training.targets import prepare_targets

__all__ = ["Distiller"]


class Distiller(L.LightningModule):
    """Trains a student by the objectives among the Trainer's callbacks.

    Args:
        student: the model to train, for instance ``init_student(teacher, layers=[1, 2, 3])``.
        teacher: the frozen model, or any :class:`~ildistil.teachers.Teacher`; ``None`` when no objective needs one
            (plain fine-tuning with ``TaskLoss``).
        learning_rate: peak learning rate of AdamW.
        weight_decay: of all parameters but biases and norms.
        warmup: share of all steps in which the learning rate rises linearly from 0.
        schedule: what it does then: fall to 0 (``"linear"``, ``"cosine"``) or stay (``"constant"``).
        stages: stages of the training, in their order, each with some of the objectives; their epochs must add up to
            the Trainer's. Learning rate, warm-up and optimiser start anew with each; early stopping and the best
            checkpoint watch the last.
        balance: makes the objectives' weights shares of the total; by default they are plain factors.
        non_finite: what happens to an optimiser step with a loss or a gradient that isn't finite: ``"stop"`` ends the
            training before it is applied, ``"skip"`` leaves it out and counts it as ``train/skipped_steps``, up to 100
            in succession.
        compile: compile the training runs of both models with ``torch.compile``.
        tokenizer: name or folder of the tokenizer; the data module falls back to it, and the exported student gets
            it. Default: the teacher's, else the student's ``name_or_path``.
        accept_changes: go on from a checkpoint though student, data, steps, objectives or seed are others than those of
            the run that wrote it; by default that is refused.

    Raises:
        ConfigError: a value is out of range.
        ModelError: the models don't go together.

    Before training starts, the plan is printed and a dry run of one batch proves every term finite. Validation and
    test report the data module's metrics (``val/accuracy`` ...); without a data module, accuracy or the correlations.
    Checkpoints hold the student and the projections, never the teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Teacher | None = None,
        *,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        schedule: Shape = "linear",
        stages: Sequence[Stage] = (),
        balance: Balance | None = None,
        non_finite: NonFinite = "stop",
        compile: bool = False,
        tokenizer: str | None = None,
        accept_changes: bool = False,
    ) -> None:
        checks.check_kinds(student, teacher)
        super().__init__()
        # Lightning warns of every module with this hook beside a data module. Where that has it too, the teacher
        # reads its targets in the step.
        warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
        self.optimization = Optimization(learning_rate, weight_decay, warmup, schedule)
        self.distillation = Distillation(student, teacher, balance=balance)
        self.stages = list(stages)
        self.compile_models = compile
        sources = [None if self.teacher is None else self.teacher.info.source, ModelInfo.of(student).source]
        self.tokenizer_source = tokenizer or sources[0] or sources[1]
        self.accept_changes = accept_changes
        self.metrics = nn.ModuleDict()
        self.timeline = Timeline((), math.inf)
        self.evaluation = Evaluation(task_of(None), ModelInfo.of(student))
        self._lifecycle = Lifecycle()
        self.window, self._finite = Window(), FiniteSteps(non_finite)
        self._structural: DryRun | None = None
        self.seeds, self.settings, self.head_untrained = [0, 0, 0], dict[str, str](), False
        self._resumed: Saved | None = None

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        return self.distillation.student

    @property
    def teacher(self) -> Teacher | None:
        """What answers for the teacher."""
        return self.distillation.teacher

    @property
    def step(self) -> Step:
        """The optimiser step that the current batch belongs to."""
        return self.timeline.step(self.global_step)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the student."""
        return self.student(**self.distillation.student_inputs(batch))

    # Before training

    def configure_callbacks(self) -> list[Callback]:
        """Add what restores the models when training is over."""
        return [] if self._lifecycle in self.trainer.callbacks else [self._lifecycle]  # type: ignore[attr-defined]

    def prepare_data(self) -> None:
        """Store what a stored teacher will be asked for and isn't there yet; in one process of each machine."""
        if self._is_fitting:
            prepare_targets(self.trainer, self.teacher, self._objectives, self.student)

    def setup(self, stage: str) -> None:
        """Check that data and student fit, make the metrics, and write and read checkpoints in our own way."""
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckpointFiles()
        self.seeds = self.trainer.strategy.broadcast(seeds_of_run())
        task, info = task_of(self.trainer.datamodule), ModelInfo.of(self.student)  # type: ignore[attr-defined]
        checks.check_task(task, info, self._objectives)
        checks.check_vocabulary(task, info)
        by_terms = measures_terms(task, self._objectives, info)
        self.evaluation, self.metrics = Evaluation(task, info, by_terms), nn.ModuleDict()

    def configure_model(self) -> None:
        """Take the objectives from the Trainer's callbacks; quiet without a Trainer, and repeatable."""
        if not self._is_fitting:
            if self._measures_terms:
                self.timeline = Timeline(self.stages[-1:], math.inf)
                self.distillation.set_objectives(self._objectives)
            return
        self._lifecycle.restore(self)
        self.window, self._finite = Window(), FiniteSteps(self._finite.non_finite)
        self.distillation.set_objectives(self._objectives)
        checks.check_trainer(self.trainer, self.distillation.objectives, self.stages)
        self._structural = try_synthetic_batch(self.distillation)
        if self._structural is not None:
            self._lifecycle.freeze(self._structural.unreached)
        self._lifecycle.copy_again(self.trainer, self)
        if self.compile_models:
            self.distillation.compile()

    @property
    def _is_fitting(self) -> bool:
        return self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    @property
    def _measures_terms(self) -> bool:
        """Whether this is an evaluation, without training, that may need the terms."""
        evaluates = self._trainer is not None and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING)
        return evaluates and self.evaluation.may_measure_terms and bool(self._objectives)

    @property
    def _objectives(self) -> list[Objective]:
        return [c for c in self.trainer.callbacks if isinstance(c, Objective)]  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """Make AdamW, whose learning rate is set at every step."""
        optimizer = self.optimization.optimizer(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        steps = math.inf if steps < 0 else steps  # a stream without max_steps
        if not math.isfinite(steps) and self.stages:
            raise ConfigError("Stages last whole epochs, and the data's length isn't known. Use data with a length.")
        scheduled = has_schedules(self.distillation.objectives)
        if not math.isfinite(steps) and (self.optimization.schedule != "constant" or scheduled):
            shape = self.optimization.schedule
            what = "a weight's schedule" if shape == "constant" else f"schedule={shape!r}"
            raise ConfigError(
                f"{what} needs to know the number of steps. Set the Trainer's max_epochs or max_steps, or use "
                "schedule='constant' and plain weights."
            )
        self.timeline = Timeline(self.stages, steps)
        checks.check_gaps(self.distillation.objectives, self.timeline)
        scheduler = self.optimization.scheduler(optimizer, self.timeline)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Compare a run that goes on with what it was, dry-run the first batch and print the plan."""
        self.settings = run_settings(self)
        if self._resumed is not None:
            self._resumed.check_same(Saved.of(self, {}), self.accept_changes, keeps_position(self.trainer))
            self.seeds = self._resumed.seeds or self.seeds
            self._resumed = None
        self.distillation.train()
        self.window.abandon()  # a run that failed may have left one half filled
        self._finite.abandon()
        with self.trainer.precision_plugin.train_step_context():
            found = try_first_batch(self.distillation, self.trainer) or self._structural
        if found is not None and self._structural is not None:
            found = DryRun(found.terms, self._structural.unreached)
        self.head_untrained = found is not None and is_untrained(unwrapped(self.student), found.unreached)
        rank_zero_info(describe(self.distillation, found, self.stages))

    # Training

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Begin the step of a training batch before it goes to its device."""
        training = self._trainer is not None and self.trainer.training
        return self.distillation.prefetch(batch, self.step) if training else batch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the batch's random numbers by its place, so that a run that goes on draws the same."""
        reseed(self.seeds, self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return what to differentiate, so that a step is the mean over all examples of all its batches."""
        terms = self.distillation(batch, self.step)
        self._finite.add(terms, batch)
        logs, size = terms.logs("train"), batch_size(batch)
        self.log("train/loss", logs.pop("train/loss"), prog_bar=True, batch_size=size)
        self.log_dict(logs, batch_size=size)
        numbers = {"train/stage": self.timeline.place(self.global_step).stage + 1} if self.stages else {}
        numbers |= {"train/skipped_steps": self._finite.skipped} if self._finite.skipped else {}
        for name, number in numbers.items():  # filled on the device: copying a number there would wait for it
            self.log(name, torch.full((), float(number), device=self.device), batch_size=size)
        return over_processes(terms) if self.trainer.accumulate_grad_batches == 1 else self.window.add(terms)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure the student after the last step where ``max_steps`` ends the training within an epoch."""
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True  # which Lightning validates before

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse what isn't finite, complete the mean over accumulated batches; a new stage gets a fresh optimiser."""
        self.distillation.drop_zero_gradients()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not self._is_finite(gradients):
            self.window.abandon()
            optimizer.zero_grad(set_to_none=True)  # without gradients it changes neither weights nor its own state
        elif self.window.waiting:
            torch._foreach_mul_(gradients, self.window.close(self.trainer.accumulate_grad_batches))
        if self.timeline.starts_anew(self.global_step):
            optimizer.state.clear()

    def _is_finite(self, gradients: list[Tensor]) -> bool:
        scaler, step = getattr(self.trainer.precision_plugin, "scaler", None), self.step

        def spoilt(batch: Mapping[str, Tensor]) -> list[str]:
            with self.trainer.precision_plugin.train_step_context():
                return self.distillation.spoilt_terms(batch, step)

        scale = None if scaler is None else scaler.get_scale
        return self._finite.check(gradients, self.global_step, self.current_epoch, spoilt, scale)

    # Evaluation: the student alone

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of one validation set."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of one test set."""
        self._evaluate("test", batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Look at what was predicted."""
        self.evaluation.look(self.metrics, quiet=self.trainer.sanity_checking)

    def on_test_epoch_end(self) -> None:
        """Look at what was predicted."""
        self.evaluation.look(self.metrics)

    def _evaluate(self, stage: Literal["val", "test"], batch: Mapping[str, Any], dataloader_idx: int) -> None:
        sets = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        name = self.evaluation.name(stage, dataloader_idx, len(sets))
        step = self.timeline.yardstick(max(0, self.global_step - 1))
        measures, is_new = self.evaluation.measure(self.metrics, name, real_labels(batch), self.distillation, step)
        if is_new:
            self._metric_attributes = None  # Lightning remembers where metrics are; it has to look again
        # Each by itself: Lightning then computes and resets them at the epoch's end, over all ranks.
        for key, metric in measures.logged().items():
            shown = stage == "val" and (key != "loss" or measures.terms is not None)
            self.log(f"{name}/{key}", metric, shown, on_step=False, on_epoch=True, add_dataloader_idx=False)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return row ids, labels, logits and predictions: a class, a number, or 0 and 1 for each of several labels."""
        logits = check_predicted(self({key: value for key, value in batch.items() if key != "labels"}))
        prediction = {"logits": logits, "prediction": self.evaluation.predictions(logits)}
        return {key: batch[key] for key in ("row_id", "labels") if key in batch} | prediction

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the projections apart from the student, and note what makes the student loadable by itself."""
        write(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the projections that this run has, and what a training that goes on needs."""
        self._resumed = restore(self, checkpoint, fits=self._is_fitting, measures=self._measures_terms)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Build a module and load the weights of a checkpoint; see Lightning's method of this name for its arguments.

        Raises:
            CheckpointError: it is no local file of tensors and plain values, or it is damaged.
        """
        load(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the weights of a checkpoint.

        Raises:
            CheckpointError: they are of another model.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise CheckpointError(
                "The checkpoint is of another student than this run's. Build the student as the run did that wrote it, "
                f"with the same 'model' part of the configuration. {str(error).splitlines()[1].strip()[:200]} ..."
            ) from error
