"""What a folder of targets holds: of which teacher, which tensors, in which precision. It is ``targets.json``."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
import transformers
import xxhash
from torch import Tensor, nn

from ildistil.attention import Attention, Masks, Scores
from ildistil.capture import Activations, KnownTraits, ModelInfo, Tap, merged, unwrapped
from ildistil.capture.inputs import input_names
from ildistil.capture.taps import PARTS
from ildistil.errors import TargetsError

__all__ = ["Column", "Constants", "Dtype", "Header", "Layout", "TeacherFacts", "weights_digest"]

Dtype = Literal["float16", "bfloat16", "float32"]
FORMAT = 4  # to be raised when the same targets would be stored in another way


@dataclass(frozen=True)
class Column:
    """One stored tensor: of a tap, or of a part (``"q"``, ``"k"``, ``"v"``) of an attention.

    ``shape`` is that of the value of one token, or of one row where ``per_token`` is false; heads come first.
    """

    tap: Tap
    part: str
    per_token: bool
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The tensor's name in the files."""
        return f"{self.tap}.{self.part}" if self.part else str(self.tap)

    @property
    def width(self) -> int:
        """Numbers per token, or per row."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Constants:
    """What an attention is made of beside tensors; and the heads and sizes of its parts, stored or not."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    unknown: str | None
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, tap: Tap, record: Attention) -> Self:
        """Read them from a layer that ran.

        Raises:
            TargetsError: something is added to its scores.
        """
        if record.raw.bias is not None:
            raise TargetsError(
                f"The teacher adds a bias to the scores of {tap} that depends on the positions of both tokens, a map "
                "for each head, which is too large to store. Use hidden-state objectives or RelationKL on v-v with "
                "stored targets, or run the teacher in each step."
            )
        shapes = {part: (record_part(record, part).shape[1], record_part(record, part).shape[3]) for part in PARTS}
        raw, masks = record.raw, record.masks
        return cls(float(raw.scale), masks.causal, masks.window, raw.softcap, record.unknown, shapes)

    def attention(self, parts: Mapping[str, Tensor], mask: Tensor | None) -> Attention:
        """Put an attention together again."""
        raw = Scores(parts["q"], parts["k"], self.scale, None, self.softcap)
        return Attention(raw, Masks(mask, mask, self.causal, self.window), parts["v"], self.unknown)


def record_part(record: Attention, part: str) -> Tensor:
    """Return queries, keys or values of an attention, with as many heads as the model has of them."""
    return {"q": record.query, "k": record.key, "v": record.value}[part]


@dataclass(frozen=True)
class Layout:
    """Which tensors are stored, and what reads them back as activations."""

    columns: tuple[Column, ...]
    attention: Mapping[str, Constants]  # by tap
    inputs: tuple[str, ...]  # what the teacher was given
    # What only a run tells; an early one may not know yet.
    traits: KnownTraits = field(default_factory=KnownTraits, compare=False)
    next_token: bool | None = field(default=None, compare=False)

    @classmethod
    def of(cls, wanted: Iterable[Tap], seen: Activations, inputs: tuple[str, ...]) -> Self:
        """Lay out what a run of the teacher gave.

        Raises:
            TargetsError: something wanted can't be stored.
        """
        taps = merged(wanted)
        check_storable(taps)
        columns: list[Column] = []
        attention: dict[str, Constants] = {}
        tokens = seen.mask.shape[1]
        for tap in sorted(taps, key=lambda tap: (tap.name, tap.layer or 0)):
            if tap.name == "attention":
                assert tap.layer is not None
                constants = attention[str(tap)] = Constants.of(tap, seen.attention[tap.layer])
                columns += [Column(tap.place, part, True, constants.shapes[part]) for part in tap.parts]
            else:
                value = recorded(tap, seen)
                # Of two dimensions it is a vector for each row: (batch, classes), or a pooled state.
                per_token = value.ndim > 2 and value.shape[1] == tokens
                columns.append(Column(tap, "", per_token, tuple(value.shape[2 if per_token else 1 :])))
        states = any(tap.name == "hidden" for tap in taps)
        traits = KnownTraits(seen.causal, seen.pooling) if states else KnownTraits()
        return cls(tuple(columns), attention, inputs, traits, seen.next_token)

    @property
    def taps(self) -> frozenset[Tap]:
        """All that is stored."""
        return merged(column.tap._replace(parts=column.part) for column in self.columns)

    def named(self, taps: Iterable[Tap]) -> list[Column]:
        """Return the columns of taps, of an attention those of the wanted parts."""
        parts = {tap.place: tap.parts for tap in merged(taps)}
        return [c for c in self.columns if c.tap in parts and (not c.part or c.part in parts[c.tap])]

    def lacking(self, taps: Iterable[Tap]) -> list[str]:
        """Name what is wanted and not stored."""
        stored = {column.name for column in self.columns}
        wanted = {f"{tap}.{part}" if part else str(tap) for tap in merged(taps) for part in tap.parts or ("",)}
        return sorted(wanted - stored)

    def bytes_per(self, *, token: bool, dtype: Dtype) -> int:
        """Return the bytes of one token, or of one row without its tokens."""
        return sum(c.width for c in self.columns if c.per_token == token) * torch_dtype(dtype).itemsize


