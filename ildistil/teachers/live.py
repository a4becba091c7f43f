"""A teacher that runs."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ildistil.capture import Activations, Capture, ModelInfo, Tap, separate_configs, unwrapped
from ildistil.errors import ModelError
from ildistil.objectives import Objective
from ildistil.teachers.layout import weights_digest
from ildistil.teachers.teacher import Batch

__all__ = ["LiveTeacher"]


class LiveTeacher:
    """Runs a frozen model, as far as its deepest wanted layer, without gradients and always in eval mode.

    Args:
        model: the teacher; its parameters' gradients are switched off.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.requires_grad_(False).eval()
        self.info = ModelInfo.of(model)
        self._capture: Capture | None = None
        self._compile_options: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "LiveTeacher":
        """Share the frozen model: callbacks that average weights copy the whole module."""
        return LiveTeacher(self.model)

    def accept(self, student: nn.Module) -> None:
        """Refuse a student with parameters of the teacher, and give it configs of its own.

        Raises:
            ModelError: student and teacher share parameters.
        """
        theirs = {id(p) for p in self.model.parameters()}
        if any(id(p) in theirs for p in student.parameters()):
            raise ModelError(
                "Student and teacher share parameters, so training the student would change the teacher. Make the "
                "student with init_student(teacher, ...) or copy.deepcopy(teacher)."
            )
        separate_configs(unwrapped(student), unwrapped(self.model))

    @property
    def digest(self) -> str:
        """A hash of the weights."""
        return weights_digest(unwrapped(self.model))

    @property
    def runs(self) -> bool:
        """Yes."""
        return True

    @property
    def prepares(self) -> bool:
        """No: it runs in each step."""
        return False

    def prepare(
        self,
        objectives: Sequence[Objective],
        student: nn.Module,
        batches: Iterable[Batch],
        *,
        tokenizer: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Do nothing."""

    def open(self, taps: Iterable[Tap]) -> None:
        """Put the hooks on the model."""
        self.close()
        self._capture = Capture(self.model, taps, "teacher")
        if self._compile_options is not None:
            self._capture.compile(**self._compile_options)

    def prefetch(self, batch: Batch, taps: Iterable[Tap]) -> Batch:
        """Return the batch as it is."""
        return batch

    def rehearse(self, batch: Batch) -> Batch:
        """Return the batch as it is."""
        return batch

    def __call__(self, batch: Batch, taps: Iterable[Tap], *, verify: bool = False) -> Activations:
        """Run the model; see :class:`~ildistil.teachers.Teacher`."""
        assert self._capture is not None, "opened before"
        if self.model.training:
            self.model.eval()  # somebody switched it since; it must never drop out
        with torch.no_grad(), _own_precision(self.model):
            return self._capture(batch, wanted=taps, verify=verify)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the model along."""
        self.model._apply(fn)  # type: ignore[no-untyped-call]

    def compile(self, **options: Any) -> None:
        """Compile the model's runs."""
        self._compile_options = options
        if self._capture is not None:
            self._capture.compile(**options)

    def describe(self) -> str:
        """Return that it is frozen."""
        return "frozen"

    def close(self) -> None:
        """Take the hooks off the model."""
        if self._capture is not None:
            self._capture.close()
            self._capture = None


def _own_precision(model: nn.Module) -> AbstractContextManager[Any]:
    """Keep autocast away from a model in half precision: it needs none, and the other half would be mixed into it."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None or weight.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(weight.device.type, enabled=False)
