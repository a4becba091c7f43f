"""Ranks of objectives over tasks."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ildistil.errors import DataError
from ildistil.study.statistics import wording
from ildistil.study.statistics.checks import at_least, check_draws, check_level, finite
from ildistil.study.statistics.summary import Estimate

__all__ = ["Ranking", "ranks"]

Floats = NDArray[np.float64]
Runs = Mapping[str, Mapping[str, Mapping[Hashable, float]]]


@dataclass(frozen=True)
class Ranking:
    """Mean rank of each objective over tasks, 1 the best.

    Attributes:
        ranks: Objective to mean rank with its interval, the best first.
        tasks: Task to the number of seeds that all objectives have.
        left_out: Runs that not all objectives have.
    """

    ranks: dict[str, Estimate]
    tasks: dict[str, int]
    left_out: tuple[str, ...]

    def describe(self) -> str:
        """Return the ranks, best first, and what they are of, in words."""
        placed = "; ".join(
            f"{name} {each.value:.2f} ({each.low:.1f} to {each.high:.1f})" for name, each in self.ranks.items()
        )
        level = next(iter(self.ranks.values())).level
        seeds = ", ".join(f"{task} {n}" for task, n in self.tasks.items())
        return (
            f"mean rank of {len(self.ranks)}, with its {100 * level:g} % interval: {placed}; "
            f"{len(self.tasks)} tasks (seeds: {seeds}){wording.left_out(self.left_out)}"
        )


def ranks(
    runs: Runs, higher_is_better: bool = True, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Ranking:
    """Rank objectives on each task by their mean over seeds, and compute the mean rank over tasks.

    The interval is of the mean rank over tasks like these, with so many seeds: ``r ± t(tasks - 1) se``, cut to ranks
    that exist. ``se`` is ``sqrt(tasks / (tasks - 1))`` times the standard deviation of the mean rank over a bootstrap
    of tasks, and of the seeds within them, the same ones for all objectives. Where tasks are few, only differences
    that all of them agree on are narrow; where no resample changes a rank, the interval has no width, which means no
    more than this.

    Args:
        runs: Objective to task to seed to score.
        higher_is_better: Whether rank 1 is of the highest score.
        level: Of confidence.
        draws: Number of resamples.
        seed: Of the draws.

    Raises:
        DataError: Fewer than two objectives, or than two tasks with a seed that all objectives have, or NaN.

    Source: Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets", 2006.

    >>> scores = {"a": {"qnli": {0: 84.0, 1: 85.0}, "rte": {0: 61.0, 1: 60.0}}}
    >>> scores["b"] = {task: {seed: score - 2 for seed, score in seeds.items()} for task, seeds in scores["a"].items()}
    >>> ranks(scores).describe()
    'mean rank of 2, with its 95 % interval: a 1.00 (1.0 to 1.0); b 2.00 (2.0 to 2.0); 2 tasks (seeds: qnli 2, rte 2)'
    """
    check_level(level)
    check_draws(draws)
    at_least(len(runs), "objectives", 2)
    tables, left_out = _tables(runs)
    if len(tables) < 2:
        given = f"{len(tables)} with a seed that all objectives have{wording.left_out(left_out)}"
        raise DataError(f"At least 2 tasks are needed for a mean rank, got {given}.")
    signed = [table if higher_is_better else -table for table in tables.values()]
    seen = np.stack([_ranked(table.mean(0)) for table in signed]).mean(0)
    n, spread = len(signed), _resampled(signed, draws, np.random.default_rng(seed)).std(0)
    half = stats.t.ppf((1 + level) / 2, n - 1) * np.sqrt(n / (n - 1)) * spread
    low, high = np.maximum(seen - half, 1), np.minimum(seen + half, len(runs))
    placed = {name: Estimate(float(seen[i]), float(low[i]), float(high[i]), level) for i, name in enumerate(runs)}
    best_first = dict(sorted(placed.items(), key=lambda item: item[1].value))
    return Ranking(best_first, {task: len(table) for task, table in tables.items()}, left_out)


def _tables(runs: Runs) -> tuple[dict[str, Floats], tuple[str, ...]]:
    """Return the scores ``(seeds, objectives)`` of each task, and the runs that not all objectives have."""
    tables, left_out = {}, []
    for task in dict.fromkeys(task for tasks in runs.values() for task in tasks):
        of_task = {name: tasks.get(task, {}) for name, tasks in runs.items()}
        common = [seed for seed in next(iter(of_task.values())) if all(seed in each for each in of_task.values())]
        left_out += [f"{name} {task} {seed}" for name, each in of_task.items() for seed in each if seed not in common]
        if common:
            scores = [[each[seed] for each in of_task.values()] for seed in common]
            tables[task] = finite(scores, f"scores of {task}")
    return tables, tuple(left_out)


def _resampled(tables: list[Floats], draws: int, rng: np.random.Generator) -> Floats:
    """Return mean ranks over resampled tasks and seeds, ``(draws, objectives)``."""
    tasks = rng.integers(0, len(tables), (draws, len(tables)))
    total = np.zeros((draws, tables[0].shape[1]))
    for number, table in enumerate(tables):
        # Each time that a task is drawn, its seeds are drawn anew.
        draw, _ = np.nonzero(tasks == number)
        means = table[rng.integers(0, len(table), (draw.size, len(table)))].mean(1)
        np.add.at(total, draw, _ranked(means))
    return total / len(tables)


def _ranked(means: Floats) -> Floats:
    return np.asarray(stats.rankdata(-means, axis=-1))
