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

from ildistil.capture.taps import CaptureError

__all__ = ["PREFIX", "Attention", "Notebook", "divert", "give_back", "goes_through_interface", "note_into", "notebook"]

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

    def require_scores(self) -> None:
        """Check that the scores are known.

        Raises:
            CaptureError: the model makes its scores otherwise.
        """
        if self.no_scores is not None:
            raise CaptureError(
                f"The scores of this attention aren't known: {self.no_scores}. Use RelationKL, which compares queries, "
                "keys and values, or a hidden-state objective."
            )

    def per_head(self, part: str) -> Tensor:
        """Give the vectors of every head, ``(batch, heads, tokens, size)``, with zeros for padding.

        Args:
            part: ``"q"``, ``"k"`` or ``"v"``; keys and values that heads share (grouped-query attention) are repeated.
        """
        vectors = self.unmasked(part)
        mask = self.query_mask if part == "q" else self.key_mask
        # Padding may hold anything, NaN included, and 0 times NaN is NaN.
        return vectors if mask is None else torch.where(mask[:, None, :, None], vectors, 0)

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
        self.require_scores()
        with torch.autocast(self.query.device.type, enabled=False):
            query, key = (self.per_head(part) for part in ("q", "k"))
            query, key = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (query, key))
            scores = (query * self.scale) @ key.transpose(-1, -2)
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            return scores if self.bias is None else scores + self.bias

    def allowed(self) -> Tensor:
        """Tell which keys a query may attend to: boolean, ``(batch or 1, 1, queries, keys)``."""
        queries, keys, device = self.query.shape[2], self.key.shape[2], self.query.device
        distance = torch.arange(queries, device=device)[:, None] - torch.arange(keys, device=device)
        allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
        if self.causal:
            allowed = allowed & (distance >= 0)
        if self.window is not None:
            allowed = allowed & (distance.abs() < self.window)
        return allowed if self.key_mask is None else allowed & self.key_mask[:, None, None, :]

    def real_queries(self) -> Tensor:
        """Tell which queries are real tokens: boolean, ``(batch, queries)``."""
        if self.query_mask is not None:
            return self.query_mask
        return torch.ones(self.query.shape[0], self.query.shape[2], dtype=torch.bool, device=self.query.device)

    def real_keys(self) -> Tensor:
        """Tell which keys are real tokens: boolean, ``(batch, keys)``."""
        if self.key_mask is not None:
            return self.key_mask
        return torch.ones(self.key.shape[0], self.key.shape[2], dtype=torch.bool, device=self.key.device)


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
