"""What a training changes for its time: frozen parameters, callbacks that wait, hooks on the models."""

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

__all__ = ["Lifecycle", "watches"]

# When callbacks look at a metric.
_LOOKS = ("on_train_batch_end", "on_validation_end", "on_train_epoch_end")


class Lifecycle(Callback):
    """Undoes at the end of a training, however it ends, what the training changed for its time.

    A Distiller adds it to the Trainer by ``configure_callbacks``.
    """

    def __init__(self) -> None:
        self._frozen: list[nn.Parameter] = []
        self._waiting: list[Callback] = []

    def freeze(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze what no term reaches: DDP waits for the gradient of every parameter that requires one.

        It has to happen before DDP wraps the module, and is undone only when training is over.
        """
        for parameter in parameters:
            parameter.requires_grad_(False)
            self._frozen.append(parameter)

    def copy_again(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Make callbacks that average weights copy the module once more, now that it has its projections."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StochasticWeightAveraging):
                callback.setup(trainer, module, "fit")

    def restore(self, module: Any) -> None:
        """Leave the models as they came; repeatable."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self._resume()
        module.distillation.detach()

    # Callbacks that watch a metric wait until the last stage: what they would compare before is not what is trained.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See to the callbacks; a run that is resumed starts anywhere."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start early stopping and the best checkpoint with the last stage."""
        self._resume()
        if not pl_module.timeline.is_last(trainer.global_step):
            self._waiting = [c for c in trainer.callbacks if watches(c)]  # type: ignore[attr-defined]
            for callback in self._waiting:
                vars(callback).update(dict.fromkeys(_LOOKS, _look_away))

    def _resume(self) -> None:
        for callback in self._waiting:
            for look in _LOOKS:
                del vars(callback)[look]
        self._waiting = []

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore at the end of a training, or of an evaluation that measured its terms."""
        self.restore(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restore after a failure, where Lightning skips ``teardown``."""
        self.restore(pl_module)


def watches(callback: Callback) -> bool:
    """Return whether a callback stops, or keeps a best checkpoint, by a metric."""
    return isinstance(callback, EarlyStopping | ModelCheckpoint) and callback.monitor is not None


def _look_away(*args: Any, **kwargs: Any) -> None:
    """Stand in for a callback's look at its metric."""
