import dataclasses
import json
import math
import time
from pathlib import Path

import pytest

from ildistil.errors import DataError, MissingFileError
from ildistil.study.runs import Run, read_csv, read_runs, write_csv

FACTORS = {"objective": "att-kl", "seed": "0"}


def study(folder: Path, *names: str) -> Path:
    (folder / "study.json").write_text(json.dumps({"runs": [{"name": name, "factors": FACTORS} for name in names]}))
    return folder


def put(folder: Path, name: str, status: dict[str, object], **files: str) -> None:
    (folder / "runs" / name).mkdir(parents=True)
    (folder / "runs" / name / "status.json").write_text(json.dumps(status))
    for file, text in files.items():
        (folder / "runs" / name / file.replace("_", ".")).write_text(text)


def test_a_table_gives_the_same_runs_back(tmp_path: Path) -> None:
    runs = [
        Run("a", FACTORS, "finished", {"accuracy": 1 / 3, "loss": math.inf}, [{"step": 9.0, "accuracy": 0.1 + 0.2}],
            {"seconds": 2.5e-7}, tmp_path / "runs" / "a" / "predictions.tsv"),
        Run("b", {"objective": "x, \"y\"\n", "other": "1"}, "failed", reason="error: one\nand 'two'"),
        Run("c", FACTORS),
    ]  # fmt: skip
    write_csv(runs, tmp_path / "results" / "all.csv")
    assert read_csv(tmp_path / "results" / "all.csv") == [
        dataclasses.replace(run, curve=list(run.curve)) for run in runs
    ]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no file"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_text("name,state\na,finished\n")
    with pytest.raises(DataError, match="no column curve, predictions, reason"):
        read_csv(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("name,state,metrics.a,predictions,reason,curve\na,finished,much,,,\n")
    with pytest.raises(DataError, match="line 2"):
        read_csv(tmp_path / "x.csv")


def test_runs_are_read_in_every_state(tmp_path: Path) -> None:
    study(tmp_path, "done", "on", "gone", "bad", "never")
    curve = '{"step": 4, "accuracy": 0.75}\n{"step": 9, "accuracy": 0.5}\n'
    status = {"state": "finished", "metrics": {"accuracy": 0.75}, "cost": {"seconds": 3.0}}
    put(tmp_path, "done", status, metrics_jsonl=curve, predictions_tsv="row_id\n")
    logged = "step,train/loss,val/accuracy\n4,0.5,\n4,,0.25\n9,,0.5\n10,,0.9"  # the last line was cut by a kill
    put(tmp_path, "on", {"state": "running", "heartbeat": time.time()}, metrics_csv=logged)
    put(tmp_path, "gone", {"state": "running", "heartbeat": time.time() - 1e4}, metrics_csv="")
    put(tmp_path, "bad", {"state": "failed", "reason": "no space"})
    runs = {run.name: run for run in read_runs(tmp_path)}
    assert [run.state for run in runs.values()] == ["finished", "running", "waiting", "failed", "waiting"]
    assert runs["done"].metrics == {"accuracy": 0.75}
    assert runs["done"].curve == [{"step": 4, "accuracy": 0.75}, {"step": 9, "accuracy": 0.5}]
    assert runs["done"].predictions == tmp_path / "runs" / "done" / "predictions.tsv"
    assert runs["on"].curve == [{"step": 4, "accuracy": 0.25}, {"step": 9, "accuracy": 0.5}]
    assert runs["on"].predictions is None
    assert runs["bad"].reason == "no space"
    assert runs["never"].factors == FACTORS


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no study"):
        read_runs(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_runs(tmp_path)
