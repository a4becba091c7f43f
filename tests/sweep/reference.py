"""What a plain run of a model gives, found without the library.

Layers are found by what they do: the modules of a list whose outputs are the model's own ``hidden_states``; where a
model gives none, those that run as often as its config is deep. Attention is what the plain (eager) attention returns.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.batches import Batch
from sweep.build import eager_copy, first_tensor, run

Stack = str | None
STATES = {None: "hidden_states", "encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"}
MAPS = {
    None: "attentions",
    "encoder": "encoder_attentions",
    "decoder": "decoder_attentions",
    "cross": "cross_attentions",
}


class NoReferenceError(Exception):
    """Nothing to compare with; says why."""


class Seen:
    """What one plain run gave: the output, and of each stack the states; ``states[0]`` went into the first layer.

    Args:
        model: the model.
        batch: its inputs.
        stacks: ``None``, or the names of an encoder-decoder's.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch, stacks: tuple[Stack, ...]) -> None:
        self.model, self.batch = model, batch
        self.rows = len(next(iter(batch.values())))
        with _noted_calls(model) as self.calls:
            self.output = _run(model, batch, self.calls, output_hidden_states=True)
        self.layers: dict[Stack, str] = {}
        self.states: dict[Stack, list[Tensor]] = {}
        for stack in stacks:
            path = None if stack == "cross" else self._path(stack)
            if path is not None:
                calls = self.calls[path]
                self.layers[stack] = path
                self.states[stack] = [self.rows_first(x) for x in (calls[0][0], *(gave for _, gave in calls))]

    def _path(self, stack: Stack) -> str | None:
        """The path of the list whose modules are the layers."""
        found = []
        stated = _field(self.output, STATES[stack])
        if stated is not None:
            found = [path for path, calls in self.calls.items() if _matches([gave for _, gave in calls], stated)]
            found = sorted(found, key=lambda path: -len(self.calls[path]))[:1]
        root = self.model
        if stack is not None:
            root = self.model.get_encoder() if stack == "encoder" else self.model.get_decoder()
        prefix = next(name for name, module in self.model.named_modules() if module is root)
        depth = _depth(self.model)
        deep = [path for path, calls in self.calls.items() if len(calls) == depth and path.startswith(prefix)]
        outer = [path for path in deep if not any(path.startswith(other + ".") for other in deep)]
        found += outer if len(outer) == 1 else []
        return next((path for path in found if self._reads_tokens(path)), found[0] if found else None)

    def _reads_tokens(self, path: str) -> bool:
        """Whether states are those of the tokens, where there are tokens: a model may give the states of its images."""
        ids, state = self.batch.get("input_ids"), self.calls[path][-1][1]
        return ids is None or (state is not None and ids.shape[1] in state.shape[:2])

    def rows_first(self, state: Tensor | None) -> Tensor:
        """(tokens, batch, width) -> (batch, tokens, width); no batch here has as many rows as tokens."""
        if state is None:
            raise NoReferenceError("a layer gives no tensor")
        turned = state.ndim >= 3 and state.shape[0] != self.rows and state.shape[1] == self.rows
        return state.transpose(0, 1) if turned else state

    def mask(self, stack: Stack) -> Tensor:
        """The real tokens of a stack, by what the batch says."""
        of = "decoder" if stack == "cross" else stack
        if of not in self.states:
            raise NoReferenceError("its layers aren't found by their outputs")
        tokens, given = self.states[of][-1].shape[-2], self.batch.get("attention_mask")
        if of == "decoder":
            labels = self.batch.get("labels")
            if labels is not None and labels.ndim == 2:
                given = labels != -100
            elif "decoder_input_ids" in self.batch:
                given = None
            given = self.batch.get("decoder_attention_mask", given)
        if given is None:
            return torch.ones(self.rows, tokens, dtype=torch.bool)
        if given.shape[1] != tokens:
            owners = (self.model, getattr(self.model, self.model.base_model_prefix, None))
            shorten = [f for m in owners if (f := getattr(m, "_get_feature_vector_attention_mask", None))]
            if not shorten:
                raise NoReferenceError(f"{tokens} states for {given.shape[1]} positions of the mask")
            given = shorten[0](tokens, given)
        return given.bool()

    def maps(self, stack: Stack) -> list[Tensor]:
        """The probabilities of every layer, ``(batch, heads, queries, keys)``, as the plain attention returns them."""
        self.mask(stack)
        path = self.layers["decoder" if stack == "cross" else stack]
        depth, place = len(self.calls[path]), 1 if stack == "cross" else 0
        try:
            twin = eager_copy(self.model)
        except Exception as error:
            raise NoReferenceError(f"no eager attention: {error}") from error
        with _noted_maps(twin, path) as noted:
            output = _run(twin, self.batch, noted, output_attentions=True)
        stated = _field(output, MAPS[stack])
        for maps in (stated or (), [found[place] for found in noted.values() if len(found) > place]):
            if len(maps) == depth and all(isinstance(x, Tensor) and x.ndim == 4 for x in maps):
                return list(maps)
        raise NoReferenceError("the plain attention returns no probabilities")


