"""The engine: one teacher run, one student run, all objectives. A plain ``nn.Module`` that needs no Trainer."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ildistil import distributed
from ildistil.capture import Activations, Capture, Layers, ModelInfo, Tap, model_inputs, separate_configs, unwrapped
from ildistil.capture.inputs import TARGETS
from ildistil.engine.balance import Balance
from ildistil.engine.synthetic import synthetic_batch
from ildistil.errors import ModelError, ObjectiveError
from ildistil.objectives.base import Objective
from ildistil.schedules import Schedule
from ildistil.teachers.layout import wanted_targets
from ildistil.teachers.stored import StoredTeacher
from ildistil.teachers.stored_capture import StoredCapture

__all__ = ["Distillation", "DryRun", "TermCheck", "Terms"]

_NOTHING = Activations(Layers({}, 0, "hidden"), Layers({}, 0, "attention"), torch.empty(0, 0, dtype=torch.bool), None)

_NO_OBJECTIVE = (
    "There is no objective. Give at least one, such as objectives.LogitsKL(): as a callback of the Trainer, in a YAML "
    "file under 'objectives:', or to Distillation(...)."
)


@dataclass
class Terms:
    """The terms of one step.

    ``values`` are unweighted, ``total`` is ``sum(weight * value)``; ``counts`` says how many examples each value is a
    mean of, or how many target tokens for those named in ``of_tokens``; ``gradients`` holds the share of each term's
    gradient norm, where these are balanced. Not frozen: Fabric converts what a module returns.
    """

    values: dict[str, Tensor]
    weights: dict[str, float | Tensor]
    counts: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    of_tokens: frozenset[str] = frozenset()

    @cached_property
    def total(self) -> Tensor:
        """The weighted sum, to call ``backward()`` on."""
        return self.sum({})

    def sum(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Give ``sum(factor * weight * value)``; a factor that isn't given is 1."""
        weighted = [self.weights[name] * value * factors.get(name, 1.0) for name, value in self.values.items()]
        return sum(weighted[1:], start=weighted[0])

    def count_values(self) -> Tensor:
        """Stack the counts in the terms' order, at least in float32."""
        dtypes = {name: torch.promote_types(value.dtype, torch.float32) for name, value in self.values.items()}
        return torch.stack([self.counts[name].to(dtype) for name, dtype in dtypes.items()])

    def common_count(self) -> Tensor:
        """Give what the whole is a mean of: examples, or target tokens where no term counts examples."""
        counts = dict(zip(self.values, self.count_values(), strict=True))
        examples = [count for name, count in counts.items() if name not in self.of_tokens]
        return torch.stack(examples or list(counts.values())).max()

    def shares(self) -> dict[str, Tensor]:
        """Give each term's share of the total: ``|weight * value| / sum``; detached."""
        sizes = {name: (self.weights[name] * value.detach()).abs() for name, value in self.values.items()}
        whole = torch.stack(list(sizes.values())).sum().clamp(min=torch.finfo(torch.float32).tiny)
        return {name: size / whole for name, size in sizes.items()}

    def logs(self, prefix: str) -> dict[str, Tensor]:
        """Give what to log: the total, every term unweighted, and with several terms their shares; detached."""
        logs = {f"{prefix}/loss": self.total.detach()}
        logs |= {f"{prefix}/{name}": value.detach() for name, value in self.values.items()}
        if len(self.values) > 1:
            logs |= {f"{prefix}/share/{name}": share for name, share in self.shares().items()}
            logs |= {f"{prefix}/gradient_share/{name}": share for name, share in self.gradients.items()}
        return logs


@dataclass(frozen=True)
class TermCheck:
    """What a dry run found of one term: its value and the norm of its gradient."""

    value: float
    gradient: float


@dataclass(frozen=True)
class DryRun:
    """What a dry run found: each term, and the parameters no term reaches."""

    terms: dict[str, TermCheck]
    unreached: list[nn.Parameter] = field(repr=False, default_factory=list)