def check_storable(wanted: Iterable[Tap]) -> None:
    """Refuse what belongs to no row, or to several texts."""
    for tap in wanted:
        if tap.name == "loss":
            raise TargetsError(
                "The teacher's loss is one number for a whole batch and can't be stored row by row. Run the teacher in "
                "each step for an objective that reads it."
            )
        if tap.stack is not None:
            raise TargetsError(
                f"Targets of an encoder-decoder ({tap}) can't be stored. Run the teacher in each step for this model."
            )


def recorded(tap: Tap, seen: Activations) -> Tensor:
    """Return what was recorded of a tap that isn't an attention.

    Raises:
        TargetsError: it is no tensor whose first dimension is the batch.
    """
    if tap.name == "hidden":
        assert tap.layer is not None
        return seen.hidden[tap.layer]
    value = seen.logits if tap.name == "logits" else seen.modules[tap.name]
    if not isinstance(value, Tensor) or value.ndim < 2 or len(value) != len(seen.mask):
        got = tuple(value.shape) if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TargetsError(
            f"{tap} of the teacher gives {got}; only tensors of shape (batch, tokens, ...) or (batch, ...) can be "
            "stored. Tap a module inside it that gives one, or run the teacher in each step."
        )
    return value


@dataclass(frozen=True)
class TeacherFacts:
    """What is known of the teacher when it isn't there.

    ``weights`` is the hash of its weights, ``source`` that of the files they came from, if any; ``read`` are the names
    that its ``forward`` knows.
    """

    info: ModelInfo
    weights: str
    source: str | None
    config: Mapping[str, Any] | None
    read: tuple[str, ...]

    @classmethod
    def of(cls, teacher: nn.Module, source: str | None) -> Self:
        """Read the facts of a teacher.

        Raises:
            TargetsError: it is an encoder-decoder.
        """
        model = unwrapped(teacher)
        info = ModelInfo.of(model)
        check_storable(Tap("hidden", 1, stack) for stack in info.stacks)
        return cls(
            info,
            weights_digest(model),
            source,
            _config_of(model),
            tuple(sorted(input_names(model))),
        )

    def check(self, teacher: nn.Module) -> None:
        """Refuse a model that isn't this teacher.

        Raises:
            TargetsError: it has other weights, or a config that makes something else of them.
        """
        model = unwrapped(teacher)
        self.compare(type(model).__name__, weights_digest(model), _config_of(model))

    def compare(self, name: str, weights: str, config: Mapping[str, Any] | None) -> None:
        """Refuse what is known of another teacher.

        Args:
            name: its class.
            weights: the hash of its weights.
            config: its config, if it has one.

        Raises:
            TargetsError: the weights are others, or the config makes something else of them.
        """
        if weights != self.weights:
            raise TargetsError(
                f"The targets are of another teacher: its weights ({self.info.name}, from {self.info.source or '?'}) "
                f"aren't those of this {name}. Give the teacher they were made with, in its precision, or another "
                "folder."
            )
        if told := _differing(self.config or {}, config or {}):
            raise TargetsError(
                f"The targets are of a teacher with the same weights and another config: {', '.join(told)}. Give the "
                "teacher they were made with, or another folder."
            )


