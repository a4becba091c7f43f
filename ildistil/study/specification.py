"""What a study's YAML file says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ildistil.study.grid import Choice, Config, Grid, read_axes, unknown_keys

__all__ = ["Study"]

_KEYS = ["study", "title", "base", "axes", "runs", "exclude", "metric", "teacher", "targets", "finetune", "export"]


@dataclass(frozen=True)
class Study:
    """What a study's YAML file says.

    Args:
        folder: where everything is written.
        title: for people.
        base: the configuration that all runs share.
        grid: the axes.
        choices: a level of each axis for each run.
        metric: what the best student is chosen and shown by; by default the task's own.
        teacher: configuration of the fine-tuning that makes each task's teacher; ``None`` where there are some.
        targets: options of stored targets; ``None`` without.
        finetune: the fine-tunings that follow each distillation; ``None`` where distilled students are measured.
        best_over: axes of a fine-tuning over which only the best counts.
        export: whether the students of runs are exported.
    """

    folder: str
    title: str
    base: Config
    grid: Grid
    choices: Sequence[Choice]
    metric: str | None = None
    teacher: Config | None = None
    targets: Config | None = None
    finetune: "Study | None" = None
    best_over: Sequence[str] = ()
    export: bool = False

    @classmethod
    def read(cls, given: Mapping[str, Any], problems: list[str], inside: str = "") -> "Study":
        """Read a study.

        Args:
            given: what the file holds, with the files that it names in their places.
            problems: what is wrong is added here.
            inside: the place of a study within another.
        """
        keys = ["base", "axes", "runs", "exclude", "metric", "best_over"] if inside else _KEYS
        problems += unknown_keys(given, keys, inside)
        folder = given.get("study", "")
        if not inside and (not isinstance(folder, str) or not folder):
            problems.append("study: name the folder of the study, such as studies/sst2.")
        grid = read_axes(given.get("axes", {}), f"{inside}axes", problems)
        lists = {key: given.get(key) or [] for key in ("runs", "exclude", "best_over")}
        for key, value in lists.items():
            if not isinstance(value, list):
                problems.append(f"{inside}{key} is {value!r}. Give a list.")
                lists[key] = []
        found: list[str] = []
        choices = list(grid.choices(lists["runs"], lists["exclude"], found))
        problems += [f"{inside}{each}" for each in found]
        if lost := [axis for axis in lists["best_over"] if axis not in grid.axes]:
            problems.append(f"{inside}best_over: there is no axis {lost[0]!r}.")
        maps = {key: _mapping(given, key, problems, inside) for key in ("base", "teacher", "finetune")}
        targets = given.get("targets") or None
        further = maps["finetune"] or None
        study = cls(
            str(folder), str(given.get("title") or folder), maps["base"], grid, choices, given.get("metric"),
            maps["teacher"].get("finetune"), {} if targets is True else targets,
            None if further is None else cls.read(further, problems, "finetune."),
            lists["best_over"], bool(given.get("export", False)),
        )  # fmt: skip
        problems += [f"teacher.{key}: unknown. There is: finetune." for key in maps["teacher"] if key != "finetune"]
        _check_presets(study, problems)
        return study


def _mapping(given: Mapping[str, Any], key: str, problems: list[str], inside: str) -> Config:
    value = given.get(key) or {}
    if not isinstance(value, Mapping):
        problems.append(f"{inside}{key} is {value!r}. Give a configuration: 'model:', 'data:' and so on, or its file.")
        return {}
    return dict(value)


def _check_presets(study: Study, problems: list[str]) -> None:
    """Refuse presets that something else replaces without a word."""
    with_preset = [axis for axis, levels in study.grid.axes.items() if any("preset" in v for v in levels.values())]
    if "preset" in study.base:
        with_preset.insert(0, "base")
    if len(with_preset) > 1:
        problems.append(f"Presets are named in {' and '.join(with_preset)}. A run has one: name them in one place.")
    if with_preset and "objectives" in study.base:
        problems.append(
            f"base has objectives, which replace those of the presets in {with_preset[0]}. Put them into a level of "
            "their own."
        )
