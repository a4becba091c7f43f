"""What a captured run gave."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from ildistil.attention import Attention
from ildistil.capture.head import LazyLogits
from ildistil.capture.info import check_stack
from ildistil.capture.taps import Tap
from ildistil.errors import CaptureError
from ildistil.functional.pooling import Pooling

T = TypeVar("T")


class Layers(Mapping[int, T]):
    """What was recorded per layer, by layer number; negative numbers count from the last layer of the model.

    >>> states = Layers({0: "embedding", 3: "last"}, depth=3, what="hidden")
    >>> states[-1]
    'last'
    """

    def __init__(self, records: dict[int, T], depth: int, what: str) -> None:
        self._records, self._depth, self._what = records, depth, what
        self._reads: Counter[int] = Counter()

    def expect(self, layer: int) -> None:
        """Remember that a layer will be read once more by :meth:`take`."""
        self._reads[layer] += 1

    def take(self, layer: int) -> T:
        """Return the record of a layer; after the last expected read it is let go, and its memory serves what comes.

        Raises:
            CaptureError: the layer was not captured, or was read more often than expected.
        """
        record = self[layer]
        number = self._number(layer)
        if self._reads[number] == 1:
            del self._records[number]
        if number in self._reads:
            self._reads[number] -= 1
        return record

    def __getitem__(self, layer: int) -> T:
        number = self._number(layer)
        if number in self._reads and number not in self._records:
            raise CaptureError(
                f"{self._what}[{layer}] is read more often than the objectives' reads() name it. Name a layer once for "
                "each time that a loss takes it."
            )
        try:
            return self._records[number]
        except KeyError:
            raise CaptureError(
                f"{self._what}[{layer}] was not captured; captured: {sorted(self._records) or 'nothing'}. "
                f"Name it in the objective's taps (taps = ('{self._what}',) captures every layer)."
            ) from None

    def _number(self, layer: int) -> int:
        return layer + self._depth + 1 if layer < 0 else layer

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._records))

    def __len__(self) -> int:
        return len(self._records)


class Traits(Protocol):
    """What only a run tells of a stack, see :class:`Activations`."""

    @property
    def causal(self) -> bool | None:
        """Whether no token's state depends on a later token."""

    @property
    def pooling(self) -> Pooling:
        """Which state stands for a whole example."""


class KnownTraits(NamedTuple):
    """Traits that are known beforehand."""

    causal: bool | None = None
    pooling: Pooling = "first"


@dataclass(frozen=True)
class Activations:
    """What one captured run gave.

    Attributes:
        hidden: states by layer, ``(batch, tokens, width)``.
        attention: :class:`~ildistil.capture.Attention` by layer.
        mask: boolean ``(batch, tokens)``, true where a token is real.
        output: the model's output; ``None`` where the run stopped when all that was wanted was there. A language
            model's logits are then not made yet, see ``lazy_logits``.
        modules: outputs by module path.
        stacks: of an encoder-decoder, what each stack gave, see :meth:`stack`; hidden states and attention are in
            these, and ``mask`` is the decoder's, to which the logits belong.
        lazy_logits: what the logits are made of; ``None`` where they are there, or not wanted.
        traits: see :attr:`causal` and :attr:`pooling`.
        next_token: whether the logits at a position predict the token after it, found from the model's own loss;
            ``None`` where the logits are of no tokens, or it isn't known, see ``why_not_known``.
        why_not_known: why ``next_token`` isn't known.
    """

    hidden: Layers[Tensor]
    attention: Layers[Attention]
    mask: Tensor
    output: Any
    modules: dict[str, Any] = field(default_factory=dict)
    stacks: Mapping[str, "Activations"] = field(default_factory=dict)
    lazy_logits: LazyLogits | None = None
    traits: Traits = field(default_factory=KnownTraits)
    next_token: bool | None = None
    why_not_known: str = "it wasn't captured with its logits or its loss"

    @cached_property
    def logits(self) -> Tensor:
        """The model's logits.

        Raises:
            CaptureError: they weren't wanted, or the model has no head.
        """
        return _from_output(self.output, "logits") if self.lazy_logits is None else self.lazy_logits.all()

    @property
    def loss(self) -> Tensor:
        """The model's own supervised loss, a scalar.

        Raises:
            CaptureError: it wasn't wanted, the batch has no labels, or the model has no head.
        """
        return _from_output(self.output, "loss") if self.lazy_logits is None else self.lazy_logits.loss()

    @property
    def causal(self) -> bool | None:
        """Whether no token's state depends on a later token; found once, by changing a token of a row.

        ``None`` where it isn't known: of models that read no text, or where no hidden states of a layer were wanted.
        """
        return self.traits.causal

    @property
    def pooling(self) -> Pooling:
        """Which state stands for a whole example: where a head of classes reads it, found once by changing states.

        Without such a head it is the last one of a causal model, which alone sees all, and else the first one.
        """
        return self.traits.pooling

    def expect(self, reads: Iterable[Tap]) -> None:
        """Count the reads of each layer, one tap a read, so that :meth:`Layers.take` lets it go after the last.

        Raises:
            CaptureError: a tap names a stack that isn't there.
        """
        for tap in reads:
            if tap.layer is not None:
                stack = self.stack(tap.stack)
                layers: Layers[Any] = stack.hidden if tap.name == "hidden" else stack.attention
                layers.expect(tap.layer)

    def stack(self, name: str | None) -> "Activations":
        """Return what one stack gave: ``"encoder"``, ``"decoder"``, ``"cross"``, or ``None`` for the only one.

        Raises:
            CaptureError: the model has several stacks and none is named, or it has none of this name.
        """
        check_stack("model", self.stacks, name)
        return self if name is None else self.stacks[name]


def _from_output(output: Any, name: str) -> Tensor:
    if output is None:
        raise CaptureError(
            f"Nobody asked for the model's {name}, so its run stopped before. Name {name!r} in the objective's taps."
        )
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if value is None and name == "logits" and isinstance(output, Tensor):
        value = output
    if not isinstance(value, Tensor):
        remedy = (
            "Give the batch 'labels' (labels: masked or next of a Corpus, the column of a table) and use a model with "
            "a head that computes a loss, or leave out the term that reads it"
            if name == "loss"
            else "Use a model with a head, such as AutoModelForSequenceClassification"
        )
        raise CaptureError(f"The model's output ({type(output).__name__}) has no {name!r}. {remedy}.")
    return value
