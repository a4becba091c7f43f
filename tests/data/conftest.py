from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from tiny_data import FORMATS, Rows


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("ILDISTIL_CACHE", str(cache))
    return cache


@pytest.fixture(autouse=True, scope="session")
def quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Rows], str]:
    """Write columns to a file in the format that its ending says; text is written as it is."""

    def write(name: str, rows: Rows | str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        else:
            FORMATS[path.suffix](path, rows)
        return str(path)

    return write
