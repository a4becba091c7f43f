"""The cells of the table: the library's value of one term against the hand-made one."""

import re
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ildistil import Distillation, Step, objectives
from ildistil.errors import IldistilError
from sweep import reference
from sweep.architectures import Architecture
from sweep.batches import Batch
from sweep.build import Pair, run
from sweep.reference import NoReferenceError, Seen, Stack

ORDER = ("wrong", "foreign", "no reference", "right", "refused")  # what several batches of a cell come to


class Cell(NamedTuple):
    """What one term of one architecture came to."""

    term: str
    result: str
    why: str = ""


class Row:
    """The hand-made runs of one architecture, made when they are asked for, and its cells."""

    def __init__(self, architecture: Architecture, pair: Pair) -> None:
        self.architecture, self.pair = architecture, pair
        self.several = bool(getattr(pair.teacher.config, "is_encoder_decoder", False))
        self._seen: dict[tuple[str, str], Seen] = {}
        self._cache: dict[Any, Any] = {}

    def cells(self) -> list[Cell]:
        """All cells; references come before the library touches the models."""
        stacks: tuple[Stack, ...] = ("encoder", "decoder", "cross") if self.several else (None,)
        self.stacks = stacks
        plans: list[tuple[str, Callable[[], objectives.Objective], Callable[[str], float]]] = []
        for stack in stacks:
            of = "" if stack is None else f", {stack}"
            if stack != "cross":
                plans.append((f"HiddenMSE{of}", lambda s=stack: objectives.HiddenMSE(stack=s), lambda b, s=stack: self.hidden(b, s)))
                plans.append((f"CLSMSE{of}", lambda s=stack: objectives.CLSMSE(stack=s), lambda b, s=stack: self.cls(b, s)))
            plans.append((f"AttentionKL{of}", lambda s=stack: objectives.AttentionKL(stack=s), lambda b, s=stack: self.attention(b, s)))
        if self.architecture.head != "base":
            tokens = self.architecture.head in ("masked", "causal", "seq2seq")
            kind = objectives.LogitsKL if tokens else objectives.LogitsMSE
            plans.append((kind.__name__, kind, self.logits))
            if any("labels" in batch for batch in self.pair.batches.values()):
                plans.append(("TaskLoss", objectives.TaskLoss, self.task))
        expected = [{name: self._reference(make, name) for name in self.pair.batches} for _, _, make in plans]
        return [self._cell(term, make, values) for (term, make, _), values in zip(plans, expected, strict=True)]

    def _reference(self, make: Callable[[str], float], name: str) -> float | str:
        try:
            return make(name)
        except NoReferenceError as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300] + _last_line(error)

    def _cell(self, term: str, make: Callable[[], objectives.Objective], expected: dict[str, float | str]) -> Cell:
        found: list[Cell] = []
        engine: Distillation | None = None
        try:
            engine = Distillation(self.pair.student, self.pair.teacher, [make()])
            engine.eval()
            engine.dry_run(self.pair.batches["short"])
        except IldistilError as error:
            return Cell(term, "refused", str(error))
        except Exception as error:
            return Cell(term, "foreign", _foreign(error, "dry run"))
        finally:
            if engine is not None and not engine.objectives:
                engine.detach()
        for name, batch in self.pair.batches.items():
            found.append(self._one(engine, term, name, batch, expected[name]))
        engine.release()
        found.sort(key=lambda cell: ORDER.index(cell.result))
        worst = found[0]
        refused = next((cell for cell in found if cell.result == "refused"), None)
        return refused if worst.result == "right" and refused is not None else worst

    def _one(self, engine: Distillation, term: str, name: str, batch: Batch, expected: float | str) -> Cell:
        try:
            with torch.no_grad():
                value = next(iter(engine(batch, Step(0)).values.values())).item()
        except IldistilError as error:
            return Cell(term, "refused", f"{error} [on the {name} batch]")
        except Exception as error:
            return Cell(term, "foreign", _foreign(error, f"{name} batch"))
        if isinstance(expected, str):
            return Cell(term, "no reference", f"{expected} (the library gives {value:.6g})")
        if expected == 0 or expected != expected:
            return Cell(term, "no reference", f"the reference is {expected}, the library gives {value:.6g}")
        off = abs(value - expected) / abs(expected)
        limit = 1e-6 if self.pair.dtype == torch.float64 else 1e-3
        return Cell(term, "right" if off < limit else "wrong", f"{value:.8g} for {expected:.8g} on the {name} batch")

    def seen(self, role: str, name: str) -> Seen:
        """What a plain run of a model on a batch gave."""
        if (role, name) not in self._seen:
            model = self._model(role)
            depth = self.depths[role]
            self._seen[role, name] = reference.observe(model, self.pair.batches[name], depth, self.stacks)
        return self._seen[role, name]

    @property
    def depths(self) -> dict[str, int]:
        """The numbers of layers that both were built with."""
        return {role: _depth(self._model(role)) for role in ("student", "teacher")}

    def _model(self, role: str) -> PreTrainedModel:
        return self.pair.student if role == "student" else self.pair.teacher

    def _both(self, name: str, stack: Stack) -> tuple[Seen, Seen, torch.Tensor]:
        s, t = self.seen("student", name), self.seen("teacher", name)
        of = "decoder" if stack == "cross" else stack
        if of not in s.states or of not in t.states:
            raise NoReferenceError("its layers aren't found by their outputs")
        mask = reference.token_masks(self.pair.student, self.pair.batches[name], s)[stack]
        return s, t, mask

    def hidden(self, name: str, stack: Stack) -> float:
        """HiddenMSE."""
        s, t, mask = self._both(name, stack)
        return reference.hidden_mse(s.states[stack], t.states[stack], mask)

    def cls(self, name: str, stack: Stack) -> float:
        """CLSMSE."""
        s, t, mask = self._both(name, stack)
        kind = reference.pooling(self.pair.student, self.pair.batches[name], s, stack)
        return reference.pooled_mse(s.states[stack], t.states[stack], mask, kind)

    def attention(self, name: str, stack: Stack) -> float:
        """AttentionKL."""
        s, t, mask = self._both(name, stack)
        batch = self.pair.batches[name]
        maps = [reference.attention_maps(m, batch, x, stack) for m, x in ((self.pair.student, s), (self.pair.teacher, t))]
        return reference.attention_kl(*maps, mask)

    def logits(self, name: str) -> float:
        """LogitsMSE of classes, LogitsKL of tokens."""
        batch = self.pair.batches[name]
        s, t = (run(self._model(role), batch).logits for role in ("student", "teacher"))
        if s.ndim == 2:
            return reference.mean([(a - b).square().mean().item() for a, b in zip(s, t, strict=True)])
        labels = batch.get("labels")
        if labels is None or labels.ndim != 2:
            raise NoReferenceError(f"logits of shape {tuple(s.shape)} without labels")
        step = reference.shift(self.pair.student, batch)
        targets = torch.zeros_like(labels, dtype=torch.bool)
        targets[:, : labels.shape[1] - step] = labels[:, step:] != -100
        real = None if self.several else batch.get("attention_mask")
        if real is not None and real.shape == targets.shape and step:
            targets &= real.bool()
        return reference.logits_kl(s, t, targets)

    def task(self, name: str) -> float:
        """The model's own loss."""
        loss: float = run(self.pair.student, self.pair.batches[name]).loss.item()
        return loss


def _depth(model: PreTrainedModel) -> int:
    text = model.config.get_text_config()
    names = ("num_hidden_layers", "encoder_layers", "n_layer", "num_layers", "n_layers", "depth")
    return next((v for n in names if isinstance(v := getattr(text, n, None), int)), 0)


def _foreign(error: Exception, where: str) -> str:
    return f"{type(error).__name__}: {error}"[:300] + _last_line(error) + f" [in the {where}]"


def _last_line(error: Exception) -> str:
    """The last line of the library in a traceback, and the very last one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if re.search(r"/(ildistil|sweep)/[^/]*", f.filename)]
    places = [f"{f.filename.rsplit('/', 2)[-2]}/{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in (*ours[-1:], *frames[-1:])]
    return " (" + ", ".join(dict.fromkeys(places)) + ")" if places else ""
