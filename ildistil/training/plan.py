"""The plan: what a run will do, printed before it starts."""

from collections.abc import Sequence

from ildistil.capture import ModelInfo, Tap, unwrapped
from ildistil.engine import Distillation, DryRun
from ildistil.schedules import Schedule
from ildistil.stages import Stage
from ildistil.students.heads import is_untrained
from ildistil.tables import table

__all__ = ["describe"]


def describe(distillation: Distillation, dry_run: DryRun | None = None, stages: Sequence[Stage] = ()) -> str:
    """Describe what a run will do: models, objectives with their layer pairs, what is captured, what the dry run found.

    Args:
        distillation: the engine, its objectives set.
        dry_run: what :meth:`~ildistil.Distillation.dry_run` found, if it ran.
        stages: the stages of the training, if there are several.
    """
    parts = ["Distillation plan", _indent(_models(distillation)), "  terms (student layer<-teacher layer)"]
    parts.append(_indent(_terms(distillation, dry_run), 4))
    if distillation.balance is not None:
        parts.append(f"  weights are shares, by {distillation.balance.by}")
    if stages:
        rows = [(str(i), str(s.epochs), " ".join(s.objectives)) for i, s in enumerate(stages, start=1)]
        parts.append(_indent(table(("stage", "epochs", "terms"), rows), 2))
    parts.append("  captured")
    for role, taps in distillation.captured.items():
        runs = role == "student" or (distillation.teacher is not None and distillation.teacher.runs)
        parts.append(f"    {role}: {_taps(taps)}{_end(taps) if runs else ''}")
    parts += [f"  note: {note}" for note in _notes(distillation, dry_run)]
    return "\n".join(parts)


def _models(distillation: Distillation) -> str:
    rows = []
    if (teacher := distillation.teacher) is not None:
        rows.append(_row("teacher", teacher.info, teacher.describe()))
    student = ModelInfo.of(distillation.student)
    remark = f"{_millions(sum(p.numel() for p in distillation.student.parameters() if p.requires_grad))} trained"
    if student.init_layers is not None:
        remark += f", from teacher layers {' '.join(map(str, student.init_layers))}"
    rows.append(_row("student", student, remark))
    return table(("", "model", "layers", "width", "heads", "parameters", ""), rows)


def _row(role: str, info: ModelInfo, remark: str) -> tuple[str, ...]:
    numbers = [str(n) if n is not None else "?" for n in (info.depth, info.width, info.heads)]
    return (role, info.name, *numbers, _millions(info.parameters), remark)


def _terms(distillation: Distillation, dry_run: DryRun | None) -> str:
    header = ["name", "objective", "weight", "compares", "projections"]
    checks = {} if dry_run is None else dry_run.terms
    if checks:
        header += ["value", "gradient"]
    rows = []
    for name, objective in distillation.objectives.items():
        learned = sum(p.numel() for p in objective.projections.parameters())
        row = [name, type(objective).__name__, _weight(objective.weight), objective.describe()]
        row.append(_millions(learned) if learned else "none")
        if checks:
            row += [f"{checks[name].value:.4g}", f"{checks[name].gradient:.4g}"] if name in checks else ["off", "off"]
        rows.append(row)
    return table(header, rows)


def _weight(weight: float | Schedule) -> str:
    return str(weight) if isinstance(weight, Schedule) else f"{weight:g}"


def _taps(taps: list[Tap]) -> str:
    by_name: dict[str, list[str]] = {}
    for tap in taps:
        by_name.setdefault(str(tap._replace(layer=None)), []).extend([] if tap.layer is None else [str(tap.layer)])
    return ", ".join(f"{name} {' '.join(layers)}".strip() for name, layers in by_name.items())


def _end(taps: list[Tap]) -> str:
    """Describe where a run stops, if nothing behind the layers is wanted."""
    layers = [tap.layer for tap in taps if tap.layer is not None]
    return f"; it runs no further than layer {max(layers)}" if layers and len(layers) == len(taps) else ""


def _notes(distillation: Distillation, dry_run: DryRun | None) -> list[str]:
    notes = []
    student = unwrapped(distillation.student)
    if dry_run is not None and dry_run.unreached:
        count = sum(p.numel() for p in dry_run.unreached)
        notes.append(f"{_millions(count)} student parameters are reached by no term, and stay as they are")
        if is_untrained(student, dry_run.unreached):
            notes.append(
                "no term trains the student's head: it is exported without, to be fine-tuned next (ildistil finetune)"
            )
    config = getattr(student, "config", None)
    dropout = getattr(config, "attention_probs_dropout_prob", None) or getattr(config, "attention_dropout", None)
    on_cpu = all(p.device.type == "cpu" for p in student.parameters())
    if dropout and on_cpu and "sdpa" in (getattr(config, "_attn_implementation", None) or ""):
        notes.append(
            f"attention dropout is {dropout:g}: on CPU, sdpa then falls back to its slow kernel; 0 would be faster"
        )
    return notes


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _indent(text: str, by: int = 2) -> str:
    return "\n".join(" " * by + line for line in text.splitlines())
