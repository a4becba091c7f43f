"""Hand-made runs: what the library should have seen of a model, found without it.

Layers are found by behaviour: the modules of a ``ModuleList`` whose outputs are the model's own ``hidden_states``; where
a model gives none, those that run as often as its config is deep. Attention is what the plain (eager) attention
returns, all losses are loops over examples.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.batches import Batch, forward_names
from sweep.build import eager_copy, first_tensor, run

Stack = str | None
STATES = {None: "hidden_states", "encoder": "encoder_hidden_states", "decoder": "decoder_hidden_states"}
MAPS = {None: "attentions", "encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}


class NoReferenceError(Exception):
    """Nothing to compare with; says why."""


@dataclass
class Call:
    """One run of a layer: what it was given, what it gave."""

    module: nn.Module
    given: Tensor | None
    gave: Tensor | None


@dataclass
class Seen:
    """What one plain run of a model gave; ``states[0]`` is what the first layer was given."""

    output: Any
    calls: dict[str, list[Call]] = field(default_factory=dict)
    states: dict[Stack, list[Tensor]] = field(default_factory=dict)
    layers: dict[Stack, str] = field(default_factory=dict)


def observe(model: PreTrainedModel, batch: Batch, depth: int, stacks: tuple[Stack, ...]) -> Seen:
    """Run a model plainly, and find the states of its layers.

    Args:
        model: the model.
        batch: its inputs.
        depth: how many layers it was built with.
        stacks: ``None``, or the names of an encoder-decoder's.
    """
    with _noted_calls(model) as calls:
        try:
            output = run(model, batch, output_hidden_states=True)
        except Exception:
            calls.clear()
            output = run(model, batch)
    seen = Seen(output, calls)
    rows = next(iter(batch.values())).shape[0]
    for stack in stacks:
        if stack != "cross":
            _find_states(seen, model, stack, rows, depth)
    return seen


@contextmanager
def _noted_calls(model: nn.Module) -> Iterator[dict[str, list[Call]]]:
    """Note the calls of all modules in lists, by the path of their list."""
    calls: dict[str, list[Call]] = {}
    handles = []
    for path, container in model.named_modules():
        if isinstance(container, nn.ModuleList | nn.Sequential):
            for module in dict.fromkeys(container):
                handles.append(module.register_forward_hook(_noting(calls, path), with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _noting(calls: dict[str, list[Call]], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given = first_tensor([*args, kwargs.get("hidden_states"), *kwargs.values()])
        calls.setdefault(path, []).append(Call(module, given, first_tensor(output)))

    return hook


def _find_states(seen: Seen, model: nn.Module, stack: Stack, rows: int, depth: int) -> None:
    stated = _field(seen.output, STATES[stack])
    best: tuple[str, list[Call]] | None = None
    for path, calls in seen.calls.items():
        if stated is not None and _matches(calls, stated) and (best is None or len(calls) > len(best[1])):
            best = path, calls
    if best is None:
        best = _by_depth(seen, model, stack, depth)
    if best is None:
        return
    path, calls = best
    states = [_rows_first(calls[0].given, rows), *(_rows_first(call.gave, rows) for call in calls)]
    seen.layers[stack] = path
    seen.states[stack] = states


def _field(output: Any, name: str) -> Any:
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    return value if isinstance(value, list | tuple) and len(value) > 0 else None


def _matches(calls: list[Call], stated: Any) -> bool:
    """Whether all outputs but the last, which a norm may follow, are consecutive among the stated ones."""
    gave = [call.gave for call in calls[:-1]]
    if len(gave) == 0 or any(x is None for x in gave) or len(gave) > len(stated):
        return False
    return any(
        all(_same(x, y) for x, y in zip(gave, stated[start:], strict=False))
        for start in range(len(stated) - len(gave) + 1)
    )


def _same(x: Any, y: Any) -> bool:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim != y.ndim or x.ndim < 2:
        return False
    turned = x.transpose(0, 1)
    return (x.shape == y.shape and torch.equal(x, y)) or (turned.shape == y.shape and torch.equal(turned, y))


def _by_depth(seen: Seen, model: nn.Module, stack: Stack, depth: int) -> tuple[str, list[Call]] | None:
    """The outermost list whose modules ran as often as the model is deep, inside the encoder or decoder if named."""
    root = None
    if stack is not None:
        root = model.get_encoder() if stack == "encoder" else model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names.get(id(root), "") if root is not None else ""
    found = [path for path, calls in seen.calls.items() if len(calls) == depth and path.startswith(prefix)]
    outer = [path for path in found if not any(path != other and path.startswith(other + ".") for other in found)]
    return (outer[0], seen.calls[outer[0]]) if len(outer) == 1 else None


def _rows_first(state: Tensor | None, rows: int) -> Tensor:
    """(tokens, batch, width) -> (batch, tokens, width); no batch here has as many rows as tokens."""
    if state is None:
        raise NoReferenceError("a layer gives no tensor")
    if state.ndim >= 3 and state.shape[0] != rows and state.shape[1] == rows:
        return state.transpose(0, 1)
    return state


def attention_maps(model: PreTrainedModel, batch: Batch, seen: Seen, stack: Stack) -> list[Tensor]:
    """The probabilities of every layer, ``(batch, heads, queries, keys)``, as the plain attention returns them.

    Raises:
        NoReferenceError: it returns none.
    """
    twin = _eager(model)
    with _noted_maps(twin, seen, stack) as noted:
        try:
            output = run(twin, batch, output_attentions=True)
        except Exception:
            noted.clear()
            output = run(twin, batch)
    layers_of = seen.layers.get("decoder" if stack == "cross" else stack)
    depth = len(seen.calls[layers_of]) if layers_of is not None else None
    stated = _field(output, MAPS[stack])
    if stated is not None and len(stated) == depth and all(_is_map(x) for x in stated):
        return list(stated)
    place = 1 if stack == "cross" else 0
    maps = [found[place] for found in noted.values() if len(found) > place]
    if len(maps) == depth and all(_is_map(x) for x in maps):
        return maps
    raise NoReferenceError("the plain attention returns no probabilities")


def _eager(model: PreTrainedModel) -> PreTrainedModel:
    try:
        return eager_copy(model)
    except Exception as error:
        raise NoReferenceError(f"no eager attention: {error}") from error


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4


@contextmanager
def _noted_maps(model: nn.Module, seen: Seen, stack: Stack) -> Iterator[dict[int, list[Tensor]]]:
    """Note what every eager attention function returns, by the number of the layer that runs."""
    noted: dict[int, list[Tensor]] = {}
    path = seen.layers.get("decoder" if stack == "cross" else stack)
    handles, running, count = [], [False], [0]

    def before(module: nn.Module, args: Any) -> None:
        count[0] += 1
        running[0] = True

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running[0] = False

    if path is not None:
        for layer in dict.fromkeys(model.get_submodule(path)):
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
    files = {sys.modules[type(m).__module__] for m in model.modules()}
    plain = {file: file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")}

    def wrapped(function: Any) -> Any:
        def attention(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if running[0]:
                noted.setdefault(count[0], []).append(result[1])
            return result

        return attention

    for file, function in plain.items():
        file.eager_attention_forward = wrapped(function)
    try:
        yield noted
    finally:
        for file, function in plain.items():
            file.eager_attention_forward = function
        for handle in handles:
            handle.remove()


def token_masks(model: PreTrainedModel, batch: Batch, seen: Seen) -> dict[Stack, Tensor]:
    """The real tokens of every stack, by what the batch says."""
    masks: dict[Stack, Tensor] = {}
    for stack, states in seen.states.items():
        rows, tokens = states[-1].shape[:2]
        masks[stack] = _mask(model, batch, stack, rows, tokens)
    if "decoder" in masks:
        masks["cross"] = masks["decoder"]
    return masks


def _mask(model: PreTrainedModel, batch: Batch, stack: Stack, rows: int, tokens: int) -> Tensor:
    given = batch.get("attention_mask")
    if stack == "decoder":
        labels = batch.get("labels")
        if (given := batch.get("decoder_attention_mask")) is None and labels is not None and labels.ndim == 2:
            given = labels != -100
        elif given is None and "decoder_input_ids" not in batch:
            given = batch.get("attention_mask")
    if given is None:
        return torch.ones(rows, tokens, dtype=torch.bool)
    if given.shape[1] != tokens:
        shorter = getattr(model, "_get_feature_vector_attention_mask", None) or getattr(
            getattr(model, model.base_model_prefix, None), "_get_feature_vector_attention_mask", None
        )
        if shorter is None:
            raise NoReferenceError(f"{tokens} states for {given.shape[1]} positions of the mask")
        given = shorter(tokens, given)
    return given.bool()


def pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Student layer ``i`` of ``S`` and teacher layer ``ceil(i T / S)``."""
    return [(i, next(t for t in range(1, teacher + 1) if t * student >= i * teacher)) for i in range(1, student + 1)]


