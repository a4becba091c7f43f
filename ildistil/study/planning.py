"""The plan of a study: which commands run with which configuration, and what each waits for; checked as a whole."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from ildistil.errors import ConfigError, IldistilError
from ildistil.study.grid import Choice, Config, Grid, file_name, place, read_axes, unknown_keys

__all__ = ["Facts", "Job", "Plan", "Resolver", "Study", "make_plan"]

Command = Literal["fit", "finetune", "precompute"]
_KEYS = ["study", "title", "base", "axes", "runs", "exclude", "metric", "teacher", "targets", "finetune", "export"]
_SEED = "seed_everything"
_Where = str | Mapping[str, str]  # a place in words, or a run's factors


@dataclass(frozen=True)
class Facts:
    """What is known of a configuration once its models and data were looked at.

    Args:
        set: name of the first validation set, above what is measured on it.
        metrics: what is measured there.
        primary: which of these chooses the best student; ``None`` where nothing does.
        mode: whether that is to fall or to rise.
    """

    set: str
    metrics: Sequence[str]
    primary: str | None
    mode: Literal["min", "max"]


class Resolver(Protocol):
    """Reads configurations as the commands do, and checks them."""

    def configuration(self, command: Command, parts: Sequence[Config]) -> Config:
        """Return the whole configuration that partial ones make, the later winning.

        Raises:
            IldistilError: something in it is wrong.
        """

    def facts(self, command: Command, config: Config, later: Mapping[str, Config]) -> Facts:
        """Look at models, objectives and data of a configuration.

        Args:
            command: the command that reads it.
            config: all of it.
            later: models that are still to be made, each with the configuration that makes it.

        Raises:
            IldistilError: they don't exist, or don't go together.
        """

    def target_bytes(self, config: Config, later: Mapping[str, Config]) -> int:
        """Return how many bytes a configuration of ``precompute`` is still to write.

        Raises:
            IldistilError: its models or data don't exist, or something can't be stored.
        """


@dataclass(frozen=True)
class Job:
    """One command of a study, and the folder that it works in.

    Args:
        name: the folder within that of the study: runs/NAME, teachers/NAME, students/NAME or targets/NAME.
        command: what is run.
        factors: what differs between jobs of its kind.
        needs: names of jobs that it starts from.
        set: name of the validation set whose measures count.
        metric: which of these is the best student's; ``None`` for the last.
        mode: whether that is to fall or to rise.
        group: what it shares with runs of which only the best counts, as a fine-tuning over some learning rates.
        export: whether its student is exported.
    """

    name: str
    command: Command
    factors: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    set: str = "val"
    metric: str | None = None
    mode: Literal["min", "max"] = "max"
    group: str | None = None
    export: bool = False


@dataclass
class Plan:
    """All jobs of a study, those that others need first, with their configurations by name."""

    title: str
    jobs: list[Job] = field(default_factory=list)
    configs: dict[str, Config] = field(default_factory=dict)

    def add(self, job: Job, config: Config) -> None:
        """Add a job, unless it is there."""
        if job.name not in self.configs:
            self.jobs.append(job)
            self.configs[job.name] = config

    def as_dict(self) -> dict[str, Any]:
        """Return the plan without the configurations, as it is kept."""
        return {"title": self.title, "jobs": [asdict(job) for job in self.jobs]}


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
            parts = [study.base, *study.grid.parts(own), place("model.path", path)]
            found = self._configuration("finetune", parts, {f"finetune.{axis}": level for axis, level in own.items()})
            factors = _joined(choice, own)
            if found is not None:
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
        looked = _hash([command, {key: value for key, value in config.items() if key != _SEED}])
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
