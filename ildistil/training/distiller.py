"""The LightningModule around the engine: optimiser, logging, metrics, checkpoints, the plan."""

import inspect
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from torchmetrics import MetricCollection
from transformers import PreTrainedModel

from ildistil import distributed, stages
from ildistil.capture import ModelInfo, unwrapped
from ildistil.engine.balance import Balance
from ildistil.engine.distillation import Distillation, DryRun, Terms, check_label_order
from ildistil.errors import CaptureError, ConfigError, NotFiniteError, ObjectiveError, TargetsError
from ildistil.metrics import metric_collection
from ildistil.objectives.base import Objective
from ildistil.schedules import Schedule
from ildistil.stages import Stage, Timeline
from ildistil.teachers.stored import StoredTeacher
from ildistil.training.plan import describe

__all__ = ["Distiller"]

_PROJECTIONS = "distillation.projections."


class Distiller(L.LightningModule):
    """Trains a student by the objectives among the Trainer's callbacks.

    Args:
        student: the model to train, for instance ``init_student(teacher, layers=[1, 2, 3])``.
        teacher: the frozen model; ``None`` when no objective needs one (plain fine-tuning with ``TaskLoss``).
        learning_rate: peak learning rate of AdamW.
        weight_decay: of all parameters but biases and norms.
        warmup: share of all steps in which the learning rate rises linearly from 0.
        schedule: what it does then: fall to 0 (``"linear"``, ``"cosine"``) or stay (``"constant"``).
        stages: stages of the training, in their order, each with some of the objectives; their epochs must add up to
            the Trainer's. Learning rate, warm-up and optimiser start anew with each; early stopping and the best
            checkpoint watch the last.
        balance: makes the objectives' weights shares of the total; by default they are plain factors.
        compile: compile the training runs of both models with ``torch.compile``.
        tokenizer: name or folder of the tokenizer; the data module falls back to it, and the exported student gets
            it. Default: the teacher's, else the student's ``name_or_path``.

    Before training starts, the plan is printed and a dry run of one batch proves every term finite. Validation and
    test report the data module's metrics (``val/accuracy`` ...); without a data module, accuracy or the correlations.
    Checkpoints hold the student and the projections, never the teacher.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        stages: Sequence[Stage] = (),
        balance: Balance | None = None,
        compile: bool = False,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__()
        if not learning_rate > 0 or weight_decay < 0 or not 0 <= warmup < 1:
            raise ConfigError(
                "learning_rate must be > 0, weight_decay >= 0 and warmup a share of all steps in [0, 1); got "
                f"{learning_rate}, {weight_decay} and {warmup}."
            )
        if schedule not in _SCHEDULES:
            raise ConfigError(f"schedule must be one of {sorted(_SCHEDULES)}, got {schedule!r}.")
        self.distillation = Distillation(student, teacher, balance=balance)
        self.learning_rate, self.weight_decay, self.warmup, self.schedule = (
            learning_rate, weight_decay, warmup, schedule,
        )  # fmt: skip
        self.stages = list(stages)
        self.compile_models = compile
        self.tokenizer_source = tokenizer or _source(teacher) or _source(student)
        self.metrics = nn.ModuleDict()
        self._names: dict[str, list[str]] = {"val": [], "test": []}
        self._make_metrics: Callable[[], MetricCollection] | None = None
        self._frozen: list[nn.Parameter] = []
        self._structural: DryRun | None = None
        self._timeline = Timeline((), math.inf)
        self._all_callbacks: list[Callback] = []
        self._window: _Window | None = None
        # Total, terms and row ids of the batches that are not applied yet.
        self._unchecked: list[tuple[Tensor, dict[str, Tensor], Any]] = []
        if isinstance(teacher, StoredTeacher):
            # As the instance's own, since Lightning warns of every class that has this hook beside a data module.
            # Where the data module has it, targets are read in the step.
            warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
            self.on_before_batch_transfer = self._read_targets  # type: ignore[method-assign]

    @property
    def student(self) -> nn.Module:
        """The model being trained."""
        return self.distillation.student

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen model."""
        return self.distillation.teacher

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the student."""
        known = self.distillation.student_inputs(batch)
        return self.student(**known)

    # Before training

    def setup(self, stage: str) -> None:
        """Check that data and student fit, and make the metrics."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            _check_data(data, unwrapped(self.student))
            if stage == "fit" and isinstance(self.teacher, StoredTeacher):
                self.teacher.check_data(data)
        if stage == "test":
            self._names["test"] = list(getattr(data, "test_names", None) or ["test"])
        elif stage in ("fit", "validate"):
            self._names["val"] = list(getattr(data, "validation_names", None) or ["val"])
        make = getattr(data, "metrics", None)
        self._make_metrics = make if callable(make) else _default_metrics(unwrapped(self.student))
        self.metrics = nn.ModuleDict()

    def configure_model(self) -> None:
        """Take the objectives from the Trainer's callbacks; quiet without a Trainer, and repeatable."""
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._unfreeze()
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        self.distillation.set_objectives([c for c in callbacks if isinstance(c, Objective)])
        if self.stages:
            stages.check(self.stages, self.distillation.objectives)
            _check_epochs(self.trainer, self.stages)
            _check_checkpoints(callbacks)
        self._check_accumulation()
        self._structural = self._try_synthetic_batch()
        if self._structural is not None:
            self._freeze(self._structural.unreached)
        balance = self.distillation.balance
        if self.compile_models and balance is not None and balance.by == "gradient":
            # Each term has a backward pass of its own through the compiled student, which then must keep its buffers.
            torch._functorch.config.donated_buffer = False
        if self.compile_models:
            self.distillation.compile()

    def _try_synthetic_batch(self) -> DryRun | None:
        try:
            batch = self.distillation.synthetic_batch()  # runs a teacher of whose targets nothing is known yet
            return None if batch is None else self.distillation.dry_run(batch)
        except (ObjectiveError, CaptureError):
            raise
        except Exception as error:
            # Not our complaint but the model's, about a batch that we made up: the first real one will tell.
            rank_zero_info(f"The dry run on a synthetic batch was skipped, the model refused it: {error}")
            return None

    def _freeze(self, parameters: list[nn.Parameter]) -> None:
        # DDP waits for the gradient of every parameter that requires one, so what no term reaches must not. This has
        # to happen before DDP wraps the module; it is undone only when training is over.
        for parameter in parameters:
            parameter.requires_grad_(False)
        self._frozen += parameters

    def on_train_start(self) -> None:
        """Dry-run the first batch and print the plan."""
        self.distillation.train()
        self._window, self._unchecked = None, []  # a run that failed may have left one half filled
        self._watch_last_stage()
        if isinstance(self.teacher, StoredTeacher):
            self.teacher.begin()
        batch = self._first_batch()
        with self.trainer.precision_plugin.train_step_context():
            found = self._structural if batch is None else self._try_first_batch(batch)
        if found is not None and self._structural is not None:
            found = DryRun(found.terms, self._structural.unreached)
        rank_zero_info(describe(self.distillation, found, self.stages))

    def _try_first_batch(self, batch: Any) -> DryRun | None:
        try:
            return self.distillation.dry_run(batch)
        except TargetsError:
            if isinstance(self.teacher, StoredTeacher) and not self.teacher.grows:
                # They are the data set's first rows, not the loader's: a sampler may leave them out. If the loader's
                # own rows are missing too, the first step says so.
                return self._structural
            raise

    def _first_batch(self) -> Any | None:
        loader: Any = self.trainer.train_dataloader
        dataset: Any = getattr(loader, "dataset", None)
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not len(dataset):
            return None  # a stream: taking a batch would lose it
        # Neither through the loader nor its sampler: they may hold random states and workers of their own.
        size = getattr(loader.batch_sampler, "batch_size", None) or 2
        with isolate_rng():
            batch = loader.collate_fn([dataset[row] for row in range(min(8, size, len(dataset)))])
        return self.trainer.strategy.batch_to_device(batch, self.device)

    def teardown(self, stage: str) -> None:
        """Make what was frozen for this run trainable again, and give the models their plain attention back."""
        if stage == "fit":
            self.give_back()

    def give_back(self) -> None:
        """Leave the models as they came; the objectives call it when a run fails, as Lightning skips ``teardown``."""
        self._unfreeze()
        self._give_back_callbacks()
        self.distillation.detach()
        if isinstance(self.teacher, StoredTeacher):
            self.teacher.flush()

    def _unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()

    # Training

    def _read_targets(self, batch: Any, dataloader_idx: int) -> Any:
        """Read the stored targets of a training batch before it goes to its device."""
        if self._trainer is None or not self.trainer.training:
            return batch
        place = self._timeline.place(self.global_step)
        names = self._timeline.names(self.global_step)
        return self.distillation.with_targets(batch, step=self.global_step, progress=place.progress, only=names)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Give the weighted sum of the terms."""
        step = self.global_step
        place, names = self._timeline.place(step), self._timeline.names(step)
        terms: Terms = self.distillation(batch, step=step, progress=place.progress, only=names)
        values = {name: value.detach() for name, value in terms.values.items()}
        self._unchecked.append((terms.total.detach(), values, batch.get("row_id")))
        logs, size = terms.logs("train"), _batch_size(batch)
        self.log("train/loss", logs.pop("train/loss"), prog_bar=True, batch_size=size)
        self.log_dict(logs, batch_size=size)
        if self.stages:
            # Filled on the device: copying a number there would wait for it.
            self.log("train/stage", torch.full((), place.stage + 1.0, device=self.device), batch_size=size)
        return self._exact(terms)

    def _exact(self, terms: Terms) -> Tensor:
        """Give what to differentiate, so that the step is the mean over all examples of all its batches.

        Lightning divides by the number of accumulated batches and averages over processes, which is the mean only where
        all batches count equally many. One batch a step: each term is scaled by its count over that of all processes.
        Several: the later ones' counts aren't known yet, so see :class:`_Window`.
        """
        accumulated, processes = self.trainer.accumulate_grad_batches, self.trainer.world_size
        if accumulated == 1:
            if processes == 1:
                return terms.total
            counts = terms.count_values()
            factors = counts * processes / distributed.all_reduce_sum(counts).clamp(min=1)
            return terms.sum(dict(zip(terms.counts, factors, strict=True)))
        self._window = self._window or _Window()
        return terms.sum(self._window.add(terms))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a loss that isn't finite, complete the mean over accumulated batches, unset zero gradients.

        A new stage gets a fresh optimiser.
        """
        self._check_finite()
        self.distillation.drop_zero_gradients()
        if self._window is not None and self._window.is_open:
            factor = self._window.close(self.trainer.accumulate_grad_batches, self.trainer.world_size)
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
        if self._timeline.starts_anew(self.global_step):
            optimizer.state.clear()

    def on_train_epoch_start(self) -> None:
        """Let early stopping and the best checkpoint watch from the last stage on; share new targets."""
        self._watch_last_stage()
        if isinstance(self.teacher, StoredTeacher) and self.teacher.grows:
            self.trainer.strategy.barrier()  # the others have written theirs
            self.teacher.refresh()

    def on_train_epoch_end(self) -> None:
        """Write the targets that this epoch made."""
        if isinstance(self.teacher, StoredTeacher):
            self.teacher.end_epoch()

    def _watch_last_stage(self) -> None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if self._timeline.is_last(self.global_step):
            self._give_back_callbacks()
        elif not self._all_callbacks:
            self._all_callbacks = list(callbacks)
            callbacks[:] = [c for c in callbacks if not _watches(c)]

    def _give_back_callbacks(self) -> None:
        if self._all_callbacks:
            callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
            callbacks[:] = self._all_callbacks + [c for c in callbacks if c not in self._all_callbacks]
            self._all_callbacks = []

    def _check_accumulation(self) -> None:
        coupled = [name for name, o in self.distillation.objectives.items() if o.batch_coupled]
        if coupled and self.trainer.accumulate_grad_batches > 1:
            raise ObjectiveError(
                f"{coupled[0]} compares the examples of a batch with each other, so that "
                f"{self.trainer.accumulate_grad_batches} accumulated batches are not one large batch. Use "
                "accumulate_grad_batches=1 with larger batches or more devices, or leave this objective out."
            )

    def _check_finite(self) -> None:
        """Look at the totals of all batches of an optimiser step, once: every look waits for the device."""
        batches, self._unchecked = self._unchecked, []
        if not batches:
            return  # a step that a subclass makes by itself
        finite = torch.stack([torch.isfinite(total) for total, _, _ in batches])
        # All processes stop together: the others would apply the gradients that this one has spoilt.
        if distributed.all_reduce_sum((~finite).sum()) == 0:
            return
        where, what = "", "in another process"
        for total, values, rows in batches:
            if not torch.isfinite(total):
                where = f", row ids {rows.tolist()}" if isinstance(rows, Tensor) else ""
                bad = {name: value for name, value in values.items() if not torch.isfinite(value)} or {"total": total}
                what = ", ".join(f"{name} = {value.item()}" for name, value in bad.items())
                break
        raise NotFiniteError(
            f"The loss is not finite at step {self.global_step} (epoch {self.current_epoch}{where}): {what}. "
            "Nothing of this step was applied. Try a lower learning rate, gradient clipping, or bf16 instead of fp16."
        )

    def configure_optimizers(self) -> Any:
        """AdamW, its learning rate set at every step; biases and norms don't decay."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        fused = all(p.device.type in ("cpu", "cuda") for p in trained)
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=self.learning_rate, fused=True if fused else None
        )
        # A fused optimiser offers to unscale float16 gradients while it steps, and Lightning then refuses to clip, in
        # bfloat16 too. Without the offer gradients are unscaled before they are completed, clipped and applied.
        optimizer._step_supports_amp_scaling = False
        steps = self.trainer.estimated_stepping_batches
        steps = math.inf if steps < 0 else steps  # a stream without max_steps
        if not math.isfinite(steps) and self.stages:
            raise ConfigError("Stages last whole epochs, and the data's length isn't known. Use data with a length.")
        if not math.isfinite(steps) and (self.schedule != "constant" or self._has_schedules()):
            what = "a weight's schedule" if self.schedule == "constant" else f"schedule={self.schedule!r}"
            raise ConfigError(
                f"{what} needs to know the number of steps. Set the Trainer's max_epochs or max_steps, or use "
                "schedule='constant' and plain weights."
            )
        self._timeline = Timeline(self.stages, steps)
        self._check_gaps()
        factor = self._timeline.factor(self.learning_rate, _shape(self.schedule, self.warmup))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _has_schedules(self) -> bool:
        return any(isinstance(o.weight, Schedule) for o in self.distillation.objectives.values())

    def _check_gaps(self) -> None:
        """Refuse a training that comes to a step without any term."""
        if not self._has_schedules():
            return
        for number, (names, steps) in enumerate(self._timeline.parts(), start=1):
            checked = int(min(steps, 100_000))
            for i in range(checked):
                if not self.distillation.weights_at(i / checked, names):
                    where = f" of stage {number}" if self.stages else ""
                    raise ObjectiveError(
                        f"At {i / checked:.1%}{where} of the training all terms have weight 0: nothing would be "
                        "learned. Let the schedules overlap."
                    )

    # Evaluation: the student alone

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of one validation set."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of one test set."""
        self._evaluate("test", batch, dataloader_idx)

    def _evaluate(self, stage: str, batch: Mapping[str, Any], dataloader_idx: int) -> None:
        names = self._names[stage]
        name = names[dataloader_idx] if dataloader_idx < len(names) else f"{stage}_{dataloader_idx}"
        if "labels" not in batch:
            raise ConfigError(
                f"The {name} set has no labels, so there is nothing to measure. Use 'predict' for unlabelled rows."
            )
        output = self(batch)
        size = _batch_size(batch)
        options: dict[str, Any] = {"batch_size": size, "add_dataloader_idx": False, "on_step": False, "on_epoch": True}
        if getattr(output, "loss", None) is not None:
            self.log(f"{name}/loss", output.loss, sync_dist=True, **options)
        if self._make_metrics is not None:
            if name not in self.metrics:
                self.metrics[name] = self._make_metrics().to(self.device)
                self._metric_attributes = None  # Lightning remembers where metrics are; it has to look again
            metrics = self.metrics[name]
            assert isinstance(metrics, MetricCollection)
            metrics.update(_predictions(output.logits), batch["labels"])
            # Each by itself: Lightning then computes and resets them at the epoch's end, over all ranks.
            for key, metric in metrics.items(keep_base=True):
                self.log(f"{name}/{key}", metric, prog_bar=stage == "val", **options)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Give row ids, logits and predictions (a class index, or a number for regression)."""
        logits = self({key: value for key, value in batch.items() if key != "labels"}).logits
        prediction = {"logits": logits, "prediction": _predictions(logits)}
        return {"row_id": batch["row_id"], **prediction} if "row_id" in batch else prediction

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the projections apart from the student, and note what makes the student loadable by itself."""
        weights = checkpoint["state_dict"]
        projections = {key: weights.pop(key) for key in list(weights) if key.startswith(_PROJECTIONS)}
        for key in [key for key in weights if key.startswith("metrics.")]:
            del weights[key]
        checkpoint["ildistil"] = {
            "projections": projections,
            "objectives": {name: _specification(o) for name, o in self.distillation.objectives.items()},
            "student": _recipe(unwrapped(self.student)),
            "tokenizer": self.tokenizer_source,
            "teacher": _source(self.teacher),
            "metrics": self._evaluated(),
            "stages": _stage_lines(self.stages),
            "balance": {} if self.distillation.balance is None else self.distillation.balance.state_dict(),
        }

    def _evaluated(self) -> dict[str, float]:
        seen = {} if self._trainer is None else self.trainer.callback_metrics
        return {key: float(value) for key, value in seen.items() if key.split("/")[0] in self._names["val"]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the projections that this run has, and name differences when training goes on."""
        saved = checkpoint.get("ildistil", {})
        own = {key: value for key, value in self.state_dict().items() if key.startswith(_PROJECTIONS)}
        projections = saved.get("projections", {})
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            _compare(
                saved.get("objectives", {}), {n: _specification(o) for n, o in self.distillation.objectives.items()}
            )
            _compare(saved.get("stages", {}), _stage_lines(self.stages))
            if projections.keys() != own.keys():
                raise ConfigError(
                    "This checkpoint was made with other projections, so its optimiser state doesn't fit: it has "
                    f"{_names_of(projections)}, this run {_names_of(own)}. Resume with the same objectives, or start a "
                    "new run from its student (ildistil export)."
                )
            if self.distillation.balance is not None:
                self.distillation.balance.load_state_dict(saved.get("balance", {}))
        checkpoint["state_dict"] |= {key: projections.get(key, value) for key, value in own.items()}


def _source(model: nn.Module | None) -> str | None:
    return getattr(model, "name_or_path", None) or None


def _batch_size(batch: Mapping[str, Any]) -> int:
    return next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))


def _predictions(logits: Tensor) -> Tensor:
    return logits.squeeze(-1).float() if logits.shape[-1] == 1 else logits.argmax(-1)


def _default_metrics(student: nn.Module) -> Callable[[], MetricCollection] | None:
    sizes = ModelInfo.of(student)
    labels = sizes.labels
    if labels is None or sizes.problem_type == "multi_label_classification":
        return None
    return lambda: metric_collection(("pearson", "spearman") if labels == 1 else ("accuracy",), labels)


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


_SCHEDULES: dict[str, Callable[[float], float]] = {"linear": _linear, "cosine": _cosine, "constant": lambda _: 1.0}


def _shape(schedule: str, warmup: float) -> Callable[[int, float], float]:
    """The learning rate at a step of a stage, as a factor of its peak."""
    after = _SCHEDULES[schedule]

    def at(step: int, steps: float) -> float:
        if not math.isfinite(steps):
            return 1.0
        rise = round(warmup * steps)
        # step + 1: the very first step must not be lost to a learning rate of zero.
        return (step + 1) / (rise + 1) if step < rise else after((step - rise) / max(1, steps - rise))

    return at


def _check_checkpoints(callbacks: Sequence[Callback]) -> None:
    checkpoints = [c for c in callbacks if isinstance(c, ModelCheckpoint)]
    if checkpoints and all(_watches(c) for c in checkpoints):
        rank_zero_warn(
            "Every ModelCheckpoint monitors a metric, so none is written before the last stage. To be able to resume "
            "in an earlier one, add ModelCheckpoint(filename='last')."
        )


def _watches(callback: Callback) -> bool:
    """Whether it stops, or keeps a best checkpoint, by a metric."""
    return isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None


class _Window:
    """Makes the mean over the accumulated batches of one optimiser step.

    Each batch's terms are scaled by their counts, in units of what a batch counts on average; at the end the gradient
    is divided by the sum of the counts. There is one gradient, so there can be one sum: that of the examples. Where a
    term counts something else (target tokens beside examples), its batches are weighed exactly against each other, and
    its weight against the other terms is off by how far the window differs from the average.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of the counts of all batches before this window, over all processes
        self._batches: dict[str, Tensor] = {}
        self._now: dict[str, list[Tensor]] = {}
        self.is_open = False

    def add(self, terms: Terms) -> dict[str, Tensor]:
        """Note the counts of one batch, and give the factors of its terms."""
        counts = {**dict(zip(terms.values, terms.count_values(), strict=True)), "": terms.common_count()}
        if counts.keys() != self._sums.keys():  # other terms: averages of one history, so that equal counts stay equal
            self._sums, self._batches = {}, {}
            self._learn({name: [count] for name, count in counts.items()})
        for name, count in counts.items():
            self._now.setdefault(name, []).append(count)
        self.is_open = True
        return {name: count / self._unit(name) for name, count in counts.items() if name}

    def close(self, accumulated: int, processes: int) -> Tensor:
        """Give the factor that makes Lightning's mean over batches and processes the mean over what was counted."""
        whole = distributed.all_reduce_sum(torch.stack(self._now[""]).sum()).clamp(min=1) / self._unit("")
        self._learn(self._now)
        self._now, self.is_open = {}, False
        return accumulated * processes / whole

    def _unit(self, name: str) -> Tensor:
        known = torch.where(self._sums[name] > 0, self._sums[name], self._sums[""])
        return (known / self._batches[name]).clamp(min=1)

    def _learn(self, counts: Mapping[str, list[Tensor]]) -> None:
        """Take counts into the average, the same in all processes."""
        seen = torch.stack([torch.stack(own).sum() for own in counts.values()])
        number = torch.stack([seen.new_full((), len(own)) for own in counts.values()])
        for name, sum_, batches in zip(
            counts, distributed.all_reduce_sum(seen), distributed.all_reduce_sum(number), strict=True
        ):
            self._sums[name] = self._sums.get(name, 0) + sum_
            self._batches[name] = self._batches.get(name, 0) + batches


def _check_epochs(trainer: L.Trainer, stages: Sequence[Stage]) -> None:
    epochs = sum(stage.epochs for stage in stages)
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if trainer.max_epochs != epochs or trainer.max_steps != -1:
        limit = f"max_epochs={trainer.max_epochs}" if trainer.max_steps == -1 else f"max_steps={trainer.max_steps}"
        raise ConfigError(
            f"The stages last {epochs} epochs together, the Trainer has {limit}. Set max_epochs={epochs} and no "
            "max_steps."
        )


def _check_data(data: Any, student: nn.Module) -> None:
    """Compare what the data module says of itself with the student."""
    sizes = ModelInfo.of(student)
    labels = 1 if getattr(data, "regression", False) else getattr(data, "num_labels", None)
    if labels is not None and sizes.labels is not None and labels != sizes.labels:
        raise ConfigError(
            f"The data has {labels} labels, the models have {sizes.labels}. Fine-tune a teacher for this task first "
            "(ildistil finetune), or choose the data it was trained for."
        )
    check_label_order(student, [name.lower() for name in getattr(data, "label_names", None) or []], "the data")
    longest, positions = getattr(data, "max_length", None), sizes.positions
    if longest is not None and positions is not None and longest > positions:
        raise ConfigError(
            f"The data cuts texts at max_length={longest} tokens, the student has {positions} positions. Set "
            f"max_length={positions} or less."
        )


def _specification(objective: Objective) -> str:
    """Give the objective as one would write it: what differs from the defaults, and the weight."""
    parameters = inspect.signature(type(objective)).parameters
    values = {n: getattr(objective, n) for n in sorted(parameters) if n != "name" and hasattr(objective, n)}
    told = [f"{n}={v}" for n, v in values.items() if n == "weight" or v != parameters[n].default]
    return f"{type(objective).__name__}({', '.join(told)})"


def _stage_lines(chosen: Sequence[Stage]) -> dict[str, str]:
    return {f"stage {i}": f"{', '.join(s.objectives)}, {s.epochs} epochs" for i, s in enumerate(chosen, start=1)}


def _compare(saved: dict[str, str], now: dict[str, str]) -> None:
    lines = [
        f"  {name}: {saved.get(name, 'not there')} in the checkpoint, {now.get(name, 'not there')} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if lines:
        rank_zero_warn("Training goes on with other objectives or stages than the checkpoint's:\n" + "\n".join(lines))


def _names_of(projections: Mapping[str, Tensor]) -> list[str]:
    return sorted({key.removeprefix(_PROJECTIONS).split(".")[0] for key in projections}) or ["none"]


def _recipe(student: nn.Module) -> dict[str, Any] | None:
    """What rebuilds a transformers student without its teacher, in plain values."""
    if not isinstance(student, PreTrainedModel):
        return None
    return {"architecture": type(student).__name__, "config": json.loads(student.config.to_json_string(use_diff=False))}
