"""The terms as loops over examples and tokens, from what plain runs gave."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sweep.batches import Batch
from sweep.build import first_tensor, forward_inputs, run
from sweep.reference import NoReferenceError, Seen, Stack


def pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Student layer ``i`` of ``S`` and teacher layer ``ceil(i T / S)``."""
    return [(i, next(t for t in range(1, teacher + 1) if t * student >= i * teacher)) for i in range(1, student + 1)]


def mean(values: list[float]) -> float:
    """The mean; nothing to average is no reference."""
    if not values:
        raise NoReferenceError("nothing counts")
    return sum(values) / len(values)


def _real(mask: Tensor) -> list[list[int]]:
    return [[i for i, real in enumerate(row) if real] for row in mask.tolist()]


def _squares(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().item()


def hidden_mse(student: Seen, teacher: Seen, stack: Stack) -> float:
    """Mean over layer pairs, examples, real tokens and features."""
    real, ours, theirs = _real(student.mask(stack)), student.states[stack], teacher.states[stack]
    return mean([
        mean([
            mean([_squares(ours[s][row, i], theirs[t][row, i]) for i in places])
            for row, places in enumerate(real) if places
        ])
        for s, t in pairs(len(ours) - 1, len(theirs) - 1)
    ])  # fmt: skip


def cls_mse(student: Seen, teacher: Seen, stack: Stack) -> float:
    """Mean over layer pairs, examples and features of the state that stands for a whole example."""
    real, ours, theirs = _real(student.mask(stack)), student.states[stack], teacher.states[stack]
    how = pooling(student, stack)

    def pooled(states: Tensor, places: list[int]) -> Tensor:
        if how == "mean":
            return torch.stack([states[i] for i in places]).mean(0)
        return states[places[0] if how == "first" else places[-1]]

    return mean([
        mean([_squares(pooled(ours[s][row], p), pooled(theirs[t][row], p)) for row, p in enumerate(real) if p])
        for s, t in pairs(len(ours) - 1, len(theirs) - 1)
    ])  # fmt: skip


def attention_kl(student: Seen, teacher: Seen, stack: Stack) -> float:
    """Mean over layer pairs, examples, heads and real queries of the divergence, over the keys that both look at."""
    real, ours, theirs = _real(student.mask(stack)), student.maps(stack), teacher.maps(stack)
    found = []
    for s, t in pairs(len(ours), len(theirs)):
        p_s, p_t = ours[s - 1], theirs[t - 1]
        if p_s.shape != p_t.shape or p_s.shape[2] != len(student.mask(stack)[0]):
            raise NoReferenceError(f"maps of shape {tuple(p_s.shape)} and {tuple(p_t.shape)}")
        rows = [[_kl(p_s[row, :, i], p_t[row, :, i]) for i in places] for row, places in enumerate(real)]
        found.append(mean([mean(values) for values in rows if values]))
    return mean(found)


def _kl(s: Tensor, t: Tensor) -> float:
    both = (s > 0) & (t > 0)
    s, t = (torch.where(both, x, 0) for x in (s, t))
    s, t = (x / x.sum(-1, keepdim=True) for x in (s, t))
    terms = torch.where(both, t * (t.clamp(min=1e-300).log() - s.clamp(min=1e-300).log()), 0)
    return terms.sum(-1).mean().item()


def logits(student: Seen, teacher: Seen, temperature: float = 2.0) -> float:
    """The squared error of logits of classes, mean over examples; the divergence of those of tokens, over targets."""
    s, t, batch = student.output.logits, teacher.output.logits, student.batch
    if s.ndim == 2:
        return mean([_squares(a, b) for a, b in zip(s, t, strict=True)])
    labels = batch.get("labels")
    if labels is None or labels.ndim != 2:
        raise NoReferenceError(f"logits of shape {tuple(s.shape)} without labels of tokens")
    step, read = shift(student.model, batch), batch.get("attention_mask")
    if step == 0 or student.model.config.is_encoder_decoder or read is None or read.shape != labels.shape:
        read = torch.ones_like(labels)
    values = []
    for row, places in enumerate(_real(labels != -100)):
        for i in (place - step for place in places if place >= step and read[row, place - step]):
            a, b = ((x[row, i] / temperature).log_softmax(-1) for x in (s, t))
            values.append(temperature**2 * (b.exp() * (b - a)).sum().item())
    return mean(values)


def shift(model: PreTrainedModel, batch: Batch) -> int:
    """How many positions behind its logits a label stands: 0 or 1, by the model's own loss."""
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


def pooling(seen: Seen, stack: Stack) -> str:
    """Which state stands for an example: where the head of classes reads, or what sees the whole input.

    By derivatives of the logits by the last layer's output. Without such a head it is the first state, unless no state
    depends on later tokens: then the last one. The first state of a decoder sees the encoder's whole input.
    """
    of_logits = getattr(seen.output, "logits", None)
    if stack == "encoder" or of_logits is None or of_logits.ndim != 2:
        return "first" if stack is not None else _by_what_is_seen(seen)
    noted: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        state = first_tensor(output)
        assert state is not None
        state.retain_grad()
        noted.append(state)

    handle = seen.model.get_submodule(seen.layers[stack])[-1].register_forward_hook(keep)
    inputs = {name: value for name, value in forward_inputs(seen.model, seen.batch).items() if name != "labels"}
    try:
        with torch.enable_grad():
            seen.model(**inputs).logits.square().sum().backward()
    finally:
        handle.remove()
        seen.model.zero_grad()
    if noted[-1].grad is None:
        raise NoReferenceError("the head does not read the last layer")
    reached = seen.rows_first(noted[-1].grad).abs().flatten(2).sum(-1)
    kinds = set()
    for row, real in enumerate(_real(seen.mask(stack))):
        read = [i for i in range(reached.shape[1]) if reached[row, i] > 0]
        most = len(set(read) & set(real)) > len(real) / 2  # some leave out a special token, or count padding
        kinds.add("first" if read == real[:1] else "last" if read == real[-1:] else "mean" if most else "other")
    if len(kinds) != 1 or kinds == {"other"}:
        raise NoReferenceError("the head reads neither the first, nor the last, nor most tokens")
    return kinds.pop()


def _by_what_is_seen(seen: Seen) -> str:
    """By a change of the last token of the first row: does the state before it, which any window reaches, notice?"""
    real, ids = _real(seen.mask(None))[0], seen.batch.get("input_ids")
    if ids is None or seen.mask(None).shape != ids.shape:
        return "first"
    changed = ids.clone()
    changed[0, real[-1]] -= 1
    other = Seen(seen.model, {**seen.batch, "input_ids": changed}, (None,)).states[None][-1]
    state = seen.states[None][-1]
    # Experts take tokens together, so even what can't see the change may be rounded otherwise.
    moved = (other[0] - state[0]).norm(dim=-1)
    return "last" if moved[real[-2]] < 1e-5 * moved[real[-1]] else "first"
