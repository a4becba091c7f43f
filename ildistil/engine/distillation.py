"""The engine: one teacher run, one student run, all objectives. A plain ``nn.Module`` that needs no Trainer."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Self, get_args

import torch
from torch import Tensor, nn

from ildistil.capture import Activations, Capture, Layers, ModelInfo, Role, Tap, model_inputs, real_labels, unwrapped
from ildistil.engine import checks
from ildistil.engine.balance import Balance
from ildistil.engine.dry_run import DryRun, check_terms, spoilt_terms, without_trace
from ildistil.engine.reach import Reach
from ildistil.engine.synthetic import synthetic_batch
from ildistil.engine.terms import Terms
from ildistil.errors import ObjectiveError
from ildistil.objectives import Count, Objective
from ildistil.stages import Step
from ildistil.teachers import LiveTeacher, Teacher

_NOTHING = Activations(Layers({}, 0, "hidden"), Layers({}, 0, "attention"), torch.empty(0, 0, dtype=torch.bool), None)


class Distillation(nn.Module):
    """Runs a frozen teacher and a student on a batch and computes the objectives' terms.

    Args:
        student: the model to train; trainable parameters of this module are its own and the objectives' projections.
        teacher: the frozen model, or ``None`` if no objective needs one. It is switched to eval mode and its
            parameters' gradients off; it is not a registered child, so it is in no checkpoint, optimiser or DDP
            bucket, but moves along with ``.to(...)``. Or any :class:`~ildistil.teachers.Teacher`, such as a
            :class:`~ildistil.teachers.StoredTeacher`.
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
        teacher: nn.Module | Teacher | None = None,
        objectives: Iterable[Objective] | Mapping[str, Objective] = (),
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.teacher: Teacher | None = LiveTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        if self.teacher is not None:
            self.teacher.accept(student)
            checks.check_models(ModelInfo.of(student), self.teacher.info)
        # from_pretrained returns eval mode, and Lightning keeps the mode it finds: start as this module is, in train.
        self.student = student.train(self.training)
        self.projections = nn.ModuleDict()
        self.objectives: dict[str, Objective] = {}
        self.balance = copy.deepcopy(balance)  # it holds what it measured of these models
        self._capture: Capture | None = None
        self._hooked: frozenset[str] = frozenset()
        self._positions: int | None = None
        self._step, self._begun = Step(), False
        self._reach = Reach()
        self._compile_options: dict[str, Any] | None = None
        if objectives:
            self.set_objectives(objectives)

    def set_objectives(self, objectives: Iterable[Objective] | Mapping[str, Objective]) -> None:
        """Set the terms: check them, make their projections, and prepare the capture. Nothing is run.

        Calling it again with the same objects changes nothing, so that projections keep what they learned.

        Raises:
            ObjectiveError: a term can't work with these models.
            CaptureError: a model can't give what a term reads.
        """
        named = checks.named_objectives(objectives)
        if named == self.objectives:
            return
        self.release()
        student = ModelInfo.of(self.student)
        teacher = student if self.teacher is None else self.teacher.info
        self._positions = min((i.positions for i in (student, teacher) if i.positions is not None), default=None)
        for name, objective in named.items():
            if objective.needs_teacher and self.teacher is None:
                raise ObjectiveError(f"{name} ({type(objective).__name__}) needs a teacher, and there is none.")
            objective.bind(self)
            objective.projections = nn.ModuleDict()
            objective.build(student, teacher)
            checks.check_learned_parts(objective)
        reference = next(self.student.parameters(), torch.empty(0))
        self.projections = nn.ModuleDict(
            {name: objective.projections for name, objective in named.items() if len(objective.projections)}
        ).to(reference.device, reference.dtype)
        self.objectives, self._reach = named, Reach()
        try:
            self.attach()
        except BaseException:
            self.release()
            raise

    def attach(self) -> None:
        """Put the hooks on both models; done by :meth:`set_objectives`, and again by a step after :meth:`detach`."""
        self.detach()
        self._capture = Capture(self.student, self._may_read("student"))
        wanted = self._may_read("teacher")
        if self.teacher is not None and wanted:
            self.teacher.open(wanted)
        self._hooked = frozenset(self._used)
        if self._compile_options is not None:
            self.compile(**self._compile_options)

    def compile(self, **options: Any) -> None:
        """Compile the runs of both models, with the options of ``torch.compile``; the losses stay as they are."""
        self._compile_options = options
        if self._capture is not None:
            self._capture.compile(**options)
        if self.teacher is not None:
            self.teacher.compile(**options)

    def detach(self) -> None:
        """Take the hooks off both models; objectives and projections stay."""
        if self._capture is not None:
            self._capture.close()
        if self.teacher is not None:
            self.teacher.close()
        self._capture, self._hooked = None, frozenset()

    def release(self) -> None:
        """Take the hooks off both models and forget the objectives."""
        self.detach()
        for objective in self.objectives.values():
            objective.bind(None)
        self.projections, self.objectives = nn.ModuleDict(), {}

    def prefetch(self, batch: Any, step: Step = Step()) -> Any:  # noqa: B008
        """Begin the step of a batch, and return the batch with whatever the teacher reads for it on the CPU.

        Optional: :meth:`forward` does both by itself, on the batch's device.

        Args:
            batch: the batch, best still on the CPU.
            step: the step it belongs to.
        """
        if not isinstance(batch, Mapping):
            return batch
        active = {name: self.objectives[name] for name in self.weights_at(step)}
        self._begin(active, step)
        self._begun = True
        wanted = self._reads("teacher", active)
        if self.teacher is None or not wanted:
            return batch
        if not active.keys() <= self._hooked:
            self.attach()
        return self.teacher.prefetch(batch, wanted)

    def forward(self, batch: Mapping[str, Any], step: Step = Step(), *, verify: bool = False) -> Terms:  # noqa: B008
        """Run both models on a batch and compute the terms whose weight is not 0.

        Args:
            batch: a mapping; each model gets the keys its ``forward`` names.
            step: the optimiser step it belongs to; with its number for objectives that draw something anew at every
                step, with its progress for weights that are schedules.
            verify: check the attention masks once more, as a dry run does.

        Returns:
            The terms; call ``backward()`` on their ``total``.

        Raises:
            ObjectiveError: there are no objectives, all have weight 0, or one can't work with this batch.
            CaptureError: a model did not give what was wanted of it.
            DataError: the batch is longer than the models' positions.
        """
        weights, active = self._active(batch, step)
        begun, self._begun = self._begun and self._step == step, False
        if not begun:
            self._begin(active, step)
        values, counts, _ = self._run(batch, active, verify)
        values = self._reach.attach(values, self.parameters())
        if self.training:
            for objective in active.values():
                objective.remember()
        if self.balance is None:
            return Terms(values, dict(weights), counts)
        trained = [p for p in self.student.parameters() if p.requires_grad]
        measuring = self.training and torch.is_grad_enabled()
        numbers = {name: count.number for name, count in counts.items()}
        balanced = self.balance.weights(values, weights, trained, step.number, measuring, numbers)
        return Terms(values, dict(balanced), counts, self.balance.gradient_shares(balanced))

    @torch.no_grad()
    def measure(self, batch: Mapping[str, Any], step: Step = Step()) -> tuple[Terms, Activations]:  # noqa: B008
        """Compute the terms of a batch that nothing is learned from, in the mode that the student is in.

        Neither memory banks nor the measured sizes of balanced terms change; the weights are the plain ones.

        Args:
            batch: a mapping, as for :meth:`forward`.
            step: decides which terms take part, with which weights.

        Returns:
            The terms, and what the student gave for them.

        Raises:
            IldistilError: see :meth:`forward`.
        """
        weights, active = self._active(batch, step)
        self._begin(active, step, learns=False)
        values, counts, student = self._run(batch, active, verify=False)
        return Terms(values, dict(weights), counts), student

    def _active(self, batch: Mapping[str, Any], step: Step) -> tuple[dict[str, float], dict[str, Objective]]:
        """Return the weights and objectives that take part in a step, after a look at its batch."""
        if not self.objectives:
            raise ObjectiveError(checks.NO_OBJECTIVE)
        checks.check_batch(batch, self._positions)
        weights = self.weights_at(step)
        if not weights:
            raise ObjectiveError(checks.no_weight(step.progress))
        return weights, {name: self.objectives[name] for name in weights}

    def weights_at(self, step: Step) -> dict[str, float]:
        """Return the weights that are not 0 at a step, by name.

        Raises:
            ObjectiveError: a weight is a schedule and the step has no progress, or it names unknown objectives.
        """
        only = step.only
        if only is not None and (isinstance(only, str) or not set(only) <= self.objectives.keys()):
            raise ObjectiveError(f"only names some of the objectives {list(self.objectives)}, in a list; got {only!r}.")
        chosen = {n: o for n, o in self.objectives.items() if only is None or n in only}
        weights = {name: objective.weight_at(step.progress) for name, objective in chosen.items()}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _begin(self, active: Mapping[str, Objective], step: Step, learns: bool = True) -> None:
        for objective in active.values():
            objective.begin(step)
            if learns:
                objective.learn(step)
        self._step = step

    @property
    def _used(self) -> dict[str, Objective]:
        return {name: objective for name, objective in self.objectives.items() if objective.weight != 0}

    def _reads(self, role: Role, active: Mapping[str, Objective]) -> list[Tap]:
        info = self._info(role)
        return [tap for o in active.values() if role == "student" or o.needs_teacher for tap in o.reads(role, info)]

    def _may_read(self, role: Role) -> list[Tap]:
        info, used = self._info(role), self._used.values()
        return [tap for o in used if role == "student" or o.needs_teacher for tap in o.may_read(role, info)]

    def _info(self, role: Role) -> ModelInfo:
        if role == "teacher" and self.teacher is not None:
            return self.teacher.info
        return ModelInfo.of(self.student) if self._capture is None else self._capture.info

    def _run(
        self, batch: Mapping[str, Any], active: Mapping[str, Objective], verify: bool
    ) -> tuple[dict[str, Tensor], dict[str, Count], Activations]:
        """Run both models, recording what the active terms read; return their values and counts, and what remains."""
        if self._capture is None or not active.keys() <= self._hooked:
            self.attach()  # for the first time, after detach(), or because somebody raised a weight from 0
        assert self._capture is not None
        batch = real_labels(batch)
        teacher, wanted = _NOTHING, self._reads("teacher", active)
        if self.teacher is not None and wanted:
            teacher = self.teacher(batch, wanted, verify=verify)
            teacher.expect(wanted)
        wanted = self._reads("student", active)
        student = self._capture(batch, wanted=wanted, verify=verify)
        student.expect(wanted)
        values, counts = {}, {}
        for name, objective in active.items():
            values[name] = objective.loss(student, teacher, batch)
            if not isinstance(values[name], Tensor) or values[name].ndim:
                got = getattr(values[name], "shape", None)
                what = f"the shape {tuple(got)}" if got is not None else f"a {type(values[name]).__name__}"
                raise ObjectiveError(f"The loss of {name} must be a scalar, got {what}.")
            with torch.no_grad():
                one = torch.ones((), device=values[name].device)  # the same in all processes: the whole batch's already
                counts[name] = Count(one) if objective.batch_coupled else objective.count(student, batch)
            if not isinstance(counts[name], Count):
                raise ObjectiveError(
                    f"count() of {name} must return a Count, such as Count(number, 'tokens'); got a "
                    f"{type(counts[name]).__name__}."
                )
        return values, counts, student

    def drop_zero_gradients(self) -> None:
        """Unset the gradients of what the last step's terms don't reach, before the optimiser lets it decay."""
        self._reach.drop()

    def student_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Select what the student's ``forward`` names, labels included: for evaluation."""
        return model_inputs(unwrapped(self.student), batch)

    def dry_run(self, batch: Mapping[str, Any]) -> DryRun:
        """Run one step without a trace, and check that each term is finite and has finite gradients.

        All terms take part, also those whose weight is 0 at first. Random state, buffers, gradients and modes are
        afterwards what they were.

        Raises:
            ObjectiveError: a term is not finite, or reaches no trainable parameter.
            DataError: a row without any token has a number as its label, which the model's loss would count.
        """
        checks.check_batch(batch, self._positions)
        used = self._used
        for objective in used.values():
            objective.begin(Step(self._step.number or 0))  # the step they are in: nothing is drawn anew
        if any(tap.name == "loss" for tap in self._reads("student", used)):
            checks.check_numbers_of_real_rows(batch)
        with without_trace(self), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            values, _, student = self._run(batch, used, verify=True)
            found, reach = check_terms(values, [p for p in self.parameters() if p.requires_grad])
        self._reach.of = reach  # only now: a run that failed leaves what was known
        return replace(found, next_token=student.next_token)

    def spoilt_terms(self, batch: Mapping[str, Any], step: Step) -> list[str]:
        """Run the batch of a step once more, without a trace, and return the terms that spoil its gradient.

        Each term is differentiated by itself; those are named whose value or gradient isn't finite.
        """
        active = {name: self.objectives[name] for name in self.weights_at(step)}
        with without_trace(self), torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            values, *_ = self._run(batch, active, verify=False)
            return spoilt_terms(values, [p for p in self.parameters() if p.requires_grad])

    def synthetic_batch(self) -> Mapping[str, Any] | None:
        """Make two short sequences of unequal length, or ``None`` where the models' inputs aren't known."""
        batch = synthetic_batch(unwrapped(self.student))
        needed = self.teacher is not None and any(o.needs_teacher for o in self.objectives.values())
        return batch if batch is None or self.teacher is None or not needed else self.teacher.rehearse(batch)

    @property
    def captured(self) -> dict[Role, list[Tap]]:
        """What may be recorded of each model."""
        roles: tuple[Role, ...] = get_args(Role)
        places = {role: {tap.place for tap in self._may_read(role)} for role in roles}
        order = {role: sorted(taps, key=lambda tap: (tap.name, tap.layer or 0)) for role, taps in places.items()}
        return {role: taps for role, taps in order.items() if taps or role == "student"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the teacher along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher.apply(fn)
        return self
