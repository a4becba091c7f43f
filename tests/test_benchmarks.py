"""Benchmarks are commands, not timed tests; here only that they start, and measure what they say."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


@pytest.mark.parametrize("name", [p.name for p in sorted(FOLDER.glob("*.py")) if p.stem not in ("measure", "chart")])
def test_a_benchmark_says_what_it_measures(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert "--json" in said
    assert f"python benchmarks/{name}" in said


def test_the_peak_of_memory_is_what_a_step_takes() -> None:
    from measure import peak_memory  # type: ignore[import-not-found]

    size = 64 * 2**20
    assert 0.95 * size < peak_memory(lambda: torch.ones(size // 4).sum()) < 1.2 * size


def test_medians_of_interleaved_steps() -> None:
    from measure import interleaved

    calls: list[str] = []
    steps = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = interleaved(steps, repeats=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert set(found) == {"a", "b"}