def mean(values: list[float]) -> float:
    """The mean; nothing to average is an error."""
    if not values:
        raise NoReferenceError("nothing counts")
    return sum(values) / len(values)


def hidden_mse(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> float:
    """Mean over layer pairs, examples, real tokens and features."""
    found = []
    for s, t in pairs(len(student) - 1, len(teacher) - 1):
        examples = []
        for row in range(len(mask)):
            if not bool(mask[row].any()):
                continue
            tokens = [(student[s][row, i] - teacher[t][row, i]).square().mean().item()
                      for i in range(mask.shape[1]) if mask[row, i]]  # fmt: skip
            examples.append(mean(tokens))
        found.append(mean(examples))
    return mean(found)


def pooled_mse(student: list[Tensor], teacher: list[Tensor], mask: Tensor, pooling: str) -> float:
    """Mean over layer pairs and examples of the squared error of one state an example."""
    found = []
    for s, t in pairs(len(student) - 1, len(teacher) - 1):
        examples = []
        for row in range(len(mask)):
            real = [i for i in range(mask.shape[1]) if mask[row, i]]
            if real:
                a, b = (_pool(x[row], real, pooling) for x in (student[s], teacher[t]))
                examples.append((a - b).square().mean().item())
        found.append(mean(examples))
    return mean(found)


def _pool(states: Tensor, real: list[int], pooling: str) -> Tensor:
    if pooling == "mean":
        return torch.stack([states[i] for i in real]).mean(0)
    return states[real[0] if pooling == "first" else real[-1]]


def attention_kl(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> float:
    """Mean over layer pairs, examples, heads and real queries of the divergence, over the keys that both look at."""
    found = []
    for s, t in pairs(len(student), len(teacher)):
        examples = []
        for row in range(len(mask)):
            p_s, p_t = student[s - 1][row], teacher[t - 1][row]
            if p_s.shape != p_t.shape or p_s.shape[1] != mask.shape[1]:
                raise NoReferenceError(f"maps of shape {tuple(p_s.shape)} and {tuple(p_t.shape)}")
            values = [_kl(p_s[:, i], p_t[:, i]) for i in range(mask.shape[1]) if mask[row, i]]
            if values:
                examples.append(mean(values))
        found.append(mean(examples))
    return mean(found)


def _kl(s: Tensor, t: Tensor) -> float:
    both = (s > 0) & (t > 0)
    s, t = (torch.where(both, x, 0) for x in (s, t))
    s, t = (x / x.sum(-1, keepdim=True) for x in (s, t))
    terms = torch.where(both, t * (t.clamp(min=1e-300).log() - s.clamp(min=1e-300).log()), 0)
    return terms.sum(-1).mean().item()


def shift(model: PreTrainedModel, batch: Batch) -> int:
    """How many positions behind its logits a label stands: 0 or 1, by the model's own loss.

    Raises:
        NoReferenceError: the loss is neither cross-entropy.
    """
    output = run(model, batch)
    labels, logits = batch["labels"], output.logits
    found = []
    for step in (0, 1):
        values = [-logits[row, i].log_softmax(-1)[labels[row, i + step]].item()
                  for row in range(len(labels)) for i in range(min(logits.shape[1], labels.shape[1]) - step)
                  if labels[row, i + step] != -100]  # fmt: skip
        if values and abs(mean(values) - output.loss.item()) < 1e-5 * abs(output.loss.item()):
            found.append(step)
    if len(found) != 1:
        raise NoReferenceError("the model's loss is neither the shifted nor the unshifted cross-entropy")
    return found[0]


def logits_kl(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float = 2.0) -> float:
    """Mean over the target tokens."""
    values = []
    for row in range(len(targets)):
        for i in range(targets.shape[1]):
            if targets[row, i]:
                s, t = ((x[row, i] / temperature).log_softmax(-1) for x in (student, teacher))
                values.append(temperature**2 * (t.exp() * (t - s)).sum().item())
    return mean(values)


def pooling(model: PreTrainedModel, batch: Batch, seen: Seen, stack: Stack) -> str:
    """Which state stands for an example: where the head of classes reads, or what sees the whole input.

    By derivatives of the logits by the last layer's output. Without such a head it is the first state, unless no state
    depends on later tokens: then the last one. The first state of a decoder sees the encoder's whole input.
    """
    rows = len(next(iter(batch.values())))
    mask = _mask(model, batch, stack, rows, seen.states[stack][-1].shape[1])
    logits = getattr(seen.output, "logits", None)
    if stack == "encoder" or logits is None or logits.ndim != 2:
        return "first" if stack is not None else _without_head(model, batch, mask)
    noted: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        first = first_tensor(output)
        assert first is not None
        first.retain_grad()
        noted.append(first)

    handle = seen.calls[seen.layers[stack]][-1].module.register_forward_hook(keep)
    names = forward_names(model)
    try:
        with torch.enable_grad():
            model(**{k: v for k, v in batch.items() if k in names and k != "labels"}).logits.square().sum().backward()
    finally:
        handle.remove()
        model.zero_grad()
    gradient = noted[-1].grad
    if gradient is None:
        raise NoReferenceError("the head does not read the last layer")
    return _kind(_rows_first(gradient, rows).abs().flatten(2).sum(-1), mask)


def _kind(reached: Tensor, mask: Tensor) -> str:
    """Which states a head reads; all of them, in whatever way, count as the mean unless the first is set apart."""
    kinds = set()
    for row in range(len(mask)):
        real = [i for i in range(mask.shape[1]) if mask[row, i]]
        read = [i for i in range(mask.shape[1]) if reached[row, i] > 0]
        kinds.add("first" if read == real[:1] else "last" if read == real[-1:] else "mean" if read == real else "other")
    if len(kinds) != 1 or kinds == {"other"}:
        raise NoReferenceError(f"the head reads neither the first, nor the last, nor all real tokens: {sorted(kinds)}")
    return kinds.pop()


def _without_head(model: PreTrainedModel, batch: Batch, mask: Tensor) -> str:
    """By a change of the last token: does the first state notice it?"""
    names = forward_names(model)
    inputs = {name: value for name, value in batch.items() if name in names and name != "labels"}
    if "input_ids" not in inputs or mask.shape != inputs["input_ids"].shape:
        return "first"
    changed = dict(inputs)
    changed["input_ids"] = inputs["input_ids"].clone()
    for row in range(len(mask)):
        end = int(mask[row].nonzero()[-1])
        changed["input_ids"][row, end] = changed["input_ids"][row, end] - 1
    with torch.no_grad():
        a, b = (first_tensor(model(**x)) for x in (inputs, changed))
    assert a is not None
    assert b is not None
    row = 0
    first = int(mask[row].nonzero()[0])
    return "last" if torch.equal(a[row, first], b[row, first]) else "first"
