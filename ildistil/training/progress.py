"""Keep what a run needs to go on: at steps' ends, every few minutes, at its end, and when it is told to stop."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from ildistil import distributed, storage
from ildistil.errors import ConfigError, Stopped, WriteError, writing
from ildistil.functional.checks import check_count, check_number
from ildistil.training.checkpoint_files import CheckpointFiles

__all__ = ["ResumeCheckpoint"]

OnWriteError = Literal["stop", "continue"]
# What a scheduler, a terminal or a person stops a process by.
_SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


class ResumeCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a training goes on exactly, and ``previous.ckpt``, the one before it.

    Both are written between two optimiser steps, where nothing is half done: every few minutes or steps, at the end of
    each epoch, and at the end of the training, whose final weights are always in ``last.ckpt``. On SIGTERM, SIGINT,
    SIGHUP and SIGUSR1 (sent to any of the processes) all processes save at the next step or epoch's end and stop with
    `Stopped`, which ends a script with the code 128 + the signal. A second SIGINT stops at once.

    Args:
        dirpath: folder of the files; default: ``checkpoints`` in the logger's folder.
        every_minutes: most minutes between two saves; ``None``: don't save by time.
        every_steps: optimiser steps between two saves; ``None``: don't save by steps.
        on_write_error: what happens when there is no space: ``"stop"`` the training, or ``"continue"`` with a warning.
            The old files stay either way.

    Raises:
        ConfigError: a number isn't positive, or ``on_write_error`` is something else.

    >>> ResumeCheckpoint(every_minutes=None, every_steps=1000).every_steps
    1000
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_minutes: float | None = 5.0,
        every_steps: int | None = None,
        on_write_error: OnWriteError = "stop",
    ) -> None:
        if every_minutes is not None:
            check_number("every_minutes", every_minutes, "> 0, or null to leave it out", lambda minutes: minutes > 0)
        if every_steps is not None:
            check_count("every_steps", every_steps)
        if on_write_error not in get_args(OnWriteError):
            raise ConfigError(f"on_write_error is 'stop' or 'continue', got {on_write_error!r}.")
        self.dirpath, self.every_minutes, self.every_steps = dirpath, every_minutes, every_steps
        self.on_write_error = on_write_error
        self._folder = Path(dirpath or ".")
        self._step = self._saved_step = -1
        self._saved_at = 0.0
        self._signal = self._stopping = 0
        self._due = False
        self._handlers: dict[signal.Signals, Any] = {}

    @property
    def last(self) -> Path:
        """The newest file."""
        return self._folder / "last.ckpt"

    # When

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, which is the same in all processes."""
        if stage == "fit":
            own = self.dirpath or os.path.join(trainer.log_dir or trainer.default_root_dir, "checkpoints")
            self._folder = Path(trainer.strategy.broadcast(own))

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to signals as soon as Lightning does, whose own handler can wait for other processes forever."""
        self._listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        self._listen()
        self._step = self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save between two steps, where it is time to; an epoch's last step is saved with its end."""
        if trainer.global_step == self._step or _in_last_batch(trainer):
            return
        self._step = trainer.global_step
        stopping, due = self._agreed(pl_module.device)
        if trainer.should_stop or self._step == trainer.max_steps:
            self._save(trainer)  # no other step may follow
        # Not here: the step is not logged, and not validated yet.
        self._stopping, self._due = stopping, bool(due or stopping or trainer.should_stop)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step once more, with what its validation found, where it ends an epoch halfway."""
        ends = self._saved_step == trainer.global_step == trainer.max_steps and not _in_last_batch(trainer)
        if ends and trainer.state.fn == TrainerFn.FITTING:
            self._save(trainer, keeps=False)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save before the next step what is due, with what a validation between them found."""
        self._settle(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the end of an epoch; it is saved when all callbacks are through with it."""
        self._stopping, _ = self._agreed(pl_module.device)
        # One that was cut short was saved at its last step, from where it can go on.
        self._due = _in_last_batch(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of the epoch before."""
        self._settle(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final weights, if they aren't yet."""
        self._due |= trainer.global_step != self._saved_step
        self._stopping, _ = self._agreed(pl_module.device)
        self._settle(trainer)

    def _settle(self, trainer: L.Trainer) -> None:
        """Save what is due, and stop if that is."""
        due, self._due = self._due, False
        if due:
            self._save(trainer)
        self._stop(self._stopping)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen no more."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Listen no more after a failure, where Lightning skips ``teardown``."""
        self._restore()

    def _agreed(self, device: torch.device) -> tuple[int, bool]:
        """Return the signal that any process got, and whether it is time to save in any: the same in all."""
        due = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        due |= self.every_steps is not None and self._step - self._saved_step >= self.every_steps
        # One number, since each question to all processes takes its time; a signal is saved whether or not that is due.
        vote = distributed.all_reduce_max(2 * self._signal + due, device)
        return vote // 2, bool(vote % 2)

    # What

    def _save(self, trainer: L.Trainer, keeps: bool = True) -> None:
        """Write the newest file; the one before it stays as ``previous.ckpt`` if ``keeps``."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if keeps and trainer.is_global_zero and self.last.is_file():
            _link(self.last, self.last.with_name("previous.ckpt"))
        files, failures = trainer.strategy.checkpoint_io, list[WriteError]()
        with files.collecting(failures) if isinstance(files, CheckpointFiles) else nullcontext():
            trainer.save_checkpoint(self.last, weights_only=False)
        if distributed.all_reduce_max(len(failures), trainer.strategy.root_device):
            error = failures[0] if failures else WriteError(f"Another process could not write {self.last}.")
            if self.on_write_error == "stop":
                raise error
            rank_zero_warn(f"The training goes on, and can't be resumed from step {trainer.global_step}. {error}")
        else:
            self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    # Signals

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for each in _SIGNALS:
            current = signal.getsignal(each)
            if current not in (self._note, signal.SIG_IGN):  # what is ignored, as by nohup, stays so
                self._handlers.setdefault(each, current)
                signal.signal(each, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT == self._signal:
            raise KeyboardInterrupt
        self._signal = signum

    def _restore(self) -> None:
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        self._handlers, self._signal, self._stopping, self._due = {}, 0, 0, False

    def _stop(self, signum: int) -> None:
        if signum:
            name = signal.Signals(signum).name
            message = (
                f"{name}: the training is saved at step {self._saved_step} in {self.last}, and can go on from there."
            )
            rank_zero_info(message)
            raise Stopped(message, signum)


def _link(file: Path, name: Path) -> None:
    """Link a file under a second name, in the place of what has it; rename it where there are no links."""
    draft = name.with_name(f".{name.name}{storage.DRAFT}link")
    with writing(name):
        draft.unlink(missing_ok=True)
        try:
            os.link(file, draft)
        except OSError:
            os.replace(file, name)
        else:
            os.replace(draft, name)
            draft.unlink(missing_ok=True)  # it stays where both were the same file already


def _in_last_batch(trainer: L.Trainer) -> bool:
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return bool(progress.is_last_batch)
