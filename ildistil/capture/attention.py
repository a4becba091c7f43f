"""Attention in one form, and how it is noted: the twins of transformers' attention functions."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = [
    "PREFIX",
    "Notebook",
    "divert",
    "give_back",
    "goes_through_interface",
    "note_into",
    "notebook",
    "unread",
]

PREFIX = "ildistil_"


def unread(vectors: Tensor) -> Tensor:
    """Give what stands for vectors that nobody reads: not a number, so that who does has no finite loss."""
    return vectors.new_full((), torch.nan).expand(vectors.shape)


class Notebook(Protocol):
    """What takes the notes of a captured run."""

    def note_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None,
        kwargs: dict[str, Any], unknown: str | None = None,
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
