"""The runner, with commands that only leave traces: what runs when, how often, and what becomes of failures."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ildistil.errors import Stopped
from ildistil.study import runs, worker
from ildistil.study.jobs import Job, Plan
from ildistil.study.progress import describe
from ildistil.study.runner import keep_plan, run_jobs
from ildistil.study.worker import fork


def jobs(count: int, **options: list[str]) -> list[Job]:
    return [Job(f"runs/{n}", "fit", {"n": str(n)}, options.get(str(n), []), metric="accuracy") for n in range(count)]


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path, Job], None]], None]:
    """Set what jobs do; each leaves a line in ``trace`` when it begins."""

    def replace(function: Callable[[Path, Job], None]) -> None:
        def commands(study: Path, job: Job) -> None:
            with (study / "trace").open("a") as file:
                file.write(f"{job.name} {os.getpid()}\n")
            function(study, job)

        monkeypatch.setattr(worker, "_commands", commands)
        monkeypatch.setattr(worker, "_outcome", lambda folder, job: {"metrics": {"accuracy": int(job.name[5:]) / 10}})

    return replace


def study(folder: Path, own: list[Job]) -> Plan:
    plan = Plan("Mine", own, {job.name: {"of": job.name} for job in own})
    keep_plan(folder, plan, say=str)
    return plan


def trace(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "trace").read_text().splitlines()]


def test_each_job_runs_once_and_after_what_it_needs(tmp_path: Path, act: Callable[..., None]) -> None:
    act(lambda folder, job: None)
    own = study(tmp_path, jobs(5, **{"0": [], "3": ["runs/0", "runs/2"]}))
    said: list[str] = []
    assert run_jobs(tmp_path, own, 2, say=said.append)
    assert sorted(trace(tmp_path)) == [job.name for job in own.jobs]
    assert max(trace(tmp_path).index(name) for name in ("runs/0", "runs/2")) < trace(tmp_path).index("runs/3")
    assert "5 of 5 done; best so far: accuracy 0.4000 (4)." in said[-1]
    assert run_jobs(tmp_path, own, 2, say=said.append)  # nothing is left
    assert len(trace(tmp_path)) == 5
    assert "Mine: 5 in all, 5 finished" in describe(tmp_path)


def test_a_failure_is_told_and_stops_nothing_but_what_needs_it(tmp_path: Path, act: Callable[..., None]) -> None:
    def do(folder: Path, job: Job) -> None:
        if job.name == "runs/0" and not (folder / "mended").exists():
            print("about to fail")
            raise SystemExit(2)

    act(do)
    own, said = study(tmp_path, jobs(4, **{"1": ["runs/0"], "2": ["runs/1"]})), list[str]()
    assert not run_jobs(tmp_path, own, say=said.append)
    assert trace(tmp_path) == ["runs/0", "runs/3"]
    assert any("runs/0 failed" in text and "about to fail" in text for text in said)
    assert said[-1] == "2 wait for what failed: runs/1, runs/2."
    assert runs.read_runs(tmp_path)[0].reason == "about to fail"
    assert "about to fail" in describe(tmp_path)
    assert not run_jobs(tmp_path, own, say=str)  # as it is
    assert not run_jobs(tmp_path, own, retry_failed=True, say=str)  # once more, and no more than that
    assert trace(tmp_path) == ["runs/0", "runs/3", "runs/0"]
    (tmp_path / "mended").touch()
    assert run_jobs(tmp_path, own, retry_failed=True, say=str)
    assert trace(tmp_path)[3:] == ["runs/0", "runs/1", "runs/2"]


def test_what_is_killed_goes_on_unless_it_gets_nowhere(tmp_path: Path, act: Callable[..., None]) -> None:
    def do(folder: Path, job: Job) -> None:
        times = trace(folder).count(job.name)
        if job.name == "runs/0" or times < 4:
            os.kill(os.getpid(), signal.SIGKILL)

    act(do)
    own, said = study(tmp_path, jobs(2)), list[str]()
    assert not run_jobs(tmp_path, own, 2, say=said.append)
    assert trace(tmp_path).count("runs/1") == 4
    assert trace(tmp_path).count("runs/0") == 10
    assert [run.state for run in runs.read_runs(tmp_path)] == ["failed", "finished"]
    assert "without getting on" in (runs.read_runs(tmp_path)[0].reason or "")


def test_two_invocations_share_the_work(tmp_path: Path, act: Callable[..., None]) -> None:
    act(lambda folder, job: time.sleep(0.05))
    own = study(tmp_path, jobs(12))
    children = [fork(lambda: 0 if run_jobs(tmp_path, own, 2, say=str) else 1) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert sorted(trace(tmp_path)) == sorted(job.name for job in own.jobs)


def test_a_killed_study_ends_its_runs_and_goes_on(tmp_path: Path, act: Callable[..., None]) -> None:
    act(lambda folder, job: time.sleep(0 if (folder / "quick").exists() else 60))
    own = study(tmp_path, jobs(2))
    child = fork(lambda: run_jobs(tmp_path, own, 2, say=str))
    while not (tmp_path / "trace").exists() or len(trace(tmp_path)) < 2:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / "quick").touch()
    began = time.monotonic()
    assert run_jobs(tmp_path, own, 2, say=str)  # the locks of the runs are free once these are gone
    assert time.monotonic() - began < 30
    assert sorted(trace(tmp_path)) == ["runs/0", "runs/0", "runs/1", "runs/1"]


def test_a_signal_is_passed_on_and_ends_the_study(tmp_path: Path, act: Callable[..., None]) -> None:
    def do(folder: Path, job: Job) -> None:
        signal.signal(signal.SIGTERM, lambda *_: (folder / "saved").touch() or exit(128 + signal.SIGTERM))
        (folder / "begun").touch()
        time.sleep(60)

    act(do)
    own = study(tmp_path, jobs(3))

    def run() -> int:
        try:
            run_jobs(tmp_path, own, say=str)
        except Stopped as stopped:
            return int(stopped.code or 0)
        return 0

    child = fork(run)
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    assert (tmp_path / "saved").exists()
    assert [run.state for run in runs.read_runs(tmp_path)] == ["waiting"] * 3


def test_threads_stay_those_a_run_began_with(tmp_path: Path, act: Callable[..., None],
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    act(lambda folder, job: (folder / "threads").write_text(os.environ["OMP_NUM_THREADS"]))  # type: ignore[arg-type]
    own = study(tmp_path, jobs(2))
    (tmp_path / "runs/1").mkdir(parents=True)
    (tmp_path / "runs/1/status.json").write_text(json.dumps({"state": "waiting", "threads": 3}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run_jobs(tmp_path, Plan("", own.jobs[:1], own.configs), say=str)
    assert (tmp_path / "threads").read_text() == "1"
    assert run_jobs(tmp_path, own, say=str)
    assert (tmp_path / "threads").read_text() == "3"


def test_another_plan_adds_runs_and_names_those_that_are_left(tmp_path: Path, act: Callable[..., None]) -> None:
    act(lambda folder, job: None)
    assert run_jobs(tmp_path, study(tmp_path, jobs(3)), say=str)
    said: list[str] = []
    left = [*jobs(3)[1:], Job("runs/7", "fit")]
    other = Plan("Mine", left, {job.name: {} for job in left})
    keep_plan(tmp_path, other, said.append)
    assert said == ["Added since the last plan: 1 (runs/7).",
                    "No longer in the study: 1, which stay as they are (runs/0)."]  # fmt: skip
    assert run_jobs(tmp_path, other, say=str)
    assert trace(tmp_path)[3:] == ["runs/7"]
    assert [run.name for run in runs.read_runs(tmp_path)] == ["1", "2", "7"]


def test_the_best_of_a_group_stands_for_it(tmp_path: Path) -> None:
    own = [Job(f"runs/{n}", "finetune", {"rate": str(n)}, metric="loss", mode="min", group="g" if n < 3 else None)
           for n in range(4)]  # fmt: skip
    study(tmp_path, own)
    for n, loss in enumerate((0.5, 0.25, 0.75, 0.1)):
        (tmp_path / "runs" / str(n)).mkdir(parents=True)
        status = {"state": "finished", "metrics": {"loss": loss}}
        (tmp_path / "runs" / str(n) / "status.json").write_text(json.dumps(status))
    assert [run.name for run in runs.read_runs(tmp_path)] == ["1", "3"]
    assert len(runs.read_runs(tmp_path, every=True)) == 4
    (tmp_path / "runs/2/status.json").write_text(json.dumps({"state": "failed", "reason": "no"}))
    assert [run.state for run in runs.read_runs(tmp_path)] == ["failed", "finished"]


def test_a_thousand_runs_are_described_in_no_time(tmp_path: Path) -> None:
    own = study(tmp_path, jobs(1000))
    curve = "".join(json.dumps({"step": step, "accuracy": 0.5, "loss": 0.7}) + "\n" for step in range(20))
    for job in own.jobs:
        (tmp_path / job.name).mkdir(parents=True)
        status = {"state": "finished", "metrics": {"accuracy": 0.5}, "cost": {"seconds": 60.0}}
        (tmp_path / job.name / "status.json").write_text(json.dumps(status))
        (tmp_path / job.name / "metrics.jsonl").write_text(curve)
    began = time.monotonic()
    assert "1000 in all, 1000 finished" in describe(tmp_path)
    assert time.monotonic() - began < 2
    assert len(runs.read_runs(tmp_path)[999].curve) == 20
