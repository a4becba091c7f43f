"""A training on a corpus goes on exactly, also on another number of processes."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "data"))

from ddp_corpus import ROWS_OF_A_STEP, fit

from corpora import write_corpus
from ildistil.errors import CheckpointError, DataError

STEPS = 9  # of an epoch; the last is not whole
Seen = list[tuple[int, int, list[Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder / "corpus.txt", 43)
    return folder


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def whole(folder: Path) -> tuple[Seen, Any]:
    """A training of one process, left alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen, module, _ = fit(folder / "whole")
    return seen, module


def steps(*shares: Seen) -> dict[tuple[int, int], list[Any]]:
    """The rows of each step, from all processes and accumulated batches."""
    found: dict[tuple[int, int], list[Any]] = {}
    for epoch, step, rows in (batch for share in shares for batch in share):
        found.setdefault((epoch, step), []).extend(rows)
    return {at: sorted(rows) for at, rows in found.items()}


@pytest.mark.parametrize(("workers", "stop"), [(0, 3), (2, 9), (2, 11)])
def test_a_training_that_goes_on_ends_as_if_left_alone(
    workers: int, stop: int, folder: Path, whole: tuple[Seen, Any], tmp_path: Path
) -> None:
    halved = folder / tmp_path.name
    first, _, _ = fit(halved, stop=stop, num_workers=workers)
    second, module, trainer = fit(halved, path=halved / "last.ckpt", num_workers=workers)
    assert first + second == whole[0]
    assert trainer.global_step == 2 * STEPS
    weights = whole[1].student.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in module.student.state_dict().items())


def test_two_processes_train_as_one_and_either_goes_on_where_the_other_was(
    folder: Path, whole: tuple[Seen, Any]
) -> None:
    """The same rows and masks in every step, the same gradients, and the epochs end where they should."""
    stop = 4
    fit(folder / "one", stop=stop)
    shutil.copy(folder / "one" / "last.ckpt", folder / "one.ckpt")
    script = Path(__file__).with_name("ddp_corpus.py")
    done = subprocess.run([sys.executable, str(script), str(folder), str(stop)], capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    undisturbed, until, joined = (
        [json.loads((folder / f"{name}{rank}.json").read_text()) for rank in range(2)]
        for name in ("whole", "halved", "joined")
    )
    alone = steps(whole[0])
    assert json.dumps(list(steps(*undisturbed).values())) == json.dumps(list(alone.values()))
    assert json.dumps(list(steps(*until).values())) == json.dumps(list(alone.values())[:stop])
    assert json.dumps(list(steps(*joined).values())) == json.dumps(list(alone.values())[stop:])
    weights = whole[1].student.state_dict()
    for name, value in torch.load(folder / "whole.pt", weights_only=True).items():
        assert torch.allclose(value, weights[name], rtol=1e-9, atol=1e-9), name

    for accumulate in (1, 2):  # one process, of batches twice as large, or twice as many
        shutil.copytree(folder / "halved", folder / f"on{accumulate}")
        seen, module, trainer = fit(folder / f"on{accumulate}", accumulate=accumulate,
                                    path=folder / f"on{accumulate}" / "last.ckpt")  # fmt: skip
        assert list(steps(seen).items()) == list(alone.items())[stop:]
        assert [len(rows) for *_, rows in seen[:3]] == [ROWS_OF_A_STEP // accumulate] * 3
        assert trainer.global_step == 2 * STEPS
        assert trainer.current_epoch == 2
        if accumulate == 1:  # else terms that count tokens and examples are weighed by averages (see `Window`)
            assert all(torch.allclose(value, weights[name], rtol=1e-9, atol=1e-9)
                       for name, value in module.student.state_dict().items())  # fmt: skip


@pytest.mark.parametrize(("accumulated", "stop"), [((1, 4), 5), ((4, 1), 9), ((2, 8), 13)])
def test_other_batches_of_the_same_step_go_on_where_it_was(
    accumulated: tuple[int, int], stop: int, folder: Path, whole: tuple[Seen, Any], tmp_path: Path
) -> None:
    halved = folder / tmp_path.name
    first, _, _ = fit(halved, stop=stop, accumulate=accumulated[0])
    second, _, trainer = fit(halved, path=halved / "last.ckpt", accumulate=accumulated[1])
    assert list(steps(first + second).items()) == list(steps(whole[0]).items())
    assert (trainer.global_step, trainer.current_epoch) == (2 * STEPS, 2)


def test_another_size_of_a_step_is_named_and_refused_unless_accepted(folder: Path, tmp_path: Path) -> None:
    halved = folder / tmp_path.name
    fit(halved, stop=3)
    path = Path(shutil.copy(halved / "last.ckpt", halved / "kept.ckpt"))
    with pytest.raises(CheckpointError, match="a step: 8 rows in the checkpoint, 6 rows now"):
        fit(halved, rows=6, path=path)
    # 24 rows were seen, 4 batches of 6.
    seen, _, _ = fit(halved, rows=6, path=path, accept=True)
    whole = [row for _, _, rows in fit(folder / f"{tmp_path.name}-whole", rows=6)[0] for row in rows]
    assert [row for _, _, rows in seen for row in rows] == whole[24:]
    # Batches of a number of tokens have no place in that order: the epoch begins.
    budget = {"packed": False, "tokens_per_batch": 64}
    seen, _, trainer = fit(halved, path=path, accept=True, **budget)
    assert {row[0] for epoch, _, rows in seen for row in rows if epoch == 0} == set(range(43))
    assert trainer.current_epoch == 2
    for changes in ({"labels": "masked", "mask_probability": 0.3}, {"whole_words": True}):
        with pytest.raises(CheckpointError, match="data: Corpus .* in the checkpoint, Corpus .* now"):
            fit(halved, path=path, **changes)
    with pytest.raises(DataError, match="labels are for a causal-lm head, and the student, a BertForMaskedLM"):
        fit(halved, path=path, labels="next")
