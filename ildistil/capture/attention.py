"""Attention in one form, and how it is noted: the twins of transformers' attention functions."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ildistil.attention import Masks, Scores, allowed_map, real_tokens, score_map, zeroed
from ildistil.errors import CaptureError

__all__ = [
    "PREFIX",
    "Attention",
    "Notebook",
    "divert",
    "give_back",
    "goes_through_interface",
    "note_into",
    "notebook",
    "unread",
]

PREFIX = "ildistil_"


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, in one form whatever the model and its implementation.

    ``query`` is ``(batch, heads, queries, head size)``; ``key`` and ``value`` may have fewer heads (grouped-query
    attention). ``key_mask`` and ``query_mask`` are boolean ``(batch, tokens)``, ``None`` when nothing is padded;
    ``window`` is the number of positions a query reaches to each side it may look at, itself included. ``no_scores``
    is the reason why the model's scores aren't known, though its queries, keys and values are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    mask_as_passed: Tensor | None = None  # kept only for the check in a dry run
    no_scores: str | None = None

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.query.shape[1]

    @property
    def masks(self) -> Masks:
        """Which scores count."""
        return Masks(self.query_mask, self.key_mask, self.causal, self.window)

    def score_parts(self) -> Scores:
        """Give what the scores are made of.

        Raises:
            CaptureError: the model makes its scores otherwise.
        """
        if self.no_scores is not None:
            raise CaptureError(
                f"The scores of this attention aren't known: {self.no_scores}. Use RelationKL, which compares queries, "
                "keys and values, or a hidden-state objective."
            )
        return Scores(self.query, self.key, self.scale, self.bias, self.softcap)

    def per_head(self, part: str) -> Tensor:
        """Give the vectors of every head, ``(batch, heads, tokens, size)``, with zeros for padding.

        Args:
            part: ``"q"``, ``"k"`` or ``"v"``; keys and values that heads share (grouped-query attention) are repeated.
        """
        return zeroed(self.unmasked(part), self.query_mask if part == "q" else self.key_mask)

    def unmasked(self, part: str) -> Tensor:
        """Give the vectors of every head as they are, padding included; see :meth:`per_head`."""
        vectors = {"q": self.query, "k": self.key, "v": self.value}[part]
        groups = self.heads // vectors.shape[1]
        return vectors if groups == 1 else vectors.repeat_interleave(groups, dim=1)

    def scores(self) -> Tensor:
        """Give the scores before the softmax, ``(batch, heads, queries, keys)``, at least in float32.

        ``softcap * tanh(q k^T scale / softcap) + bias``, without masks: see :meth:`allowed`.

        Raises:
            CaptureError: the model makes its scores otherwise.
        """
        return score_map(self.score_parts(), self.masks)

    def allowed(self) -> Tensor:
        """Tell which keys a query may attend to: boolean, ``(batch, 1, queries, keys)``."""
        return allowed_map(self.query, self.key, self.masks)

    def real_queries(self) -> Tensor:
        """Tell which queries are real tokens: boolean, ``(batch, queries)``."""
        return real_tokens(self.query_mask, self.query)

    def real_keys(self) -> Tensor:
        """Tell which keys are real tokens: boolean, ``(batch, keys)``."""
        return real_tokens(self.key_mask, self.key)


def unread(vectors: Tensor) -> Tensor:
    """Give what stands for vectors that nobody reads: not a number, so that who does has no finite loss."""
    return vectors.new_full((), torch.nan).expand(vectors.shape)


class Notebook(Protocol):
    """What takes the notes of a captured run."""

    def note_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
        kwargs: dict[str, Any], no_scores: str | None = None,
    ) -> None:  # fmt: skip
        """Note the attention of the layer that runs."""

    def note_part(self, name: str, value: Tensor) -> None:
        """Note a part of an attention that is put together later."""


_current: Notebook | None = None
# How many captures a model's attention is diverted for: two engines may share one teacher.
_diverted: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def note_into(book: Notebook) -> Iterator[None]:
    """Have attention functions take their notes here."""
    global _current
    _current = book
    try:
        yield
    finally:
        _current = None


def notebook() -> Notebook | None:
    """Give what takes notes now: nothing outside a captured run."""
    return _current


def _recording(delegate: str) -> Callable[..., Any]:
    """Make the attention function that records and then calls the model's own implementation."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if _current is not None:
            _current.note_attention(module, query, key, value, attention_mask, scaling, kwargs)
        if delegate == "eager":
            # Each model file has its own eager function; there is no common one.
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[delegate]
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def goes_through_interface(model: nn.Module) -> bool:
    """Tell whether a model's attention goes through transformers' ``AttentionInterface``."""
    return isinstance(model, PreTrainedModel) and bool(model._can_set_attn_implementation())


def divert(model: PreTrainedModel) -> str:
    """Switch a model to the recording twin of its attention implementation; gives the previous one."""
    _diverted[model] = _diverted.get(model, 0) + 1
    previous: str = model.config._attn_implementation
    if previous.startswith(PREFIX):
        return previous.removeprefix(PREFIX)
    twin = PREFIX + previous.replace("/", "_")
    if twin not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(twin, _recording(previous))
        AttentionMaskInterface.register(twin, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    _switch(model, twin)
    return previous


def give_back(model: PreTrainedModel, previous: str) -> None:
    """Give a model its attention implementation back, unless another capture needs the twin."""
    _diverted[model] -= 1
    if _diverted[model] == 0:
        _switch(model, previous)


def _switch(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    # Before 5.23 transformers leaves out models inside whose config is a copy of the whole one's, as T5's stacks have.
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != implementation:
            part.set_attn_implementation(implementation)
