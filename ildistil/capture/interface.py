"""transformers' ``AttentionInterface``: twins of its attention functions, which record what they are given."""

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
    "AttentionRecorder",
    "active_recorder",
    "bind",
    "goes_through_interface",
    "recording",
    "unbind",
    "unread",
]

PREFIX = "ildistil_"


def unread(vectors: Tensor) -> Tensor:
    """Return a placeholder for vectors that nothing reads: not a number, so that no loss on them is finite."""
    return vectors.new_full((), torch.nan).expand(vectors.shape)


class AttentionRecorder(Protocol):
    """Records the attention of a captured run."""

    def record_attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None,
        kwargs: dict[str, Any], unknown: str | None = None,
    ) -> None:  # fmt: skip
        """Record the attention of the layer that runs."""

    def record_part(self, name: str, value: Tensor) -> None:
        """Record a part of an attention that is assembled later."""


_active: AttentionRecorder | None = None
# The number of captures that a model is bound for: two engines may share one teacher.
_bound: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def recording(recorder: AttentionRecorder) -> Iterator[None]:
    """Let attention functions record into this recorder."""
    global _active
    _active = recorder
    try:
        yield
    finally:
        _active = None


def active_recorder() -> AttentionRecorder | None:
    """Return the recorder of the captured run that is in progress, if there is one."""
    return _active


def _recording(delegate: str) -> Callable[..., Any]:
    """Make the attention function that records and then calls the model's own implementation."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if _active is not None:
            _active.record_attention(module, query, key, value, attention_mask, scaling, kwargs)
        function = _eager(type(module)) if delegate == "eager" else ALL_ATTENTION_FUNCTIONS[delegate]
        return function(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def _eager(kind: type[nn.Module]) -> Callable[..., Any]:
    # Each model file has its own eager function; there is no common one. A subclass may be in another file.
    found = (getattr(sys.modules[c.__module__], "eager_attention_forward", None) for c in kind.__mro__)
    function: Callable[..., Any] = next(function for function in found if function is not None)
    return function


def goes_through_interface(model: nn.Module) -> bool:
    """Return whether a model's attention goes through transformers' ``AttentionInterface``."""
    return isinstance(model, PreTrainedModel) and bool(model._can_set_attn_implementation())


def bind(model: PreTrainedModel) -> str:
    """Switch a model to the recording twin of its attention implementation, and return the previous one."""
    _bound[model] = _bound.get(model, 0) + 1
    previous: str = model.config._attn_implementation
    if previous.startswith(PREFIX):
        return previous.removeprefix(PREFIX)
    twin = PREFIX + previous.replace("/", "_")
    if twin not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(twin, _recording(previous))
        AttentionMaskInterface.register(twin, ALL_MASK_ATTENTION_FUNCTIONS[previous])
    _switch(model, twin)
    return previous


def unbind(model: PreTrainedModel, previous: str) -> None:
    """Switch a model back to its own attention implementation, unless another capture needs the twin."""
    _bound[model] -= 1
    if _bound[model] == 0:
        _switch(model, previous)


def _switch(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    # Before 5.23 transformers leaves out models inside whose config is a copy of the whole one's, as T5's stacks have.
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != implementation:
            part.set_attn_implementation(implementation)
