"""Plans of studies, with configurations that are merged and looked at without any model."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from ildistil.errors import ConfigError, ModelError
from ildistil.study import planning
from ildistil.study.jobs import Facts, Plan
from ildistil.study.planning import make_plan
from ildistil.study.specification import Study

TEACHER = {"class_path": "pretrained", "init_args": {"path": "./teacher"}}
BASE: dict[str, Any] = {
    "model": {"teacher": TEACHER, "student": {"layers": [1, 2]}, "tokenizer": None},
    "objectives": {"task": {"class_path": "TaskLoss"}},
    "data": {"class_path": "Glue", "init_args": {"task": "sst2"}},
    "trainer": {},
    "seed_everything": 0,
}
OBJECTIVES = {"kd": {"objectives": {"logits": {"class_path": "LogitsKL"}}}, "task": {}}


def merged(one: Any, other: Any) -> Any:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return copy.deepcopy(other)
    both = {key: merged(one[key], other[key]) if key in one else copy.deepcopy(other[key]) for key in other}
    return {**copy.deepcopy(one), **both}


class Resolver:
    def __init__(self, bytes: int = 100) -> None:
        self.bytes, self.looked, self.parsed = bytes, list[Any](), 0

    def configuration(self, command: str, parts: Sequence[Any]) -> dict[str, Any]:
        self.parsed += 1
        found: dict[str, Any] = {"seed_everything": 0}
        for part in parts:
            if "objectives" in part:
                found.pop("objectives", None)
            found = merged(found, part)
        if "data" not in found:
            raise ConfigError("There is no data.")
        if found["data"]["init_args"]["task"] == "none":
            raise ConfigError("There is no task 'none'.")
        return found

    def facts(self, command: str, config: Any, later: Mapping[str, Any]) -> Facts:
        self.looked.append((command, config, dict(later)))
        if command == "fit" and 9 in config["model"]["student"]["layers"]:
            raise ModelError("There is no layer 9.")
        return Facts("val", ["loss", "accuracy"], "accuracy", "max")

    def target_bytes(self, config: Any, later: Mapping[str, Any]) -> int:
        return self.bytes


def plan(resolver: Resolver | None = None, **given: Any) -> Plan:
    problems: list[str] = []
    study = Study.read({"study": "s", "base": BASE} | copy.deepcopy(given), problems)
    return make_plan(study, resolver or Resolver(), problems)


def refused(resolver: Resolver | None = None, **given: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        plan(resolver, **given)
    return str(error.value).splitlines()[1:]


def test_a_run_is_named_by_its_factors_and_its_whole_configuration() -> None:
    made = plan(axes={"objective": OBJECTIVES, "seed": [0, 1]})
    names = [job.name.rsplit("-", 1) for job in made.jobs]
    assert [name for name, _ in names] == [f"runs/{o}_seed{s}" for o in ("kd", "task") for s in (0, 1)]
    assert len({digest for _, digest in names}) == 4
    assert [job.factors for job in made.jobs][1] == {"objective": "kd", "seed": "1"}
    again = plan(axes={"objective": OBJECTIVES, "seed": [0, 1]})
    other = plan(base=merged(BASE, {"model": {"warmup": 0.1}}), axes={"objective": OBJECTIVES, "seed": [0, 1]})
    assert [job.name for job in made.jobs] == [job.name for job in again.jobs]
    assert not {job.name for job in made.jobs} & {job.name for job in other.jobs}


def test_seeds_share_what_is_read_and_looked_at() -> None:
    resolver = Resolver()
    made = plan(resolver, axes={"objective": OBJECTIVES, "seed": list(range(50))})
    assert (len(made.jobs), resolver.parsed, len(resolver.looked)) == (100, 2, 2)
    assert sorted(made.configs[job.name]["seed_everything"] for job in made.jobs)[::2] == list(range(50))


def test_a_teacher_is_fine_tuned_once_a_task_and_shared() -> None:
    tasks = {name: {"data": {"init_args": {"task": name}}} for name in ("sst2", "rte")}
    made = plan(
        axes={"objective": OBJECTIVES, "task": tasks, "seed": [0, 1]}, teacher={"finetune": {"model": {"path": "base"}}}
    )
    teachers = [job for job in made.jobs if job.name.startswith("teachers/")]
    assert [(job.command, job.factors, job.export) for job in teachers] == [
        ("finetune", {"task": "sst2"}, True), ("finetune", {"task": "rte"}, True)
    ]  # fmt: skip
    for job in made.jobs:
        if job.name.startswith("runs/"):
            (teacher,) = (each for each in teachers if each.factors["task"] == job.factors["task"])
            assert job.needs == [teacher.name]
            assert made.configs[job.name]["model"]["teacher"]["init_args"]["path"] == f"s/{teacher.name}/student"
            assert made.configs[teacher.name]["data"]["init_args"]["task"] == job.factors["task"]


def test_targets_are_stored_once_for_all_objectives_of_a_teacher() -> None:
    initialisations = {"a": {"model": {"student": {"layers": [1]}}}, "b": {"model": {"student": {"layers": [2]}}}}
    given = {"axes": {"objective": OBJECTIVES, "initialisation": initialisations}, "targets": True}
    made = plan(**given)
    stored, *runs = made.jobs
    assert stored.command == "precompute"
    union = made.configs[stored.name]["objectives"]
    assert sorted(term["class_path"] for term in union.values()) == ["LogitsKL", "TaskLoss"]
    assert all(job.needs == [stored.name] for job in runs)
    assert {made.configs[job.name]["model"]["targets"] for job in runs} == {f"s/{stored.name}/files"}
    # a mapping that asks which layers a student started from reads others for each
    mapped = {"hid": {"objectives": {"h": {"class_path": "HiddenMSE", "init_args": {"mapping": "FromInit"}}}}}
    made = plan(axes=given["axes"] | {"objective": mapped}, targets=True)
    assert [job.command for job in made.jobs] == ["precompute", "precompute", "fit", "fit"]


def test_a_distilled_student_is_fine_tuned_on_every_task() -> None:
    finetune = {
        "base": {"model": {"path": ""}, "data": BASE["data"]},
        "axes": {"task": ["sst2", "rte"], "learning_rate": [0.1, 0.2], "seed": [0]},
        "best_over": ["learning_rate"],
    }
    made = plan(axes={"objective": OBJECTIVES, "seed": [0]}, finetune=finetune)
    students = [job for job in made.jobs if job.name.startswith("students/")]
    runs = [job for job in made.jobs if job.name.startswith("runs/")]
    assert (len(students), len(runs)) == (2, 8)
    assert all(job.export and job.command == "fit" for job in students)
    assert all(made.configs[job.name]["model"]["path"] == f"s/{job.needs[0]}/student" for job in runs)
    expected = {"objective": "kd", "seed": "0", "task": "sst2", "learning_rate": "0.1", "finetune.seed": "0"}
    assert runs[0].factors == expected
    assert [len([job for job in runs if job.group == group]) for group in {job.group for job in runs}] == [2] * 4


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda folder: 150)
    axes = {
        "objective": {**OBJECTIVES, "preset": {"preset": "x"}},
        "initialisation": {"in": {}, "same": {}, "out": {"model": {"student": {"layers": [9]}}}},
        "task": ["sst2", "none"],
        "nothing": {},
    }
    given = {"axes": axes, "exclude": [{"task": "rte"}], "metric": "f1", "targets": True, "exports": True}
    lines = "\n".join(refused(Resolver(bytes=200), **given))
    for problem in (
        "exports: unknown. Did you mean 'export'?",
        "axes.nothing has no levels: the grid is empty.",
        "exclude[0]: the axis 'task' has no level 'rte'.",
        "base has objectives, which replace those of the presets in objective.",
        "task=none: There is no task 'none'.",
        "initialisation=out, task=sst2: There is no layer 9.",
        "no run logs the metric 'f1'. These do: loss, accuracy.",
        "the axis 'initialisation' changes nothing between 'in' and 'same'",
        "The targets of the study need 0.00 GB",
    ):
        assert problem in lines, problem


def test_a_study_needs_a_folder_and_lists() -> None:
    assert any("name the folder of the study" in line for line in refused(study=None))
    assert any("runs is 'all'. Give a list." in line for line in refused(runs="all"))
    assert any("finetune.axis: unknown" in line for line in refused(finetune={"axis": {}}))
    assert any("best_over: there is no axis 'rate'" in line for line in refused(finetune={"best_over": ["rate"]}))


def test_a_plan_is_json() -> None:
    made = plan(axes={"seed": [0]})
    assert json.loads(json.dumps(made.as_dict()))["jobs"][0]["name"] == made.jobs[0].name
