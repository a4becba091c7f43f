"""Make the plan of a study: which commands run with which configuration, what each waits for; checked as a whole."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ildistil.errors import ConfigError, IldistilError
from ildistil.study.grid import Choice, Config, file_name, place
from ildistil.study.jobs import Command, Facts, Job, Plan, Resolver
from ildistil.study.specification import Study

__all__ = ["free_bytes", "make_plan"]

_SEED = "seed_everything"
_Where = str | Mapping[str, str]  # a place in words, or a run's factors


def make_plan(study: Study, resolve: Resolver, problems: Sequence[str] = ()) -> Plan:
    """Return the plan of a study, all of whose configurations were read and looked at.

    Args:
        study: what its file says.
        resolve: reads and looks at configurations.
        problems: what was found to be wrong before.

    Raises:
        ConfigError: all that is wrong, at once.
    """
    planner = _Planner(study, resolve)
    planner.problems = {problem: [] for problem in problems}
    return planner.plan()


class _Planner:
    def __init__(self, study: Study, resolve: Resolver) -> None:
        self.study, self.resolve = study, resolve
        self.made = Plan(study.title)
        self.problems: dict[str, list[_Where]] = {}
        self.later: dict[str, Config] = {}
        self.bytes = 0
        self.known: dict[str, Facts | None] = {}
        self.parsed: dict[str, Config] = {}

    def plan(self) -> Plan:
        study = self.study
        kind = "students" if study.finetune else "runs"
        found: list[tuple[Choice, Config, list[str]]] = []
        for choice in study.choices:
            teacher = self._teacher(choice)
            if teacher is not None:
                name, config = teacher
                found.append((choice, config, [name] if name else []))
        for needs, config in self._targets(found):
            found = [(c, each | {"model": each["model"] | config} if key in needs else each, n) for key, (c, each, n) in
                     enumerate(found)]  # fmt: skip
        distilled = [self._add(kind, "fit", *each, metric=study.metric) for each in found]
        self._check_different([choice for choice, *_ in found], distilled)
        if study.finetune:
            for (choice, config, _), job in zip(found, distilled, strict=True):
                self._finetunings(choice, config, job)
        if self.problems:
            lines = [f"- {_places(where)}{problem}" for problem, where in self.problems.items()]
            raise ConfigError("The study can't run as it is:\n" + "\n".join(lines))
        return self.made

    def _teacher(self, choice: Choice) -> tuple[str | None, Config] | None:
        """Return the job that makes the teacher of a run, if there is one, and the run's configuration."""
        parts = [self.study.base, *self.study.grid.parts(choice)]
        if self.study.teacher is None:
            config = self._configuration("fit", parts, choice)
            return None if config is None else (None, config)
        data = [{"data": part["data"]} for part in (self.study.base, self._level(choice, "task")) if "data" in part]
        config = self._configuration("finetune", [*data, self.study.teacher], f"teacher{_of(choice, 'task')}")
        if config is None:
            return None
        factors = {axis: level for axis, level in choice.items() if axis == "task"}
        job = self._add("teachers", "finetune", factors, config, [], export=True)
        made = f"{self.study.folder}/{job}/student"
        self.later[made] = config
        teacher = {"model": {"teacher": {"class_path": "pretrained", "init_args": {"path": made}}}}
        own = self._configuration("fit", [*parts, teacher], choice)
        return None if own is None else (job, own)

    def _targets(self, found: list[tuple[Choice, Config, list[str]]]) -> list[tuple[set[int], Config]]:
        """Add the jobs that store targets; return the runs that read each, and what these are told of it."""
        if self.study.targets is None:
            return []
        groups: dict[str, list[int]] = {}
        for number, (_, config, _) in enumerate(found):
            # A mapping may ask which layers a student started from: then other students read other layers.
            by_student = config["model"]["student"] if "FromInit" in json.dumps(config["objectives"]) else None
            told = [config["model"]["teacher"], config["model"]["tokenizer"], config["data"], by_student]
            groups.setdefault(_hash(told), []).append(number)
        made = []
        for numbers in groups.values():
            choice, config, needs = found[numbers[0]]
            union = {}
            for number in numbers:
                for name, term in found[number][1]["objectives"].items():
                    union[f"{name}-{_hash(term)}"] = term
            config = copy.deepcopy(config) | {"objectives": union, "seed_everything": 0}
            config["model"] |= {"stages": [], "balance": None, "targets": None, "targets_dtype": None}
            factors = {axis: level for axis, level in choice.items() if axis == "task"}
            name = _name("targets", factors, config)
            model = {"targets": f"{self.study.folder}/{name}/files", "targets_dtype": self.study.targets.get("dtype")}
            config["model"] |= model
            self._try(partial(self._measure_targets, config), f"targets{_of(choice, 'task')}")
            self.made.add(Job(name, "precompute", factors, needs), config)
            for number in numbers:
                found[number] = (*found[number][:2], [*found[number][2], name])
            made.append((set(numbers), model))
        return made

    def _measure_targets(self, config: Config) -> None:
        self.bytes += self.resolve.target_bytes(config, self.later)
        free = free_bytes(Path(self.study.folder))
        if self.bytes > free:
            raise ConfigError(
                f"The targets of the study need {self.bytes / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free on the "
                f"disk of {self.study.folder}. Free some, take a folder on another disk, or leave 'targets' out."
            )

    def _finetunings(self, choice: Choice, config: Config, student: str) -> None:
        """Add the fine-tunings of a distilled student."""
        study = self.study.finetune
        assert study is not None
        path = f"{self.study.folder}/{student}/student"
        self.later[path] = config
        names = []
        for own in study.choices:
            parts = [study.base, *study.grid.parts(own), place("model.path", "student")]
            found = self._configuration("finetune", parts, {f"finetune.{axis}": level for axis, level in own.items()})
            factors = _joined(choice, own)
            if found is not None:
                found = found | {"model": found["model"] | {"path": path}}
                group = "_".join(f"{k}={v}" for k, v in factors.items() if k.removeprefix("finetune.") not in
                                 study.best_over) if study.best_over else None  # fmt: skip
                names.append((own, self._add("runs", "finetune", factors, found, [student], study.metric, group)))
        self._check_different([own for own, _ in names], [name for _, name in names])

    def _add(
        self, kind: str, command: Command, factors: Mapping[str, str], config: Config, needs: list[str],
        metric: str | None = None, group: str | None = None, export: bool = False,
    ) -> str:  # fmt: skip
        """Add a job, and look at what it works on; return its name."""
        name = _name(kind, factors, config)
        where: _Where = factors if kind == "runs" else f"{kind} of {_told(factors)}"
        looked = _hash([command, self._without_seed(config)])
        if looked not in self.known:
            self.known[looked] = None
            self._try(lambda: self.known.__setitem__(looked, self.resolve.facts(command, config, self.later)), where)
        facts = self.known[looked]
        if facts is not None and metric is not None and metric not in facts.metrics:
            self._problem(f"no run logs the metric {metric!r}. These do: {', '.join(facts.metrics)}.", where)
        if facts is not None:
            chosen = metric or facts.primary
            mode = facts.mode if chosen == facts.primary else "min" if chosen == "loss" else "max"
            export = export or kind == "students" or (kind == "runs" and self.study.export)
            self.made.add(Job(name, command, dict(factors), needs, facts.set, chosen, mode, group, export), config)
        return name

    def _without_seed(self, config: Config) -> Config:
        """Return what decides whether a configuration is right: not the seed, nor which student is fine-tuned."""
        found = {key: value for key, value in config.items() if key != _SEED}
        if config["model"].get("path") in self.later:
            found["model"] = config["model"] | {"path": None}
        return found

    def _configuration(self, command: Command, parts: Sequence[Config], where: _Where) -> Config | None:
        """Return the whole configuration of parts; seeds change nothing else, so that they share one reading."""
        seed = next((part[_SEED] for part in reversed(parts) if _SEED in part), None)
        rest = [{key: value for key, value in part.items() if key != _SEED} for part in parts]
        plain = isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0
        key = _hash([command, rest if plain else parts])
        if key not in self.parsed:
            self._try(
                lambda: self.parsed.__setitem__(key, self.resolve.configuration(command, rest if plain else parts)),
                where,
            )
        found = self.parsed.get(key)
        return found if found is None or not plain else found | {_SEED: seed}

    def _level(self, choice: Choice, axis: str) -> Config:
        return self.study.grid.axes[axis][choice[axis]] if axis in choice else {}

    def _check_different(self, choices: Sequence[Choice], names: Sequence[str]) -> None:
        """Find levels that change nothing: runs of other choices with the same configuration."""
        first: dict[str, Choice] = {}
        for choice, name in zip(choices, names, strict=True):
            other = first.setdefault(name.rsplit("-", 1)[1], choice)
            if other is not choice:
                axis = next(axis for axis in choice if choice[axis] != other[axis])
                self._problem(
                    f"the axis {axis!r} changes nothing between {other[axis]!r} and {choice[axis]!r}: both give the "
                    "same run. Remove one, or look for what a later axis replaces.", choice,
                )  # fmt: skip

    def _try(self, look: Callable[[], object], where: _Where) -> None:
        try:
            look()
        except IldistilError as error:
            self._problem(str(error), where)

    def _problem(self, problem: str, where: _Where) -> None:
        places = self.problems.setdefault(problem, [])
        if where not in places:
            places.append(where)


