"""How far a study is: in a line while it runs, in a table when it is asked."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ildistil.study import runs
from ildistil.study.jobs import Job
from ildistil.tables import table

__all__ = ["describe", "line"]


def line(
    folder: Path, jobs: Sequence[Job], done: set[str], failed: set[str], running: int, seconds: float | None
) -> str:
    """Return how much is done, what is left, and the best so far.

    Args:
        folder: of the study.
        jobs: all of them.
        done: names of those that are finished.
        failed: names of those that failed.
        running: how many run here.
        seconds: that a job took of the study's time; ``None`` while that isn't known.
    """
    left = len(jobs) - len(done) - len(failed)
    parts = [f"{len(done)} of {len(jobs)} done"]
    if failed:
        parts.append(f"{len(failed)} failed")
    if running:
        parts.append(f"{running} running")
    if left and seconds is not None:
        parts.append(f"about {_duration(left * seconds)} left")
    own = [job for job in jobs if job.name in done and job.name.startswith("runs/")]
    if best := _best(folder, own):
        parts.append(best)
    return "; ".join(parts) + "."


def describe(folder: Path) -> str:
    """Return the state of a study, and of each run that has begun.

    Args:
        folder: of the study.
    """
    plan = runs.read_plan(folder)
    jobs = [Job(**each) for each in plan["jobs"]]
    found = [(job, runs.read_run(folder, job, with_curve=False)) for job in jobs]
    count = Counter(run.state for _, run in found)
    head = f"{plan['title']}: {len(found)} in all, " + ", ".join(
        f"{count[state]} {state}" for state in ("finished", "running", "failed", "waiting") if count[state]
    )
    if (left := _seconds_left(found)) is not None:
        head += f"; about {_duration(left)} left"
    rows = [_row(job, run) for job, run in found if run.state != "waiting"]
    text = head
    if rows:
        text += f"\n\n{table(('name', 'state', 'metric', 'value', 'time', 'tokens/s', 'memory'), rows)}"
    for job, run in found:
        if run.reason:
            text += f"\n\n{job.name}: {run.reason}\nLog: {folder / job.name / runs.LOG}"
    finished = [job for job, run in found if run.state == "finished" and job.name.startswith("runs/")]
    return text + (f"\n\n{best[0].upper()}{best[1:]}." if (best := _best(folder, finished)) else "")


def _seconds_left(found: Sequence[tuple[Job, runs.Run]]) -> float | None:
    """Return how long the rest takes, by what jobs of each kind took; ``None`` where that isn't known."""
    took: dict[str, list[float]] = {}
    left: Counter[str] = Counter()
    for job, run in found:
        kind = job.name.split("/")[0]
        if run.state == "finished" and "seconds" in run.cost:
            took.setdefault(kind, []).append(run.cost["seconds"])
        left[kind] += run.state in ("running", "waiting")
    rest = {kind: count for kind, count in left.items() if count}
    if not rest or rest.keys() - took.keys():
        return None
    at_once = max(1, sum(run.state == "running" for _, run in found))
    return sum(count * sum(took[kind]) / len(took[kind]) for kind, count in rest.items()) / at_once


def _row(job: Job, run: runs.Run) -> tuple[str, ...]:
    cost, value = run.cost, run.metrics.get(job.metric or "")
    memory, speed = cost.get("peak_memory_bytes"), cost.get("tokens_per_second")
    return (
        job.name,
        run.state,
        job.metric or "",
        "" if value is None else f"{value:.4f}",
        _duration(cost["seconds"]) if "seconds" in cost else "",
        "" if speed is None else f"{speed:,.0f}",
        "" if memory is None else f"{memory / 2**30:.2f} GiB",
    )


def _best(folder: Path, jobs: Sequence[Job]) -> str:
    """Return the best run of each task in words; tasks aren't compared."""
    best: dict[str, tuple[float, Job]] = {}
    for job in jobs:
        value = runs.read_status(folder / job.name).get("metrics", {}).get(job.metric or "")
        if value is not None:
            task, signed = job.factors.get("task", ""), value if job.mode == "max" else -value
            if task not in best or signed > best[task][0]:
                best[task] = signed, job
    told = [
        f"{f'{task} ' if task else ''}{job.metric} {value if job.mode == 'max' else -value:.4f} "
        f"({job.name.removeprefix('runs/')})"
        for task, (value, job) in best.items()
    ]
    return f"best so far: {', '.join(told)}" if told else ""


def _duration(seconds: float) -> str:
    """Return a time in words.

    >>> _duration(59), _duration(600), _duration(9000)
    ('59 s', '10 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
