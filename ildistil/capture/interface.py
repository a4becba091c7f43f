"""transformers' ``AttentionInterface``: its attention functions record what they are given, during a captured run.

In place of each registered function, and of the eager one of each model file, stands one that records and then calls
it. Models and their configs stay as they are, since some compute otherwise under another name of an implementation.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ildistil.capture.recorder import Recorder

_active: Recorder | None = None


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Direct attention functions to this recorder."""
    global _active
    functions = AttentionInterface._global_mapping
    plain = dict(functions)
    wrapped = {name: _recording(plain.get(name)) for name in (*plain, "eager")}
    functions.update(wrapped)
    _active = recorder
    try:
        yield
    finally:
        _active = None
        for name in wrapped:
            del functions[name]
        functions.update(plain)


def active_recorder() -> Recorder | None:
    """Return the recorder of the captured run that is in progress, if there is one."""
    return _active


@functools.cache
def _recording(function: Callable[..., Any] | None) -> Callable[..., Any]:
    """Make the function that records and then calls this one; ``None`` is the eager one of the model's file."""

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
        scaling: float | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if _active is not None:
            _active.record_attention(module, query, key, value, attention_mask, scaling, kwargs)
        attend = _eager(type(module)) if function is None else function
        return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    return attention


def _eager(kind: type[nn.Module]) -> Callable[..., Any]:
    # A subclass may be in another file than the eager attention of its family.
    found = (getattr(sys.modules[c.__module__], "eager_attention_forward", None) for c in kind.__mro__)
    function: Callable[..., Any] = next(function for function in found if function is not None)
    return function


def goes_through_interface(model: nn.Module) -> bool:
    """Return whether a model's attention goes through transformers' ``AttentionInterface``."""
    return isinstance(model, PreTrainedModel) and bool(model._can_set_attn_implementation())
