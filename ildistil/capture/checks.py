"""Checks of what a run recorded: that it is complete, and what it is taken for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ildistil.attention import Attention, Masks, allowed_map
from ildistil.capture.recorder import Key, PaddingMasks, Recorder, Records
from ildistil.capture.taps import Tap
from ildistil.errors import CaptureError


def check_complete(model: str, recorder: Recorder, records: Records, depths: Mapping[str | None, int] | None) -> None:
    """Refuse a run that lacks something wanted, or, unless it stopped before its end (no ``depths``), some layers."""
    wanted = recorder.wanted_hidden | recorder.wanted_attention.keys()
    for stack, depth in (depths or {}).items():
        layers = records.layers_run["decoder" if stack == "cross" else stack]
        if layers != depth and any(stack == of for of, _ in wanted):
            where = "" if stack is None else f" (stack {stack!r})"
            raise CaptureError(
                f"The {model} ran {layers} layers, its depth is {depth}{where}. "
                "Switch off whatever skips layers (layerdrop, early exit)."
            )
    missing = [Tap("hidden", k, stack) for stack, k in recorder.wanted_hidden - records.hidden.keys()]
    missing += [Tap("attention", k, stack) for stack, k in recorder.wanted_attention.keys() - records.attention.keys()]
    missing += [Tap(path) for path in recorder.paths & recorder.wanted_names - records.modules.keys()]
    if missing:
        remedy = (
            "Its attention does not go through transformers' AttentionInterface; use hidden-state objectives, or "
            "tap its modules by path."
            if any(tap.name == "attention" for tap in missing)
            else "Check that its forward really runs this module."
        )
        raise CaptureError(f"The {model} did not give {', '.join(sorted(map(str, missing)))}. {remedy}")


def check_between_layers(model: str, records: Records) -> None:
    """Refuse a layer whose output the model changes before the next layer is given it."""
    for place, given in records.given.items():
        state = records.hidden[place]
        # Padding may be not a number.
        if given.shape != state.shape or not torch.allclose(given.to(state), state, rtol=0, atol=0, equal_nan=True):
            raise CaptureError(
                f"{Tap('hidden', place[1], place[0])} of the {model} is not what layer {place[1] + 1} is given: "
                "something changes the states between these layers. Map another layer, or tap the module that gives "
                "what you want by its path."
            )


def check_attention_shapes(model: str, attention: Mapping[Key, Attention], masks: PaddingMasks, rows: int) -> None:
    """Refuse attention over something else than the tokens of each of the batch's rows, such as windows of images."""
    for place, record in attention.items():
        query, key, value = record.query.shape, record.key.shape, record.value.shape
        of_queries, of_keys = (None if mask is None else mask.shape[1] for mask in masks[place[0]])
        fits = len(query) == len(key) == len(value) == 4 and query[0] == key[0] == value[0] == rows
        fits = fits and of_queries in (None, query[2]) and of_keys in (None, key[2]) and key[2] == value[2]
        if not fits or query[1] % key[1] or query[1] % value[1] or query[3] != key[3]:
            raise CaptureError(
                f"{Tap('attention', place[1], place[0])} of the {model} has queries of the shape {tuple(query)}, keys "
                f"of {tuple(key)} and values of {tuple(value)}, on a batch of {rows} rows"
                f"{'' if of_keys is None else f' of {of_keys} tokens'}: it isn't the attention of the tokens to each "
                "other. Use hidden-state objectives for this model."
            )


class MaskCheck:
    """Checks in every run that the masks which a model passes to its attention are those that were understood.

    Reading a result back holds a GPU up. There it is read when a run may show something new, and every 64 runs; on a
    CPU always.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self._longest = self._runs = 0
        self._wrong: dict[Key, tuple[Tensor, Masks]] = {}

    def __call__(self, attention: Mapping[Key, Attention], passed: Mapping[Key, Any], verify: bool) -> None:
        """Check the attention that one run recorded against the masks passed to it; ``verify`` reads in any case."""
        checked: set[tuple[Any, ...]] = set()
        read = verify or self._runs % 64 == 0
        for place, mask in passed.items():
            record = attention[place]
            # Mostly all layers are passed one mask.
            kind = (id(mask), place[0], record.masks.causal, record.masks.window)
            if kind in checked:
                continue
            checked.add(kind)
            wrong = _differs(record, mask)
            before = self._wrong.get(place)
            self._wrong[place] = (
                wrong if before is None else wrong | before[0],
                record.masks._replace(query_mask=None, key_mask=None),
            )
            longest = max(record.query.shape[2], record.key.shape[2])
            read = read or reads_at_once(wrong.device) or longest > self._longest
            self._longest = max(longest, self._longest)
        self._runs += 1
        if read and self._wrong:
            found, self._wrong = self._wrong, {}
            if bool(torch.stack([wrong for wrong, _ in found.values()]).any()):
                raise self._error(*next((place, masks) for place, (wrong, masks) in found.items() if wrong))

    def _error(self, place: Key, masks: Masks) -> CaptureError:
        return CaptureError(
            f"{Tap('attention', place[1], place[0])} of the {self.model} uses a mask that is not "
            f"its padding mask{', causality' if masks.causal else ''}{' and window' if masks.window else ''}. "
            "Attention objectives would compare maps the model never makes; use hidden-state objectives for this "
            "model."
        )


def reads_at_once(device: torch.device) -> bool:
    """Return whether a result is there when it is asked for, so that reading it holds nothing up."""
    return device.type == "cpu"


def _differs(record: Attention, passed: Any) -> Tensor:
    """Return whether a mask is another one than understood, as a boolean scalar on its device."""
    queries, keys, device = record.query.shape[2], record.key.shape[2], record.query.device
    understood = record.allowed_map()
    added: Tensor | bool = False
    if passed is None:  # padding is not masked
        allowed = allowed_map(record.query, record.key, record.masks._replace(key_mask=None))
    elif isinstance(passed, Tensor) and passed.ndim != 4:  # a flash kernel gets the padding mask itself
        return torch.zeros((), dtype=torch.bool, device=device)
    elif not isinstance(passed, Tensor):  # flex attention is passed a rule
        from torch.nn.attention.flex_attention import create_mask  # slow to import

        allowed = create_mask(passed.mask_mod, len(record.query), 1, queries, keys, device=device)
    else:
        passed = passed[..., :keys]
        if passed.shape[-2] not in (1, queries) or passed.shape[-1] not in (1, keys):
            return torch.ones((), dtype=torch.bool, device=device)
        allowed = passed > torch.finfo(passed.dtype).min / 2 if passed.is_floating_point() else passed.bool()
        added = allowed & (passed != 0) if passed.is_floating_point() else False  # to the scores
    wrong: Tensor = (((allowed != understood) | added) & record.real()[:, None, :, None]).any()
    return wrong
