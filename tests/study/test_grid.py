import itertools
from typing import Any

import pytest

from ildistil.study.grid import Grid, file_name, read_axes

AXES = {"objective": {"kd": {"a": 1}, "att": {"preset": "x"}}, "seed": [0, 1, 2], "model.warmup": [0.0, 0.1]}


def grid(axes: Any = AXES) -> tuple[Grid, list[str]]:
    problems: list[str] = []
    return read_axes(axes, "axes", problems), problems


def choices(runs: list[Any], exclude: list[Any]) -> tuple[list[tuple[str, ...]], list[str]]:
    found, problems = grid()
    return [tuple(choice.values()) for choice in found.choices(runs, exclude, problems)], problems


def test_a_grid_is_the_product_of_its_axes() -> None:
    everything = list(itertools.product(["kd", "att"], "012", ["0.0", "0.1"]))
    assert choices([], []) == (everything, [])
    left = [c for c in everything if not (c[0] == "kd" and c[1] in "01") and c[2] != "0.1"]
    assert choices([], [{"objective": "kd", "seed": [0, 1]}, {"model.warmup": 0.1}]) == (left, [])


def test_runs_are_listed_instead_and_each_once() -> None:
    found, problems = choices([{"objective": "kd", "seed": 1}, {"seed": [1, 2], "model.warmup": 0.0}], [])
    assert problems == []
    assert sorted(found) == sorted(
        {("kd", "1", w) for w in ("0.0", "0.1")} | {(o, s, "0.0") for o in ("kd", "att") for s in "12"}
    )


def test_plain_values_are_of_what_their_axis_says() -> None:
    found, _ = grid({"objective": ["minilm"], "seed": [3], "task": ["rte"], "model.warmup": [0.1]})
    assert found.parts({"objective": "minilm", "seed": "3", "task": "rte", "model.warmup": "0.1"}) == [
        {"preset": "minilm"}, {"seed_everything": 3}, {"data": {"init_args": {"task": "rte"}}},
        {"model": {"warmup": 0.1}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "exclude", "message"),
    [
        ([{"objektive": "kd"}], [], "runs[0]: there is no axis 'objektive'. Did you mean 'objective'?"),
        ([{"objective": "kt"}], [], "runs[0]: the axis 'objective' has no level 'kt'. There are: kd, att."),
        ([3], [], "runs[0] is 3."),
        ([], [{"objective": ["kd", "no"]}], "exclude[0]: the axis 'objective' has no level 'no'."),
        ([{"objective": "kd"}], [{"objective": "att"}], "exclude[0] matches no run."),
        ([], [{}], "The study has no run"),
    ],
)
def test_what_matches_nothing_is_a_problem(runs: list[Any], exclude: list[Any], message: str) -> None:
    _, problems = choices(runs, exclude)
    assert any(each.startswith(message) for each in problems), problems


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["a"], "axes is ['a']. Name the axes"),
        ({"size": [1]}, "axes.size is a list, and it isn't known of what."),
        ({"seed": [1, 1]}, "axes.seed has a value twice"),
        ({"seed": []}, "axes.seed has no levels: the grid is empty."),
        ({"objective": {}}, "axes.objective has no levels: the grid is empty."),
        ({"objective": {"a": 3}}, "axes.objective.a is 3. A level is a partial configuration"),
        ({"objective": {"a/b": {}, "a b": {}}}, "axes.objective: the names 'a/b' and 'a b' clash"),
        ({"objective": {"KD": {}, "kd": {}}}, "axes.objective: the names 'KD' and 'kd' clash"),
    ],
)
def test_wrong_axes_are_problems(axes: Any, message: str) -> None:
    _, problems = grid(axes)
    assert any(each.startswith(message) for each in problems), problems


def test_names_of_folders_are_plain() -> None:
    assert file_name("../é x:y") == "é-x-y"
    assert file_name("...") == "none"
