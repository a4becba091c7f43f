"""What answers for the teacher: the seam between the engine and models that run, or answers that are stored."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ildistil.capture import Activations, ModelInfo, Tap
from ildistil.objectives import Objective

__all__ = ["Batch", "Teacher"]

Batch = Mapping[str, Any]


class Teacher(Protocol):
    """Answers for the teacher. A plain object, so that no module ever registers it.

    A training calls :meth:`accept` and :meth:`prepare` once, then :meth:`open`, for each batch :meth:`prefetch` and
    the teacher itself, and in the end :meth:`close`, after which it may be opened again.
    """

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""

    @property
    def digest(self) -> str | None:
        """A hash of the teacher, which a training that goes on compares; ``None``, or left out: unknown."""

    @property
    def runs(self) -> bool:
        """Whether a model runs in each step."""

    def accept(self, student: nn.Module) -> None:
        """Make sure that training this student leaves the teacher alone.

        Raises:
            ModelError: the student can't be trained with this teacher.
        """

    @property
    def prepares(self) -> bool:
        """Whether :meth:`prepare` has anything to do."""

    def prepare(
        self,
        objectives: Sequence[Objective],
        student: nn.Module,
        batches: Iterable[Batch],
        *,
        tokenizer: str | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Do before a training what takes long, such as storing all answers.

        Args:
            objectives: what will be trained by.
            student: the student; layer mappings depend on its depth.
            batches: every row of the training data, to be gone through repeatedly.
            tokenizer: hash of the data's tokenizer, if it has one.
            device: where the model runs, if it does.

        Raises:
            TargetsError: the answers can't be stored, or are of another tokenizer.
        """

    def open(self, taps: Iterable[Tap]) -> None:
        """Prepare to answer for these taps.

        Raises:
            CaptureError: the teacher can't give one of them.
        """

    def prefetch(self, batch: Batch, taps: Iterable[Tap]) -> Batch:
        """Return a batch, best still on the CPU, with whatever can be read for it before it goes to its device."""

    def rehearse(self, batch: Batch) -> Batch:
        """Return a batch that isn't data with whatever it takes to answer for it all the same."""

    def __call__(self, batch: Batch, taps: Iterable[Tap], *, verify: bool = False) -> Activations:
        """Return the activations of a batch, on its device and without gradients.

        Args:
            batch: a mapping of names to tensors.
            taps: what is wanted, some of what the teacher was opened for.
            verify: check what can be checked of a model's run, as a dry run does.

        Raises:
            CaptureError: something wanted isn't there.
        """

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move along with the engine: apply a function to all weights."""

    def compile(self, **options: Any) -> None:
        """Compile what runs, with the options of ``torch.compile``."""

    def describe(self) -> str:
        """Return what the plan says of it."""

    def close(self) -> None:
        """Leave everything as it was before :meth:`open`."""
