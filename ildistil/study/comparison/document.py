"""Internal: the content of a comparison in sentences and tables, whatever they are written as."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ildistil.study.comparison.content import Against, Flip, Report, Speed
from ildistil.study.statistics import Estimate, Proportion

__all__ = ["Document", "Section", "Table", "document", "kept_in_words"]


@dataclass(frozen=True)
class Table:
    """A table with its caption."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A part of the report: sentences, then tables."""

    title: str
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Document:
    """A report: what was measured, what came out, and the parts."""

    title: str
    summary: str
    answers: Sequence[str]
    sections: Sequence[Section]


def document(report: Report) -> Document:
    """Put a comparison in words and tables."""
    settings = report.settings
    names = ", ".join(model.name for model in report.students)
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    sections = [_quality(report), *_difference(report), _cost(report), *_classes(report), *_calibration(report)]
    return Document(
        title=f"{report.teacher.name} and {names}" if names else report.teacher.name,
        summary=(
            f"{report.task}, {report.set_name}: {report.rows:,} rows, {100 * settings.level:g} % intervals over these "
            f"rows. On {settings.device}, {settings.dtype}, {_count(settings.threads, 'thread')}; {versions}."
        ),
        answers=[*_warnings(report), *_answers(report)],
        sections=[*sections, *(section for each in report.against for section in _flips(report, each))],
    )


def kept_in_words(metric: str, kept: str | None, faster: float | None, size: float) -> str:
    """Return the shortest form of a comparison.

    >>> kept_in_words("accuracy", "97.8 %", 2.04, 0.61)
    "keeps 97.8 % of the teacher's accuracy, 2.0 times as fast, 0.61 of the size"
    """
    quality = [] if kept is None else [f"keeps {kept} of the teacher's {metric}"]
    speed = [] if faster is None else [f"{faster:.1f} times as fast"]
    return ", ".join([*quality, *speed, f"{size:.2f} of the size"])


def _answers(report: Report) -> Iterator[str]:
    if not report.students:
        yield f"{report.teacher.name}: {report.primary} {_interval(report.teacher.metrics[report.primary])}."
    for model, each in zip(report.students, report.against, strict=True):
        speed = max(model.cost.speeds, key=lambda speed: speed.batch_size, default=None)
        kept = None if each.kept is None else _interval(each.kept, percent=True)
        words = kept_in_words(report.primary, kept, None if speed is None else speed.faster, each.size)
        at = "" if speed is None else f" (batches of {speed.batch_size})"
        yield f"{model.name}: {words}{at}; {report.primary} {_interval(model.metrics[report.primary])}."


def _warnings(report: Report) -> Iterator[str]:
    if report.overlap is not None and report.overlap[0]:
        rows, trained = report.overlap
        yield (
            f"Warning: {rows:,} of the {report.rows:,} rows ({_percent(rows / report.rows)}) have the texts of one of "
            f"the {trained:,} training rows, so that what is measured on them may be remembered."
        )


def _quality(report: Report) -> Section:
    rows = []
    for model in report.models:
        values = [_interval(estimate) for estimate in model.metrics.values()]
        rows.append([model.name, *values])
    sentences = []
    if report.majority is not None:
        sentences.append(f"Always saying the most frequent class is right on {_percent(report.majority)} of the rows.")
    return Section(
        "Quality", sentences, [Table("Metrics with their intervals", ["model", *report.teacher.metrics], rows)]
    )


def _difference(report: Report) -> Iterator[Section]:
    if not report.against:
        return
    header = ["student", f"{report.primary}, less the teacher's", "kept", "agrees with the teacher"]
    rows = [
        [each.student, _interval(each.difference, signed=True), _interval(each.kept, percent=True), _agreement(each)]
        for each in report.against
    ]
    teacher = report.teacher.name
    sentences = [
        f"{each.student} less {teacher}, accuracy: {each.mcnemar.describe(each.student, teacher)}."
        for each in report.against
        if each.mcnemar is not None
    ]
    yield Section("Beside the teacher", sentences, [Table("Differences with their intervals", header, rows)])


