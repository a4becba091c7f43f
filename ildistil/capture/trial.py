"""Trial runs on one row of a batch: they tell of a model what no config says, by what it does."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ildistil.capture.inputs import input_names
from ildistil.capture.recorder import layer_states
from ildistil.errors import CaptureError, ModelRunError
from ildistil.functional.pooling import Pooling

_TELLING = 5  # tokens tell the first and the last one apart from several between


@contextmanager
def same_state(model: nn.Module) -> Iterator[None]:
    """Leave the training mode of every module, and the random state, as they were."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model plainly in eval mode, without gradients, and leave its mode and the random state as they were."""
    versions = _versions(model)
    with same_state(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        yield
    if versions != _versions(model):
        raise CaptureError(
            f"The {type(model).__name__} changes its own weights when it runs in eval mode, and so can't be tried "
            "between forward and backward. Switch that off (RWKV: rescale_every=0 in its config)."
        )


def _versions(model: nn.Module) -> int:
    """Return how often trained parameters have been written to."""
    return sum(parameter._version for parameter in model.parameters() if parameter.requires_grad)


class Trial(NamedTuple):
    """Inputs to run a model on, and the row among them that is looked at.

    Attributes:
        inputs: of this row alone, or of the whole batch where they can't be taken apart.
        rows: how many these are.
        row: where it is among them.
        start: its first real token.
        end: where its real tokens end.
        tokens: how many there are, padding included.
    """

    inputs: Mapping[str, Any]
    rows: int
    row: int
    start: int
    end: int
    tokens: int

    @property
    def tells(self) -> bool:
        """Whether the row has tokens enough to tell the first one apart from the others."""
        return self.end - self.start > 1

    @classmethod
    def of(cls, inputs: Mapping[str, Any], mask: Tensor, repeats: bool = True) -> "Trial":
        """Take the longest row that has padding, which some models mind, or else the longest one.

        The tokens of a row that is too short to tell its first, last and other ones apart are repeated.
        """
        lengths = mask.sum(1)
        shortest = 0 if repeats else 2
        padded = torch.where((lengths < mask.shape[1]) & (lengths > shortest), lengths, 0)
        row = int((padded if bool(padded.any()) else lengths).argmax())
        places, tokens = mask[row].nonzero()[:, 0].tolist(), mask.shape[1]
        start, end = (places[0], places[-1] + 1) if places else (0, 0)
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        if any(value.ndim == 0 or len(value) != len(mask) for value in tensors):
            return cls(inputs, len(mask), row, start, end, tokens)
        one = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        # Only where tokens are what is read: a few frames of speech are made of many samples.
        by_token = "input_ids" in one and all(value.ndim > 1 and value.shape[1] == tokens for value in tensors)
        if repeats and by_token and 0 < end - start < _TELLING:
            places = [*range(start, end)] * -(-_TELLING // (end - start))
            # With a column of the padding that it has.
            columns = [*range(min(start, 1)), *places, *range(end, min(end + 1, tokens))]
            for name, value in one.items():
                if isinstance(value, Tensor):
                    one[name] = value[:, columns]
            start, tokens = min(start, 1), len(columns)
            end = start + len(places)
        return cls(one, 1, 0, start, end, tokens)

    def changed(self, name: str) -> dict[str, Any] | None:
        """Return the inputs with other tokens behind the first one; ``None`` where the row has but one.

        The tokens may be ``"labels"``, of which a decoder's input is made, by shifting.
        """
        later = slice(self.start, self.end - 1) if name == "labels" else slice(self.start + 1, self.end)
        ids = self.inputs[name].clone()
        row = ids[self.row, later]
        if not len(row):
            return None
        rolled = row.roll(1)
        ids[self.row, later] = torch.where(rolled != row, rolled, (row.clamp(min=0) + 1) % 3)
        return {**self.inputs, name: ids}


def depends_on_later_tokens(states: Callable[[Mapping[str, Any]], Tensor], trial: Trial, name: str) -> bool | None:
    """Return whether the first token's state changes with all later tokens; ``None`` where that can't be tried."""
    changed = trial.changed(name)
    if changed is None:
        return None
    before, after = (states(inputs)[trial.row, trial.start : trial.end] for inputs in (trial.inputs, changed))
    moved = (after.double() - before.double()).norm(dim=-1)
    noise = 10 * torch.finfo(before.dtype).eps * moved.max()
    return bool(moved[0] > noise) if bool(noise > 0) else None


def pooled_states(model: nn.Module, layer: nn.Module, trial: Trial, tokens: int) -> Pooling | None:
    """Return which states of its last layer a head of classes reads; ``None`` without one, or if it reads others."""
    start, end = trial.start, trial.end
    plain, calls = _replaced_run(model, layer, trial, tokens, slice(0, 0), last=0)
    if plain is None or plain.ndim != 2:
        return None
    # The first one, and the others in two parts: who reads both of these reads them all.
    middle, read = start + 1 + max(1, (end - start - 1) // 2), []
    places = [slice(start, start + 1), slice(start + 1, middle), slice(middle, end)]
    for place in places if middle < end else places[:2]:
        logits, _ = _replaced_run(model, layer, trial, tokens, place, last=calls)
        read.append(logits is not None and not torch.equal(logits[trial.row], plain[trial.row]))
    if all(read[-2:]):
        return "mean"
    return "first" if read[0] and not any(read[1:]) else "last" if read[-1] and not any(read[:-1]) else None


def _replaced_run(
    model: nn.Module, layer: nn.Module, trial: Trial, tokens: int, place: slice, last: int
) -> tuple[Tensor | None, int]:
    """Return the logits with other states of some tokens in one run of a layer, and how often the layer runs."""
    calls = 0

    def replace(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == last:  # ALBERT runs one layer in all places
            chosen = layer_states(output, module).movedim((1 - tokens, tokens), (0, 1))[trial.row, place]
            chosen.copy_(chosen.flip(-1))  # neither shifted nor scaled, which a norm would undo

    handle = layer.register_forward_hook(replace)
    try:
        logits = getattr(_run(model, trial.inputs), "logits", None)
    finally:
        handle.remove()
    return logits if isinstance(logits, Tensor) else None, calls


def _run(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    try:
        return model(**inputs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model raises on a row that was taken out, or labels that were made up
        raise ModelRunError(f"it fails in a trial run ({type(error).__name__}: {error})") from error


def predicts_next_token(model: nn.Module, trial: Trial, vocabulary: int) -> bool | str | None:
    """Return whether the logits of a position predict the label of the next one, or the label of its own.

    The cross-entropy of a label ``v`` at position ``j`` is ``logsumexp(z_r) - z_rv`` for the row ``r`` that predicts
    it, so from one label to another the loss changes by ``z_rv - z_rv'``, whatever else is added to it and whatever it
    is scaled by. The row is the one whose logits agree with such changes. Where that isn't known return why, or
    ``None`` if the row is too short to tell.
    """
    if "labels" not in input_names(model):
        return "its forward takes no labels"
    at = min(trial.start + 2, trial.end - 1)
    if at == trial.start:
        return None
    first = vocabulary * 2 // 3
    try:
        loss, logits = _labelled_run(model, trial, at, first)
        if logits.shape[1:] != (trial.tokens, vocabulary):
            return f"with labels it gives logits of the shape {tuple(logits.shape)}"
        before, own = logits[trial.row, at - 1 : at + 1].double()
        tried = [(own - before).argmax(), (own - before).argmin(), before.argmax(), own.argmin()]
        labels = sorted({int(label) for label in tried} - {first})
        changes = torch.stack([_labelled_run(model, trial, at, label)[0] for label in labels]) - loss
    except ModelRunError as error:
        return str(error)
    same, following = (_agree(changes, row[first] - row[labels]) for row in (own, before))
    if same == following:
        return "its own loss is the cross-entropy neither of the same token nor of the next one"
    return following


def _labelled_run(model: nn.Module, trial: Trial, at: int, label: int) -> tuple[Tensor, Tensor]:
    """Return loss and logits for made-up labels up to a position, with this label there."""
    reference = next(v for v in trial.inputs.values() if isinstance(v, Tensor))
    labels = torch.full((trial.rows, trial.tokens), -100, device=reference.device)
    labels[trial.row, trial.start : at] = torch.arange(at - trial.start, device=reference.device) + 3
    labels[trial.row, at] = label
    inputs = {**trial.inputs, "labels": labels}
    if "labels" in trial.inputs:  # of which the decoder's input is made: mBART's begins with the last label
        inputs["decoder_input_ids"] = trial.inputs["labels"].clamp(min=0)
    output = _run(model, inputs)
    loss, logits = getattr(output, "loss", None), getattr(output, "logits", None)
    if not isinstance(loss, Tensor) or not isinstance(logits, Tensor) or loss.ndim or not bool(loss.isfinite()):
        raise ModelRunError("its loss on made-up labels is no finite number")
    return loss.double(), logits


def _agree(changes: Tensor, predicted: Tensor) -> bool:
    """Return whether the loss changes as a row of logits predicts, up to a positive factor: other labels count too."""
    factor = (changes @ predicted) / (predicted @ predicted)
    return bool((factor > 0) & ((changes - factor * predicted).norm() < 0.02 * changes.norm()))