class Distillation(nn.Module):
    """Runs a frozen teacher and a student on a batch and gives the objectives' terms.

    Args:
        student: the model to train; trainable parameters of this module are its own and the objectives' projections.
        teacher: the frozen model, or ``None`` if no objective needs one. It is switched to eval mode and its
            parameters' gradients off; it is not a registered child, so it is in no checkpoint, optimiser or DDP
            bucket, but moves along with ``.to(...)``. A :class:`~ildistil.teachers.StoredTeacher` takes its place.
        objectives: the terms; several, with different names. May be set later by :meth:`set_objectives`.
        balance: what makes weights mean shares of the total; by default they are plain factors.

    Raises:
        ObjectiveError: no objective runs with these models; the message says why and what to do.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> from ildistil import init_student, objectives
    >>> tiny = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}
    >>> teacher = BertForSequenceClassification(BertConfig(num_hidden_layers=4, **tiny))
    >>> student = init_student(teacher, layers=[2, 4])
    >>> distill = Distillation(student, teacher, [objectives.HiddenMSE(), objectives.TaskLoss(weight=0.5)])
    >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([1])}
    >>> terms = distill(batch)
    >>> terms.total.backward()
    >>> sorted(terms.values)
    ['hidden_mse', 'task_loss']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        objectives: Iterable[Objective] | Mapping[str, Objective] = (),
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        if teacher is not None:
            _check_two_models(student, teacher)
            separate_configs(unwrapped(student), unwrapped(teacher))
            teacher.requires_grad_(False).eval()
        # from_pretrained returns eval mode, and Lightning keeps the mode it finds: start as this module is, in train.
        self.student = student.train(self.training)
        self._teacher = (teacher,)  # inside a tuple it is no registered child
        self.projections = nn.ModuleDict()
        self.objectives: dict[str, Objective] = {}
        self._student_capture: Capture | None = None
        self._teacher_capture: Capture | StoredCapture | None = None
        self._positions: int | None = None
        self._verified: set[tuple[str, Tap]] = set()
        self._reach: dict[str, set[int]] = {}
        self._attached: list[nn.Parameter] = []
        self._step: int | None = None
        self._compile_options: dict[str, Any] | None = None
        self.balance = copy.deepcopy(balance)  # it holds what it measured of these models
        self._hooked: frozenset[str] = frozenset()
        if objectives:
            self.set_objectives(objectives)

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen teacher."""
        return self._teacher[0]

    def set_objectives(self, objectives: Iterable[Objective] | Mapping[str, Objective]) -> None:
        """Set the terms: check them, make their projections, and prepare the capture. Nothing is run.

        Calling it again with the same objects changes nothing, so that projections keep what they learned.
        """
        named = _named(objectives)
        if named == self.objectives:
            return
        self.release()
        student = ModelInfo.of(self.student)
        teacher = student if self.teacher is None else ModelInfo.of(self.teacher)
        self._positions = min((s.positions for s in (student, teacher) if s.positions is not None), default=None)
        for name, objective in named.items():
            if objective.needs_teacher and self.teacher is None:
                raise ObjectiveError(f"{name} ({type(objective).__name__}) needs a teacher, and there is none.")
            objective.claim(self)
            objective.projections = nn.ModuleDict()
            objective.build(student, teacher)
            _check_learned_parts(objective)
        reference = next(self.student.parameters(), torch.empty(0))
        self.projections = nn.ModuleDict(
            {name: objective.projections for name, objective in named.items() if len(objective.projections)}
        ).to(reference.device, reference.dtype)
        self.objectives, self._reach = named, {}
        try:
            self.attach()
        except BaseException:
            self.release()
            raise

    def attach(self) -> None:
        """Put the hooks on both models; done by :meth:`set_objectives`, and again by a step after :meth:`detach`."""
        self.detach()
        self._hooked = frozenset(name for name, o in self.objectives.items() if o.weight != 0)
        used = [self.objectives[name] for name in self._hooked]
        sizes = ModelInfo.of(self.student)
        wanted = {tap for o in used for tap in o.student_wants(sizes)}
        self._student_capture = Capture(self.student, wanted, "student")
        if self.teacher is not None:
            sizes = ModelInfo.of(self.teacher)
            targets = wanted_targets(used, sizes)
            if targets and isinstance(self.teacher, StoredTeacher):
                self._teacher_capture = StoredCapture(self.teacher, targets)
            else:
                self._teacher_capture = Capture(self.teacher, targets, "teacher") if targets else None
        self._compile_captures()
        self._verified = set()

    def compile(self, **options: Any) -> None:
        """Compile the runs of both models, with the options of ``torch.compile``; the losses stay as they are."""
        self._compile_options = options
        self._compile_captures()

    def _compile_captures(self) -> None:
        if self._compile_options is not None:
            for capture in (self._student_capture, self._teacher_capture):
                if isinstance(capture, Capture):
                    capture.compile(**self._compile_options)

    def detach(self) -> None:
        """Take the hooks off both models, and give them their plain attention back; objectives and projections stay."""
        for capture in (self._student_capture, self._teacher_capture):
            if capture is not None:
                capture.close()
        self._student_capture = self._teacher_capture = None

    def release(self) -> None:
        """Take the hooks off both models and forget the objectives."""
        self.detach()
        for objective in self.objectives.values():
            objective.claim(None)
        self.projections, self.objectives = nn.ModuleDict(), {}

    def forward(
        self,
        batch: Mapping[str, Any],
        *,
        step: int | None = None,
        progress: float | None = None,
        only: Collection[str] | None = None,
        verify: bool = False,
    ) -> Terms:
        """Run both models on a batch and give the terms whose weight is not 0.

        Args:
            batch: a mapping; each model gets the keys its ``forward`` names.
            step: number of the optimiser step, for objectives that draw something anew at every step.
            progress: how far training is, from 0 to 1, for weights that are schedules.
            only: names of the terms that take part; by default all do.
            verify: also check the attention masks, as a dry run does.
        """
        if not self.objectives:
            raise ObjectiveError(_NO_OBJECTIVE)
        if not isinstance(batch, Mapping):
            raise ObjectiveError(
                f"A batch must be a mapping of names to tensors, such as {{'input_ids': ..., 'labels': ...}}; got a "
                f"{type(batch).__name__}. Let the collate function give a dict."
            )
        _check_length(batch, self._positions)
        weights = self.weights_at(progress, only)
        if not weights:
            raise ObjectiveError(_no_weight(progress))
        active = {name: self.objectives[name] for name in weights}
        for objective in active.values():
            objective.begin(step)
        self._step = step
        values, counts = self._run(batch, active, verify)
        values = self._attach_unreached(values)
        if self.training:
            for objective in active.values():
                objective.remember()
        of_tokens = frozenset(name for name, objective in active.items() if objective.counts_tokens)
        if self.balance is None:
            return Terms(values, dict(weights), counts, of_tokens=of_tokens)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        measuring = self.training and torch.is_grad_enabled()
        balanced = self.balance.weights(values, weights, trained, step, measuring)
        return Terms(values, dict(balanced), counts, self.balance.gradient_shares(balanced), of_tokens)

    def weights_at(self, progress: float | None, only: Collection[str] | None = None) -> dict[str, float]:
        """Give the weights that are not 0 at a progress of training, by name.

        Args:
            progress: from 0 to 1; ``None`` is fine where no weight is a schedule.
            only: names of the terms that take part; by default all do.
        """
        if only is not None and (isinstance(only, str) or not set(only) <= self.objectives.keys()):
            raise ObjectiveError(f"only names some of the objectives {list(self.objectives)}, in a list; got {only!r}.")
        chosen = {n: o for n, o in self.objectives.items() if only is None or n in only}
        weights = {name: objective.weight_at(progress) for name, objective in chosen.items()}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _run(
        self, batch: Mapping[str, Any], active: Mapping[str, Objective], verify: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run both models, recording what the active terms want, and give their values and counts."""
        if self._student_capture is None or not active.keys() <= self._hooked:
            self.attach()  # for the first time, after detach(), or because somebody raised a weight from 0
        assert self._student_capture is not None
        teacher, targets = _NOTHING, dict[str, set[Tap]]()
        needing = {name: o for name, o in active.items() if o.needs_teacher}
        if self._teacher_capture is not None and needing:
            if self._teacher_capture.model.training:
                self._teacher_capture.model.eval()  # somebody switched it since; it must never drop out
            targets = {name: o.teacher_wants(self._teacher_capture.sizes) for name, o in needing.items()}
            with torch.no_grad(), _own_precision(self._teacher_capture.model):
                teacher = self._captured(self._teacher_capture, targets.values(), batch, verify)
        sizes = self._student_capture.sizes
        wants = [o.student_wants(sizes) for o in active.values()]
        student = self._captured(self._student_capture, wants, batch, verify)
        values, counts = {}, {}
        readers = {tap: name for name, wanted in targets.items() for tap in wanted}  # the last one of each
        for name, objective in active.items():
            for tap in targets.get(name, ()):
                if readers[tap] == name and tap.layer is not None:
                    teacher.layers(tap).last_reader(tap.layer)
            values[name] = objective.loss(student, teacher, batch)
            if values[name].ndim:
                raise ObjectiveError(f"The loss of {name} must be a scalar, got the shape {tuple(values[name].shape)}.")
            with torch.no_grad():
                one = torch.ones((), device=values[name].device)  # the same in all processes: the whole batch's already
                counts[name] = one if objective.batch_coupled else objective.count(student, batch)
        return values, counts

    def _captured(
        self, capture: Capture | StoredCapture, wants: Iterable[set[Tap]], batch: Mapping[str, Any], verify: bool
    ) -> Activations:
        wanted = frozenset[Tap]().union(*wants)
        # The first step checks the masks too, for those who never make a dry run; as plain code, or a compiled model
        # would be compiled once more for it.
        seen = {(capture.role, tap) for tap in wanted}
        verify = verify or not seen <= self._verified
        self._verified |= seen
        with torch.compiler.set_stance("force_eager") if verify and capture.is_compiled else nullcontext():
            return capture(batch, wanted=wanted, verify=verify)

    def _attach_unreached(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let every trainable parameter take part in the backward pass, which DDP waits for.

        Parameters that the active terms don't reach get gradients of zero; :meth:`drop_zero_gradients` removes them.
        """
        self._attached = []
        if distributed.world_size() == 1 or not self._reach or not torch.is_grad_enabled():
            return values
        reached = set().union(*(self._reach.get(name, set()) for name in values))
        self._attached = [p for p in self.parameters() if p.requires_grad and id(p) not in reached]
        first, *others = values
        attached: Tensor = _Attach.apply(values[first], *self._attached)  # type: ignore[no-untyped-call]
        return {first: attached, **{name: values[name] for name in others}}

    def drop_zero_gradients(self) -> None:
        """Unset the gradients of what the last step's terms don't reach, before the optimiser lets it decay."""
        for parameter in self._attached:
            parameter.grad = None

    def student_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Select what the student's ``forward`` names, labels included: for evaluation."""
        return model_inputs(unwrapped(self.student), batch)

    def dry_run(self, batch: Mapping[str, Any]) -> DryRun:
        """Run one step without a trace, and check that each term is finite and has finite gradients.

        All terms take part, also those whose weight is 0 at first. Random state, buffers, gradients and modes are
        afterwards what they were.

        Raises:
            ObjectiveError: a term is not finite, or reaches no trainable parameter.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        checks: dict[str, TermCheck] = {}
        reach: dict[str, set[int]] = {}
        used = {name: o for name, o in self.objectives.items() if o.weight != 0}
        for objective in used.values():
            objective.begin(self._step or 0)  # the step they are in: nothing is drawn or learned anew
        with _without_trace(self), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            values, _ = self._run(batch, used, verify=True)
            for name, value in values.items():
                gradients = _gradients(name, value, parameters)
                checks[name] = TermCheck(value.item(), _norm(gradients))
                reach[name] = {id(p) for p, g in zip(parameters, gradients, strict=True) if g is not None}
                _check_term(name, checks[name])
        self._reach = reach  # only now: a run that failed leaves what was known
        reached = set().union(*reach.values())
        return DryRun(checks, [p for p in parameters if id(p) not in reached])

    def synthetic_batch(self) -> dict[str, Any] | None:
        """Make two short sequences of unequal length, or ``None`` where the models' inputs aren't known."""
        batch: dict[str, Any] | None = synthetic_batch(unwrapped(self.student))
        if batch is not None and isinstance(self._teacher_capture, StoredCapture):
            batch[TARGETS] = self._teacher_capture.made_up(batch)
        return batch

    def with_targets(
        self,
        batch: Mapping[str, Any],
        *,
        step: int | None = None,
        progress: float | None = None,
        only: Collection[str] | None = None,
    ) -> Mapping[str, Any]:
        """Add the stored targets that a step will want to its batch, so that they move to its device along with it.

        Changes nothing where the teacher isn't stored, or has to run for this batch.

        Args:
            batch: the batch, best still on the CPU.
            step: see :meth:`forward`.
            progress: see :meth:`forward`.
            only: see :meth:`forward`.
        """
        if not isinstance(self.teacher, StoredTeacher) or not isinstance(batch, Mapping):
            return batch
        active = [self.objectives[name] for name in self.weights_at(progress, only)]
        for objective in active:
            objective.begin(step)
        wants = (o.teacher_wants(self.teacher.sizes) for o in active if o.needs_teacher)
        wanted = frozenset[Tap]().union(*wants)
        if not wanted:
            return batch
        if self._teacher_capture is None or not {o.name for o in active} <= self._hooked:
            self.attach()
        assert isinstance(self._teacher_capture, StoredCapture)
        targets = self._teacher_capture.read(batch, wanted)
        return batch if targets is None else {**batch, TARGETS: targets}

    @property
    def captured(self) -> dict[str, list[Tap]]:
        """What is recorded of each model."""
        captures = {"student": self._student_capture, "teacher": self._teacher_capture}
        order: Callable[[Tap], tuple[str, int]] = lambda tap: (tap.name, tap.layer or 0)  # noqa: E731
        return {role: sorted(c.wanted, key=order) for role, c in captures.items() if c is not None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the teacher along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _named(objectives: Iterable[Objective] | Mapping[str, Objective]) -> dict[str, Objective]:
    if isinstance(objectives, Mapping):
        for name, objective in objectives.items():
            objective.name = name
        objectives = objectives.values()
    if isinstance(objectives, Objective):
        raise ObjectiveError(f"Objectives come in a list: [{type(objectives).__name__}(...)].")
    named: dict[str, Objective] = {}
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise ObjectiveError(
                f"{objective!r} is not an objective. Give instances, such as objectives.LogitsKL(), or of your own "
                "subclass of Objective."
            )
        name = objective.name
        if not name or "." in name or "/" in name or name == "loss" or hasattr(nn.ModuleDict, name):
            raise ObjectiveError(
                f"An objective can't be named {name!r}: a name has no '.' or '/', isn't 'loss', and is no method of a "
                "ModuleDict, such as 'values'."
            )
        if name in named:
            raise ObjectiveError(
                f"Two objectives are named {name!r}. Name one of them: {type(objective).__name__}(..., name='...')."
            )
        named[name] = objective
    if not named:
        raise ObjectiveError(_NO_OBJECTIVE)
    _check_weights(named)
    return named


def _check_weights(named: Mapping[str, Objective]) -> None:
    if all(objective.weight == 0 for objective in named.values()):
        raise ObjectiveError("All objectives have weight 0: nothing would be learned.")
    for name, objective in named.items():
        if isinstance(objective.weight, Schedule):
            weights = [objective.weight(i / 100) for i in range(101)]
            if not all(0 <= weight < float("inf") for weight in weights):
                raise ObjectiveError(
                    f"The weight of {name}, {objective.weight}, is not always a finite number >= 0: it goes from "
                    f"{min(weights)} to {max(weights)}."
                )


def _check_length(batch: Mapping[str, Any], positions: int | None) -> None:
    tokens = batch.get("input_ids")
    if positions is not None and isinstance(tokens, Tensor) and tokens.shape[1] > positions:
        raise ModelError(
            f"A sequence of {tokens.shape[1]} tokens is longer than the models' {positions} positions. Cut the texts "
            f"at {positions} tokens (max_length={positions} in the data module, truncation in your tokenizer)."
        )


def _check_two_models(student: nn.Module, teacher: nn.Module) -> None:
    theirs = {id(p) for p in teacher.parameters()}
    if any(id(p) in theirs for p in student.parameters()):
        raise ModelError(
            "Student and teacher share parameters, so training the student would change the teacher. Make the student "
            "with init_student(teacher, ...) or copy.deepcopy(teacher)."
        )
    s, t = ModelInfo.of(student), ModelInfo.of(teacher)
    if None not in (s.vocabulary, t.vocabulary) and s.vocabulary != t.vocabulary:
        raise ModelError(
            f"The student's vocabulary has {s.vocabulary} entries, the teacher's {t.vocabulary}: the same token ids "
            "would mean different words. Student and teacher must share one tokenizer."
        )
    check_label_order(student, label_names(teacher), "the teacher")


def label_names(model: nn.Module) -> list[str]:
    """Give the names of a model's labels in their order; empty where it has none."""
    id2label = getattr(getattr(unwrapped(model), "config", None), "id2label", None) or {}
    return [str(id2label[number]).lower() for number in sorted(id2label)]


def check_label_order(student: nn.Module, names: list[str], whose: str) -> None:
    """Refuse the same labels in another order."""
    mine = label_names(student)
    if mine != names and sorted(mine) == sorted(names):
        raise ModelError(
            f"The student numbers its labels {mine}, {whose} {names}. Bring them into one order: the same number would "
            "mean different labels."
        )


def _check_learned_parts(objective: Objective) -> None:
    parts = [k for k, v in vars(objective).items() if isinstance(v, nn.Module | nn.Parameter) and k != "projections"]
    if parts:
        raise ObjectiveError(
            f"{type(objective).__name__} keeps learnable parts in {parts}, where nothing would train them. Put modules "
            "into self.projections['name'] in build()."
        )


def _own_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep autocast away from a model in half precision: it needs none, and the other half would be mixed into it."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or weight.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(weight.device.type, enabled=False)


def _no_weight(progress: float | None) -> str:
    when = "" if progress is None else f" at {progress:.1%} of the training"
    return f"All terms have weight 0{when}: nothing would be learned. Let the schedules overlap, or train less long."


class _Attach(torch.autograd.Function):
    """Pass a value on, and give zero gradients to parameters that it doesn't depend on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (*gradients, *(torch.zeros_like(p) for p in ctx.saved_tensors))


@contextmanager
def _without_trace(module: nn.Module) -> Iterator[None]:
    """Run something and put random state, buffers and training modes back."""
    # transformers notes the problem type that labels suggest in the config: ours must not decide it.
    configs = [m.config for m in module.modules() if isinstance(m, PreTrainedModel)]
    problem_types = [getattr(config, "problem_type", None) for config in configs]
    modes = {m: m.training for m in module.modules()}
    buffers = [(b, b.clone()) for b in module.buffers()]
    devices = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for m, mode in modes.items():
                m.training = mode
            for config, problem_type in zip(configs, problem_types, strict=True):
                config.problem_type = problem_type
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def _gradients(name: str, value: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    if not value.requires_grad:
        raise ObjectiveError(f"The term {name} reaches no trainable parameter. Is the student frozen?")
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise ObjectiveError(f"The term {name} reaches no trainable parameter. Is what it trains frozen?")
    return list(gradients)


def _norm(gradients: list[Tensor | None]) -> float:
    norms = [g.detach().float().norm() for g in gradients if g is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


def _check_term(name: str, check: TermCheck) -> None:
    for what, number in (("value", check.value), ("gradient", check.gradient)):
        if not number < float("inf"):
            raise ObjectiveError(
                f"The {what} of the term {name} is {number} in the dry run. Look for NaN in the models' weights, for "
                "an unfit precision, or for a loss that divides by zero."
            )
