from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ildistil.capture import ModelInfo
from ildistil.errors import ConfigError
from ildistil.mappings import (
    All,
    Explicit,
    First,
    FromInit,
    Last,
    LayerMapping,
    Random,
    Skip,
    Uniform,
    UniformConsecutive,
    UniformLast,
)


def sizes(depth: int, init_layers: tuple[int, ...] | None = None) -> ModelInfo:
    return ModelInfo("model", depth, init_layers=init_layers)


@pytest.mark.parametrize(
    ("mapping", "student", "teacher", "pairs"),
    [
        (Uniform(), 3, 12, [(1, 4), (2, 8), (3, 12)]),
        (Uniform(), 5, 12, [(1, 3), (2, 5), (3, 8), (4, 10), (5, 12)]),
        (Uniform(), 4, 4, [(1, 1), (2, 2), (3, 3), (4, 4)]),
        (Last(), 3, 12, [(3, 12)]),
        (Last(2), 3, 12, [(2, 11), (3, 12)]),
        (First(), 3, 12, [(1, 1), (2, 2), (3, 3)]),
        (First(1), 3, 12, [(1, 1)]),
        (Explicit([[1, 4], [1, 8], [-1, -1]]), 3, 12, [(1, 4), (1, 8), (3, 12)]),
        (Skip(), 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
        (Skip(), 5, 12, [(1, 2), (2, 4), (3, 6), (4, 8)]),
        (Skip(1), 3, 12, [(1, 1), (2, 2)]),
        (Skip(8), 3, 12, [(1, 8)]),
        (UniformConsecutive(), 2, 4, [(1, 1), (1, 2), (2, 3), (2, 4)]),
        (UniformConsecutive(), 2, 3, [(1, 1), (1, 2), (2, 3)]),
        (UniformConsecutive(), 4, 2, [(1, 1), (2, 1), (3, 2), (4, 2)]),
        (UniformLast(), 3, 12, [(1, 1), (2, 5), (3, 9), (3, 12)]),
        (UniformLast(), 2, 2, [(1, 1), (2, 2)]),
        (All(), 2, 3, [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]),
    ],
)
def test_rules(mapping: LayerMapping, student: int, teacher: int, pairs: list[tuple[int, int]]) -> None:
    assert mapping.pairs(sizes(student), sizes(teacher)) == pairs


@given(st.integers(1, 24), st.integers(0, 24))
def test_uniform_is_increasing_and_ends_at_the_last_layer(student: int, more: int) -> None:
    pairs = Uniform().pairs(sizes(student), sizes(student + more))
    targets = [t for _, t in pairs]
    assert [s for s, _ in pairs] == list(range(1, student + 1))
    assert targets == sorted(set(targets))
    assert targets[-1] == student + more


@given(st.integers(1, 24), st.integers(0, 24))
def test_blocks_hold_every_teacher_layer_once_and_are_as_equal_as_possible(student: int, more: int) -> None:
    pairs = UniformConsecutive().pairs(sizes(student), sizes(student + more))
    assert [t for _, t in pairs] == list(range(1, student + more + 1))
    lengths = [sum(s == i for s, _ in pairs) for i in range(1, student + 1)]
    assert max(lengths) - min(lengths) <= 1


def test_from_init_reads_where_the_student_started() -> None:
    assert FromInit().pairs(sizes(3, (2, 4, 6)), sizes(6)) == [(1, 2), (2, 4), (3, 6)]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (Explicit([[1, 13]]), r"teacher layer 13 is out of range; the teacher has layers 1..12, or -1..-12"),
        (Explicit([[0, 1]]), r"student layer 0 is out of range \(0 is the embedding output, which only hidden states"),
        (Explicit([[-4, 1]]), "student layer -4 is out of range|student layer 0 is out of range"),
        (Explicit([[1, 2], [1, -11]]), "more than once"),
        (Last(4), "student layer 0 is out of range"),
        (First(4), "student layer 4 is out of range"),
        (FromInit(), "does not say which teacher layers"),
        (Skip(13), "gives no pair of layers for 3 student and 12 teacher layers"),
    ],
)
def test_bad_pairs_are_refused(mapping: LayerMapping, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mapping.pairs(sizes(3), sizes(12))


@pytest.mark.parametrize(
    "make", [lambda: Last(0), lambda: First(0), lambda: Skip(0), lambda: Explicit([]), lambda: Explicit([[1]])]
)
def test_bad_settings_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="must be at least 1|expected pairs"):
        make()  # type: ignore[operator]


def test_the_embedding_output_counts_for_hidden_states() -> None:
    assert Explicit([[0, 0]]).pairs(sizes(3), sizes(12), lowest=0) == [(0, 0)]


@pytest.mark.parametrize(
    "layers",
    [
        [[1.0, 4]],
        [[True, 4]],
        [["1", "4"]],
        ["14"],
        "14",
        [1, 4],
        5,
        [[1, 4, 8]],
        [[1, None]],
        [[1, 4], [2]],
    ],
    ids=str,
)
def test_pairs_that_are_no_integers_are_refused(layers: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"Explicit: expected pairs .* of integers such as \[\[1, 4\], \[2, 8\]\], got"
    ):
        Explicit(layers)


@pytest.mark.parametrize("number", [1.5, 1.0, True, "2", None])
def test_numbers_that_are_no_integers_are_refused(number: Any) -> None:
    makes = [Last, lambda n: Random(seed=n)] + ([First, Skip] if number is not None else [])
    for make in makes:
        with pytest.raises(ConfigError, match=rf"must be an integer and must be at least \d, got {number!r}"):
            make(number)


@pytest.mark.parametrize("pairs", [[(1.0, 4)], [(1,)], [1], [(1, 2, 3)], [(False, 1)]], ids=str)
def test_a_rule_of_ones_own_that_gives_no_pairs_is_refused(pairs: Any) -> None:
    class Own(LayerMapping):
        def __call__(self, student: int, teacher: int) -> list[tuple[int, int]]:
            return pairs  # type: ignore[no-any-return]

    with pytest.raises(ConfigError, match=r"expected pairs \[student layer, teacher layer\] of integers"):
        Own().pairs(sizes(3), sizes(12))


@pytest.mark.parametrize("mapping", [Uniform(), Skip(), Last(), UniformLast(), Random(), All()], ids=str)
def test_a_model_without_layers_is_refused(mapping: LayerMapping) -> None:
    with pytest.raises(ConfigError, match="the student has no layers to map"):
        mapping.pairs(sizes(0), sizes(12))


def test_pairs_do_not_change_with_the_list_they_came_from() -> None:
    layers = [[1, 4], [2, 8]]
    mapping = Explicit(layers)
    layers[0][1] = 5
    layers.append([3, 12])
    assert mapping(3, 12) == [(1, 4), (2, 8)]
    assert mapping == Explicit([(1, 4), (2, 8)])


def test_depths_alone_do_not_say_where_a_student_started() -> None:
    with pytest.raises(ConfigError, match="FromInit needs the student's record"):
        FromInit()(3, 12)