def _depth(model: PreTrainedModel) -> int:
    names = ("num_hidden_layers", "encoder_layers", "n_layer", "num_layers", "n_layers", "depth")
    text = model.config.get_text_config()
    return next((v for n in names if isinstance(v := getattr(text, n, None), int)), 0)


def _run(model: PreTrainedModel, batch: Batch, noted: dict[Any, Any], **more: bool) -> Any:
    """Run with an option, or without where a model doesn't have it."""
    try:
        return run(model, batch, **more)
    except Exception:
        noted.clear()
        return run(model, batch)


@contextmanager
def _noted_calls(model: nn.Module) -> Iterator[dict[str, list[tuple[Tensor | None, Tensor | None]]]]:
    """Note what all modules in lists are given and give, by the path of their list."""
    calls: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {}

    def noting(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            given = first_tensor([*args, kwargs.get("hidden_states"), *kwargs.values()])
            calls.setdefault(path, []).append((given, first_tensor(output)))

        return hook

    handles = [
        module.register_forward_hook(noting(path), with_kwargs=True)
        for path, container in model.named_modules()
        if isinstance(container, nn.ModuleList | nn.Sequential)
        for module in dict.fromkeys(container)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _field(output: Any, name: str) -> Any:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, list | tuple) and len(value) > 0 else None


def _matches(gave: list[Tensor | None], stated: Any) -> bool:
    """Whether all outputs but the last, which a norm may follow, are consecutive among the stated ones."""
    gave = gave[:-1]
    starts = range(len(stated) - len(gave) + 1)
    return len(gave) > 0 and any(
        all(_same(x, y) for x, y in zip(gave, stated[start:], strict=False)) for start in starts
    )


def _same(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim != y.ndim or x.ndim < 2:
        return False
    return any(z.shape == y.shape and torch.equal(z, y) for z in (x, x.transpose(0, 1)))


@contextmanager
def _noted_maps(model: nn.Module, path: str) -> Iterator[dict[int, list[Tensor]]]:
    """Note what every eager attention function returns inside the layers at a path, by the number of the layer."""
    noted: dict[int, list[Tensor]] = {}
    running, count = False, 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal running, count
        running, count = True, count + 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal running
        running = False

    def wrapped(function: Any) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if running:
                noted.setdefault(count, []).append(result[1])
            return result

        return attention

    handles = []
    for layer in dict.fromkeys(model.get_submodule(path)):
        handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    plain = {file: file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")}
    for file, function in plain.items():
        file.eager_attention_forward = wrapped(function)
    try:
        yield noted
    finally:
        for file, function in plain.items():
            file.eager_attention_forward = function
        for handle in handles:
            handle.remove()
