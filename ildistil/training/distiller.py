"""The LightningModule around the engine: Lightning's hooks, each handed on to the unit that does the work."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from ildistil.capture import ModelInfo, real_labels, unwrapped
from ildistil.data.task import task_of
from ildistil.engine import Balance, Distillation, DryRun
from ildistil.errors import CheckpointError, ConfigError, DataError
from ildistil.objectives import Objective
from ildistil.stages import Stage, Step, Timeline
from ildistil.teachers import Teacher
from ildistil.training import checks
from ildistil.training.accumulation import Window, over_processes
from ildistil.training.checkpoint import PROJECTIONS, Saved, recipe, specification, stage_lines
from ildistil.training.evaluation import Evaluation, batch_size, check_predicted
from ildistil.training.finite import FiniteSteps, NonFinite
from ildistil.training.lifecycle import Lifecycle
from ildistil.training.optimization import Optimization, Shape
from ildistil.training.plan import describe
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
    ) -> None:
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
        self.metrics = nn.ModuleDict()
        self.timeline = Timeline((), math.inf)
        self._evaluation = Evaluation(task_of(None), ModelInfo.of(student))
        self._lifecycle = Lifecycle()
        self._window, self._finite = Window(), FiniteSteps(non_finite)
        self._structural: DryRun | None = None

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
        """Check that data and student fit, and make the metrics."""
        task, info = task_of(self.trainer.datamodule), ModelInfo.of(self.student)  # type: ignore[attr-defined]
        checks.check_task(task, info)
        self._evaluation = Evaluation(task, info)
        self.metrics = nn.ModuleDict()

    def configure_model(self) -> None:
        """Take the objectives from the Trainer's callbacks; quiet without a Trainer, and repeatable."""
        if not self._is_fitting:
            return
        self._lifecycle.restore(self)
        self._window, self._finite = Window(), FiniteSteps(self._finite.non_finite)
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
    def _objectives(self) -> list[Objective]:
        return [c for c in self.trainer.callbacks if isinstance(c, Objective)]  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """Make AdamW, whose learning rate is set at every step."""
        optimizer = self.optimization.optimizer(self.parameters())
        steps = self.trainer.estimated_stepping_batches
        steps = math.inf if steps < 0 else steps  # a stream without max_steps
        scheduled = checks.has_schedules(self.distillation.objectives)
        if not math.isfinite(steps) and self.stages:
            raise ConfigError("Stages last whole epochs, and the data's length isn't known. Use data with a length.")
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
        """Dry-run the first batch and print the plan."""
        self.distillation.train()
        self._window.abandon()  # a run that failed may have left one half filled
        self._finite.abandon()
        with self.trainer.precision_plugin.train_step_context():
            found = try_first_batch(self.distillation, self.trainer) or self._structural
        if found is not None and self._structural is not None:
            found = DryRun(found.terms, self._structural.unreached)
        rank_zero_info(describe(self.distillation, found, self.stages))

    # Training

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Begin the step of a training batch before it goes to its device."""
        training = self._trainer is not None and self.trainer.training
        return self.distillation.prefetch(batch, self.step) if training else batch

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
        return over_processes(terms) if self.trainer.accumulate_grad_batches == 1 else self._window.add(terms)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Have the student measured after the last step where ``max_steps`` ends the training within an epoch."""
        if self.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True  # which Lightning validates before

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step that isn't finite, complete the mean over accumulated batches, unset zero gradients.

        A new stage gets a fresh optimiser.
        """
        self.distillation.drop_zero_gradients()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if not self._is_finite(gradients):
            self._window.abandon()
            optimizer.zero_grad(set_to_none=True)  # without gradients it changes neither weights nor its own state
        elif self._window.is_open:
            torch._foreach_mul_(gradients, self._window.close(self.trainer.accumulate_grad_batches))
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
        self._evaluation.look(self.metrics, quiet=self.trainer.sanity_checking)

    def on_test_epoch_end(self) -> None:
        """Look at what was predicted."""
        self._evaluation.look(self.metrics)

    def _evaluate(self, stage: Literal["val", "test"], batch: Mapping[str, Any], dataloader_idx: int) -> None:
        sets = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        name = self._evaluation.name(stage, dataloader_idx, len(sets))
        if "labels" not in batch:
            raise DataError(
                f"The {name} set has no labels, so there is nothing to measure. Use 'predict' for unlabelled rows."
            )
        batch = real_labels(batch)
        inputs, labels = self.distillation.student_inputs(batch), batch["labels"]
        output = self.student(**inputs)
        if name not in self.metrics:
            self.metrics[name] = self._evaluation.measures(labels).to(self.device)
            self._metric_attributes = None  # Lightning remembers where metrics are; it has to look again
        measures: Any = self.metrics[name]
        weight = self._evaluation.weight(unwrapped(self.student), inputs, labels, output.logits)
        measures.update(output, self._evaluation.predictions(output.logits, labels), labels, weight)
        # Each by itself: Lightning then computes and resets them at the epoch's end, over all ranks.
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "add_dataloader_idx": False}
        for key, metric in measures.logged():
            self.log(f"{name}/{key}", metric, prog_bar=stage == "val" and key != "loss", **options)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return row ids, logits and predictions: a class index, a number, or 0 and 1 for each of several labels."""
        logits = self({key: value for key, value in batch.items() if key != "labels"}).logits
        check_predicted(logits)
        prediction = {"logits": logits, "prediction": self._evaluation.predictions(logits)}
        return {"row_id": batch["row_id"], **prediction} if "row_id" in batch else prediction

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the projections apart from the student, and note what makes the student loadable by itself."""
        weights = checkpoint["state_dict"]
        projections = {key: weights.pop(key) for key in list(weights) if key.startswith(PROJECTIONS)}
        for key in [key for key in weights if key.startswith("metrics.")]:
            del weights[key]
        balance, seen = self.distillation.balance, {} if self._trainer is None else self.trainer.callback_metrics
        Saved(
            objectives=self._specifications(),
            stages=stage_lines(self.stages),
            projections=projections,
            student=recipe(unwrapped(self.student)),
            tokenizer=self.tokenizer_source,
            teacher=None if self.teacher is None else self.teacher.info.source,
            metrics=self._evaluation.measured(seen),
            balance={} if balance is None else balance.state_dict(),
            window=self._window.state_dict(),
        ).write(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the projections that this run has, and name differences when training goes on."""
        saved = Saved.read(checkpoint)
        own = {key: value for key, value in self.state_dict().items() if key.startswith(PROJECTIONS)}
        if self._is_fitting:
            saved.check_resumes(self._specifications(), stage_lines(self.stages), own)
            self._window.load_state_dict(saved.window)
            if self.distillation.balance is not None:
                self.distillation.balance.load_state_dict(saved.balance)
        checkpoint["state_dict"] |= {key: saved.projections.get(key, value) for key, value in own.items()}

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

    def _specifications(self) -> dict[str, str]:
        return {name: specification(objective) for name, objective in self.distillation.objectives.items()}
