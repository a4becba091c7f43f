"""Where Lightning's loops stand, written in the two forms that it goes on from rightly: in an epoch, or between two.

Lightning writes its counters as they are when a callback saves: before or after a validation, an epoch's last hook, or
the counter's own increment. From some of these it goes on an epoch too far, or without an epoch's first hooks.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["recount", "settle"]

_COUNTS = ("ready", "started", "processed", "completed")


def settle(loops: Mapping[str, Any], steps: int) -> None:
    """Rewrite the counters of a checkpoint's ``fit_loop``.

    Args:
        loops: what Lightning wrote; changed in place.
        steps: number of optimiser steps made.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    over = batches["is_last_batch"] and batches["current"]["processed"] == batches["current"]["ready"]
    within = epochs["current"]["processed"] < epochs["current"]["started"] and not over
    for counts in (epochs["total"], epochs["current"]):
        started = counts["started"]
        counts |= dict.fromkeys(_COUNTS, started) | (
            {"processed": started - 1, "completed": started - 1} if within else {}
        )
    for counts in (batches["total"], batches["current"]):
        # As at the end of a batch, when callbacks save and its own counter follows.
        counts |= dict.fromkeys(_COUNTS, counts["processed"])
        if within and batches["current"]["processed"]:
            counts["completed"] -= 1
    if not within:
        batches["current"] |= dict.fromkeys(_COUNTS, 0)
    batches["is_last_batch"] = False
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for counts in (validation["total"], validation["current"]):
        counts |= dict.fromkeys(_COUNTS, 0)
    validation["is_last_batch"] = False
    # Lightning adds one where it begins within an epoch.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = max(0, steps - within)


def recount(loops: Mapping[str, Any], was: int, now: int) -> None:
    """Rewrite the counters of a settled ``fit_loop`` for batches of another size, or on other processes.

    A batch that is over in part only begins anew.

    Args:
        loops: what a checkpoint holds; changed in place.
        was: rows that all processes together took at once.
        now: rows that they take now.
    """
    if was == now:
        return
    batches = loops["epoch_loop.batch_progress"]
    over = batches["current"]["ready"]
    here = over * was // now
    before = round((batches["total"]["ready"] - over) * was / now)
    for counts, ready in ((batches["total"], before + here), (batches["current"], here)):
        counts |= dict.fromkeys(_COUNTS, ready)
        if here:  # as in `settle`
            counts["completed"] -= 1
