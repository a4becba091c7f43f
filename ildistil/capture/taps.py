"""What can be wanted of a model."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

Role = Literal["student", "teacher"]
# Of an encoder-decoder; "cross" is the decoder's attention to the encoder.
STACKS = ("encoder", "decoder", "cross")
# Of an attention: queries, keys and values.
PARTS = "qkv"


class Tap(NamedTuple):
    """One wanted thing: ``Tap("hidden", 3)``, ``Tap("logits")``, ``Tap("bert.pooler")``.

    Attributes:
        name: ``"hidden"``, ``"attention"``, ``"logits"``, ``"loss"``, or the path of a module.
        layer: number of the layer, of hidden states and attention.
        stack: stack of the layer, of an encoder-decoder.
        parts: of an attention, any of its queries, keys and values (all of ``"qkv"`` by default): the others of a
            recorded layer are not kept.

    >>> str(Tap("hidden", 2, "decoder"))
    'decoder.hidden[2]'
    """

    name: str
    layer: int | None = None
    stack: str | None = None
    parts: str = ""

    def __str__(self) -> str:
        layer = "" if self.layer is None else f"[{self.layer}]"
        return f"{'' if self.stack is None else self.stack + '.'}{self.name}{layer}"

    @property
    def place(self) -> "Tap":
        """The tap without its parts."""
        return self._replace(parts="")


def merged(taps: Iterable[Tap]) -> frozenset[Tap]:
    """Merge taps that differ in their parts only; the parts of an attention are then explicit.

    >>> [tap.parts for tap in merged([Tap("attention", 1, parts="k"), Tap("attention", 1, parts="q")])]
    ['qk']
    """
    parts: dict[Tap, str] = {}
    for tap in taps:
        wanted = (tap.parts or PARTS) if tap.name == "attention" else ""
        parts[tap.place] = "".join(part for part in PARTS if part in parts.get(tap.place, "") + wanted)
    return frozenset(place._replace(parts=found) for place, found in parts.items())