def _agreement(against: Against) -> str:
    found = against.agreement
    if isinstance(found, Proportion):
        return f"{_interval(found.share, percent=True)} of rows"
    return f"correlation {_interval(found)}"


def _cost(report: Report) -> Section:
    header = ["model", "layers", "width", "parameters", "on disk", "memory"]
    rows = [
        [
            model.name, str(model.layers), "–" if model.width is None else str(model.width),
            f"{model.cost.parameters / 1e6:.1f} M", _megabytes(model.cost.bytes_on_disk),
            _megabytes(model.cost.peak_memory),
        ]
        for model in report.models
    ]  # fmt: skip
    tables = [Table("Size; memory is of the weights and what is alive at once in a batch of 32 rows", header, rows)]
    for number, of_size in enumerate(report.teacher.cost.speeds):
        caption = f"A forward pass of a batch of {_count(of_size.batch_size, 'row')}, {of_size.rounds} rounds in turns"
        times = [[model.name, *_times(model.cost.speeds[number])] for model in report.models]
        tables.append(Table(caption, ["model", "p50 ms", "p95 ms", "rows/s", "x teacher"], times))
    return Section("Cost", [], tables)


def _times(speed: Speed) -> list[str]:
    middle, high = (f"{1e3 * seconds:.1f}" for seconds in (speed.p50, speed.p95))
    return [middle, high, f"{speed.rows_per_second:,.1f}", f"{speed.faster:.2f}"]


def _classes(report: Report) -> Iterator[Section]:
    if not report.teacher.classes:
        return
    rows = []
    for number, of_class in enumerate(report.teacher.classes):
        for model in report.models:
            each = model.classes[number]
            ends = [_interval(value) for value in (each.recall, each.precision)]
            rows.append([of_class.name, model.name, f"{each.rows:,}", *ends, f"{each.f1:.3f}"])
    header = ["class", "model", "rows", "recall", "precision", "F1"]
    yield Section("Classes", [], [Table("Each class", header, rows)])


def _calibration(report: Report) -> Iterator[Section]:
    if report.teacher.calibration is None:
        return
    rows = [
        [model.name, f"{c.error:.3f}", f"{c.confidence:.3f}", f"{c.accuracy:.3f}"]
        for model in report.models
        if (c := model.calibration) is not None
    ]
    caption = f"Expected calibration error, {report.settings.bins} bins of equal width"
    yield Section("Calibration", [], [Table(caption, ["model", "ECE", "mean confidence", "accuracy"], rows)])


def _flips(report: Report, against: Against) -> Iterator[Section]:
    teacher, student = report.teacher.name, against.student
    titles = [f"Right by {teacher}, wrong by {student}", f"Wrong by {teacher}, right by {student}"]
    order = "most confident first"
    if not report.teacher.classes:
        titles, order = [f"{student} further off than {teacher}", ""], "furthest first"
    for title, (count, shown) in zip(titles, (against.lost, against.gained), strict=True):
        if shown:
            header = ["row", "label", teacher, student, "confidence", "text"]
            caption = f"{len(shown)} of {_count(count, 'row')}, {order}"
            yield Section(title, [], [Table(caption, header, [_flip(each) for each in shown])])


def _flip(flip: Flip) -> list[str]:
    sure = "–" if flip.confidence is None else f"{flip.confidence:.2f}"
    return [str(flip.row), flip.label, flip.teacher, flip.student, sure, " | ".join(flip.texts or ("–",))]


def _interval(estimate: Estimate | None, signed: bool = False, percent: bool = False) -> str:
    if estimate is None:
        return "–"
    if not math.isfinite(estimate.value):
        return "undefined"
    scale, unit, form = (100, " %", ".1f") if percent else (1, "", "+.3f" if signed else ".3f")
    low, high = (f"{scale * end:{form}}" if math.isfinite(end) else "?" for end in (estimate.low, estimate.high))
    return f"{scale * estimate.value:{form}}{unit} ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:.1f} MB"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
