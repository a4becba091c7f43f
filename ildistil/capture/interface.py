"""transformers' ``AttentionInterface``: twins of its attention functions, which record what they are given."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
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
# The captures that a model is bound for, as two engines may share one teacher, and what its configs said before.
_bound: WeakKeyDictionary[nn.Module, tuple[int, list[tuple[PreTrainedConfig, str]]]] = WeakKeyDictionary()


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


def bind(model: PreTrainedModel) -> None:
    """Switch a model, and each model inside it, to the recording twin of its own attention implementation."""
    captures, previous = _bound.get(model, (0, []))
    if captures == 0:
        parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and goes_through_interface(m)]
        configs = {id(config): config for part in parts for config in _nested(part.config)}
        previous = [(config, said) for config in configs.values() if (said := config._attn_implementation) is not None]
    for config, implementation in previous:
        config._attn_implementation = {"": _twin(implementation)}
    _bound[model] = captures + 1, previous


def unbind(model: PreTrainedModel) -> None:
    """Switch a model back to its own attention implementations, unless another capture needs the twins."""
    captures, previous = _bound.pop(model)
    if captures > 1:
        _bound[model] = captures - 1, previous
        return
    for config, implementation in previous:
        config._attn_implementation = {"": implementation}


def _nested(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in config.sub_configs:
        if (inside := getattr(config, name, None)) is not None:
            yield from _nested(inside)


def _twin(implementation: str) -> str:
    if implementation.startswith(PREFIX):  # as of a copy of a model that was bound
        return implementation
    twin = PREFIX + implementation.replace("/", "_")
    if twin not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(twin, _recording(implementation))
        AttentionMaskInterface.register(twin, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return twin