def _name(kind: str, factors: Mapping[str, str], config: Config) -> str:
    """Return a folder's name: the factors, readable, and a hash of the whole configuration."""
    words = [file_name(f"{axis}{level}" if _is_number(level) else level) for axis, level in factors.items()]
    return f"{kind}/{'_'.join(words)[:120] or 'one'}-{_hash(config)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:10]


def _joined(choice: Choice, own: Choice) -> Choice:
    """Return the factors of a distillation and its fine-tuning, which may have axes of one name."""
    return choice | {f"finetune.{axis}" if axis in choice else axis: level for axis, level in own.items()}


def _told(choice: Mapping[str, str]) -> str:
    return ", ".join(f"{axis}={level}" for axis, level in choice.items()) or "the run"


def _of(choice: Choice, axis: str) -> str:
    return f" of {axis} {choice[axis]}" if axis in choice else ""


def _places(where: Sequence[_Where]) -> str:
    """Return the places of a problem in words: what its runs have in common, or else the first of them.

    >>> _places([{"task": "rte", "seed": "0"}, {"task": "rte", "seed": "1"}])
    'task=rte: '
    """
    if not where:
        return ""
    choices = [set(each.items()) for each in where if not isinstance(each, str)]
    first, rest = where[0], f" (and {len(where) - 1} more)" if len(where) > 1 else ""
    if isinstance(first, str):
        return f"{first}{rest}: "
    shared = {axis: level for axis, level in first.items() if all((axis, level) in each for each in choices)}
    return f"{_told(shared)}: " if shared else f"{_told(first)}{rest}: "


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("e-", "", 1).isdigit()
