"""Run the jobs of a study, several at once, beside others who run the same study."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ildistil import storage
from ildistil.errors import Stopped
from ildistil.study import runs
from ildistil.study.jobs import Job, Plan
from ildistil.study.progress import line
from ildistil.study.worker import TAKEN, claim, fork, work

__all__ = ["keep_plan", "run_jobs"]

#: How often in succession a process may be killed before its first checkpoint, or without another one.
_KILLS = 10


def keep_plan(folder: Path, plan: Plan, say: Callable[[str], object] = print) -> None:
    """Write the plan of a study, and say what it adds to, and leaves out of, an earlier one."""
    new = {job.name for job in plan.jobs}
    if (folder / runs.PLAN).is_file():
        old = {each["name"] for each in runs.read_plan(folder)["jobs"]}
        there = {name for name in old - new if (folder / name).is_dir()}
        if new - old:
            say(f"Added since the last plan: {len(new - old)} ({_some(new - old)}).")
        if there:
            say(f"No longer in the study: {len(there)}, which stay as they are ({_some(there)}).")
    storage.write_text(folder / runs.PLAN, json.dumps(plan.as_dict(), indent=1))


def run_jobs(
    folder: Path, plan: Plan, at_once: int = 1, retry_failed: bool = False, say: Callable[[str], Any] = print
) -> bool:
    """Run what isn't finished; return whether all of it is in the end.

    Args:
        folder: of the study.
        plan: what there is to run.
        at_once: processes at a time, which share this machine's cores and GPUs.
        retry_failed: whether what failed before is tried again.
        say: takes a line when something happens.

    Raises:
        Stopped: this process was told to stop by a signal, and has told its runs, which are saved.
    """
    return _Runner(folder, plan, at_once, retry_failed, say).run()


@dataclass
class _Child:
    job: Job
    slot: int
    began: float = field(default_factory=time.monotonic)


class _Runner:
    def __init__(self, folder: Path, plan: Plan, at_once: int, retry: bool, say: Callable[[str], Any]) -> None:
        self.folder, self.plan, self.at_once, self.say = folder, plan, at_once, say
        self.jobs = jobs = plan.jobs
        self.children: dict[int, _Child] = {}
        self.kills: dict[str, tuple[int, float]] = {}
        states = {job.name: self._state(job) for job in jobs}
        self.done = {name for name, state in states.items() if state == "finished"}
        self.failed = {name for name, state in states.items() if state == "failed"}
        self.again = {name: self._beat(name) for name in self.failed} if retry else {}
        self.failed -= self.again.keys()
        self.needs = _ancestors(jobs)
        self.began_with = len(self.done)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // at_once))
        self.gpus = _gpus()
        self.stopping = 0
        self.began = time.monotonic()

    def run(self) -> bool:
        with self._listening():
            while True:
                self._reap()
                if self.stopping:
                    self._stop()
                waiting = self._start()
                if not self.children and not waiting:
                    break
                time.sleep(0.05 if self.children else 0.5)
        blocked = [job.name for job in self.jobs if job.name not in self.done | self.failed]
        if blocked:
            self.say(f"{len(blocked)} wait for what failed: {_some(blocked)}.")
        return not self.failed and not blocked

    def _start(self) -> bool:
        """Fill free places; return whether anything is left that this or another process can do."""
        left = False
        working = {child.job.name for child in self.children.values()}
        for job in self.jobs:
            if job.name in self.done | self.failed or job.name in working or self.failed & self.needs[job.name]:
                continue
            left = True
            if len(self.children) >= self.at_once:
                break
            if all(name in self.done for name in job.needs) and self._free(job):
                self._fork(job)
        return left

    def _free(self, job: Job) -> bool:
        """Return whether a job is left to do, and nobody else works on it."""
        handle = claim(self.folder / job.name)
        if handle is None:
            return False
        os.close(handle)  # the process that works on it takes it again
        state = self._state(job)
        if state == "finished":
            self._finished(job, "elsewhere")
        elif state == "failed" and self.again.get(job.name) != self._beat(job.name):
            self._failed(job)
        return job.name not in self.done | self.failed

    def _fork(self, job: Job) -> None:
        path = self.folder / "configs" / f"{job.name}.yaml"
        if not path.is_file():  # its name has the hash of what is in it
            storage.write_text(path, yaml.safe_dump(self.plan.configs[job.name], sort_keys=False))
        slot = next(n for n in range(self.at_once) if n not in {child.slot for child in self.children.values()})
        gpus = self.gpus[slot :: self.at_once] or self.gpus[slot % len(self.gpus) :][:1] if self.gpus else []
        parent = os.getpid()
        child = fork(lambda: work(self.folder, job, self.threads, gpus, parent))
        self.children[child] = _Child(job, slot)

    def _reap(self) -> None:
        """Take in what has ended."""
        for pid, child in list(self.children.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            del self.children[pid]
            code, job = os.waitstatus_to_exitcode(status), child.job
            state = self._state(job)
            if code == TAKEN and state != "failed":
                continue  # by another process; it is looked at again
            if state == "finished":
                self._finished(job, f"in {_time(time.monotonic() - child.began)}")
            elif code < 0 or code > 128:
                self._killed(job, code)
            else:
                self._failed(job)

    def _finished(self, job: Job, how: str) -> None:
        self.done.add(job.name)
        self.say(f"{job.name} finished {how}. {self._progress()}")

    def _progress(self) -> str:
        return line(self.folder, self.jobs, self.done, self.failed, len(self.children), self._rate())

    def _failed(self, job: Job) -> None:
        self.failed.add(job.name)
        reason = runs.read_status(self.folder / job.name).get("reason") or ""
        shown = "\n".join(f"    {each}" for each in str(reason).splitlines()[-4:])
        self.say(f"{job.name} failed; its log is {self.folder / job.name / runs.LOG}:\n{shown}")

    def _killed(self, job: Job, code: int) -> None:
        """Go on with a job that was killed, unless it gets nowhere."""
        if self.stopping:
            return
        signum = -code if code < 0 else code - 128
        saved = _saved(self.folder / job.name)
        kills, before = self.kills.get(job.name, (0, saved))
        kills = kills + 1 if saved == before else 1
        self.kills[job.name] = kills, saved
        if kills < _KILLS:
            self.say(f"{job.name} was stopped by {signal.Signals(signum).name}, and goes on.")
            return
        path = self.folder / job.name / runs.STATUS
        reason = f"It was stopped by signal {signum} {kills} times without getting on; often for want of memory."
        storage.write_text(path, json.dumps(runs.read_status(path.parent) | {"state": "failed", "reason": reason}))
        self._failed(job)

    def _rate(self) -> float | None:
        """Return the seconds that a job took of this study's time."""
        done = len(self.done) - self.began_with
        return (time.monotonic() - self.began) / done if done else None

    def _state(self, job: Job) -> str:
        return str(runs.read_status(self.folder / job.name).get("state", "waiting"))

    def _beat(self, name: str) -> object:
        return runs.read_status(self.folder / name).get("heartbeat")

    # Signals

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def note(signum: int, frame: object) -> None:
            if self.stopping:
                for pid in self.children:
                    os.killpg(pid, signal.SIGKILL)
            self.stopping = signum

        before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _stop(self) -> None:
        """Signal the runs to save and end, and wait for them."""
        self.say(f"Stopping: {len(self.children)} runs are saved. The same command goes on from there.")
        for pid in self.children:
            os.kill(pid, signal.SIGTERM)
        while self.children:
            self._reap()
            time.sleep(0.05)
        raise Stopped("The study was stopped by a signal.", self.stopping)


def _ancestors(jobs: Sequence[Job]) -> dict[str, set[str]]:
    """Return all that each job starts from; a plan has these before it."""
    found: dict[str, set[str]] = {}
    for job in jobs:
        found[job.name] = set(job.needs).union(*(found[name] for name in job.needs))
    return found


def _gpus() -> list[str]:
    """Return the names of the GPUs that there are to share."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name for name in told.split(",") if name.strip()]
    return [str(number) for number, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def _saved(folder: Path) -> float:
    """Return when a run last got on: its newest checkpoint."""
    return max((path.stat().st_mtime for path in folder.glob("checkpoints/*.ckpt")), default=0.0)


def _some(names: Any) -> str:
    found = sorted(names)
    return ", ".join(found[:4]) + (" ..." if len(found) > 4 else "")


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