def _config_of(model: nn.Module) -> dict[str, Any] | None:
    config = getattr(model, "config", None)
    if not isinstance(config, transformers.PreTrainedConfig):
        return None
    said: dict[str, Any] = json.loads(config.to_json_string())
    return said


# What differs between two copies of a teacher that answer alike: noise of training, names, and how it computes. Not all
# that ends on "_prob": norm_topk_prob is part of an answer.
_NO_ANSWER = re.compile(
    r"\w*dropout\w*|\w*pdrop|\w*layerdrop|drop_path_rate|initializer_range|_?name_or_path|architectures|"
    r"transformers_version|(torch_)?dtype|use_cache|problem_type|init_layers|id2label|label2id|_?attn_implementation\w*|"
    r"output_attentions|output_hidden_states|return_dict|gradient_checkpointing"
)


def _differing(stored: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return what may change a teacher's answer in its config. What only one of them has, came with another version.

    >>> _differing({"rope": {"theta": 1e4}, "hidden_dropout_prob": 0.1}, {"rope": {"theta": 1e6}, "bias": True})
    ['rope.theta is 1000000.0 and was 10000.0']
    """
    told: list[str] = []
    for key in sorted(stored.keys() & given.keys()):
        was, now = stored[key], given[key]
        if _NO_ANSWER.fullmatch(key) or was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            told += _differing(was, now, f"{prefix}{key}.")
        else:
            told.append(f"{prefix}{key} is {now!r} and was {was!r}")
    return told


def weights_digest(model: nn.Module) -> str:
    """Return a hash of a model's weights: of names, shapes, precision and values, wherever the model is.

    >>> weights_digest(nn.Linear(2, 2)) == weights_digest(nn.Linear(2, 2))
    False
    """
    digest = xxhash.xxh3_128()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}:".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Return torch's name of a precision.

    Raises:
        TargetsError: targets aren't stored in this precision.
    """
    if dtype not in get_args(Dtype):
        raise TargetsError(f"The dtype of targets is one of {', '.join(get_args(Dtype))}; got {dtype!r}.")
    found: torch.dtype = getattr(torch, dtype)
    return found


@dataclass(frozen=True)
class Header:
    """Everything that ``targets.json`` says."""

    dtype: Dtype
    teacher: TeacherFacts
    layout: Layout
    tokenizer: str | None

    def to_json(self) -> str:
        """Return it as text."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        said = {"format": FORMAT, "versions": versions, **dataclasses.asdict(self)}
        return json.dumps({**said, "checksum": _checksum(said)}, indent=1)

    @property
    def digest(self) -> str:
        """What a shard names its description by; versions of libraries don't count."""
        said = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(said.encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            TargetsError: it is of another version of the format.
            ValueError: it isn't what was written.
        """
        said = json.loads(text)
        if said["format"] != FORMAT:
            raise TargetsError(
                f"These targets are in format {said['format']}; this version of ildistil reads format {FORMAT}. Make "
                "them anew (ildistil precompute), in another folder."
            )
        if said.pop("checksum") != _checksum(said):
            raise ValueError("it isn't what was written")
        facts, layout = said["teacher"], said["layout"]
        lists = {key: tuple(value) for key, value in facts["info"].items() if isinstance(value, list)}
        info = ModelInfo(**{**facts["info"], **lists})
        columns = tuple(Column(Tap(*c["tap"]), c["part"], c["per_token"], tuple(c["shape"])) for c in layout["columns"])
        attention = {
            tap: Constants(**{**s, "shapes": {part: tuple(shape) for part, shape in s["shapes"].items()}})
            for tap, s in layout["attention"].items()
        }
        return cls(
            said["dtype"],
            TeacherFacts(**{**facts, "info": info, "read": tuple(facts["read"])}),
            Layout(columns, attention, tuple(layout["inputs"]), KnownTraits(*layout["traits"]), layout["next_token"]),
            said["tokenizer"],
        )


def _checksum(said: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())
