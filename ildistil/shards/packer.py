"""From the documents of a part to the rows of a shard: what every packing process does."""

import json
import os
import pickle
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import tokenizers
import xxhash
from numpy.typing import NDArray

from ildistil import storage
from ildistil.errors import IldistilError
from ildistil.shards.documents import Document, Part, Texts, read
from ildistil.shards.rows import FIGURES, SPLITS, RowWriter, shard_folder

__all__ = ["Encoder", "Recipe", "pack_part"]

# Texts are encoded in batches of about this many characters: small enough for memory, large enough for speed.
_BATCH = 1 << 19
# Longer texts are encoded in pieces, cut before a space.
_PIECE = 100_000

#: Ids of a text, and whether a word starts at each.
Encoded: TypeAlias = tuple[list[int], list[bool] | None]

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Recipe:
    """What decides the rows, in a form that a process without transformers understands."""

    rules: str | bytes  # the tokenizer in JSON; a slow one, pickled
    split_special: bool  # special tokens that stand in a text are ordinary text
    max_length: int
    prefix: list[int]  # special tokens at the start of every row
    suffix: list[int]  # and at its end
    separator: int | None  # between documents; None makes a row of every text
    cut_left: bool  # of a text that is too long, the start goes
    word_starts: bool
    held_out: float
    dtype: str

    @property
    def body(self) -> int:
        """Tokens of a row without its special ones."""
        return self.max_length - len(self.prefix) - len(self.suffix)


class Encoder:
    """Texts to token ids, without special tokens, padding or truncation."""

    def __init__(self, recipe: Recipe) -> None:
        self._word_starts = recipe.word_starts
        self._slow: Any = pickle.loads(recipe.rules) if isinstance(recipe.rules, bytes) else None
        if isinstance(recipe.rules, str):
            self._fast = tokenizers.Tokenizer.from_str(recipe.rules)
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.encode_special_tokens = recipe.split_special

    def __call__(self, texts: list[str]) -> Iterator[Encoded]:
        """Yield the ids of every text, and where its words start if that is wanted."""
        if self._slow is not None:
            yield from ((ids, None) for ids in self._slow(texts, add_special_tokens=False, verbose=False)["input_ids"])
        elif not self._word_starts:
            yield from ((each.ids, None) for each in self._fast.encode_batch_fast(texts, add_special_tokens=False))
        else:
            for each in self._fast.encode_batch(texts, add_special_tokens=False):
                words = each.word_ids
                before = [None, *words]
                yield each.ids, [word is None or word != last for word, last in zip(words, before, strict=False)]


def pack_part(recipe: Recipe, encoder: Encoder, folder: Path, number: int, part: Part | Texts) -> None:
    """Write the shard of a part, with its figures.

    Raises:
        DataError: The part can't be read.
        WriteError: There is no space, or no permission.
    """
    counts = dict.fromkeys(("documents", "held_out", "texts", "empty", "cut"), 0)
    with storage.replacing_folder(shard_folder(folder, number), keep=True) as draft:
        splits = SPLITS if recipe.held_out else SPLITS[:1]
        writers = [RowWriter(draft / f"{split}.rows", recipe.dtype, recipe.word_starts, number) for split in splits]
        rows = [_SplitRows(recipe, writer) for writer in writers]
        for batch in _batches(_pieces(read(part), recipe, counts)):
            for piece, (ids, starts) in zip(batch, encoder([piece.text for piece in batch]), strict=True):
                rows[piece.split].add(ids, starts, piece)
            for each in rows:
                each.flush()
        for each in rows:
            each.flush(last=True)
            counts["empty"] += each.empty
            counts["cut"] += each.cut
        figures = {split: writer.close() for split, writer in zip(splits, writers, strict=True)}
        source = part.digest if isinstance(part, Texts) else ""
        text = json.dumps({"splits": figures, "counts": counts, "source": source})
        (draft / FIGURES).write_text(text, encoding="utf-8")


class _Piece(NamedTuple):
    """Text that is encoded at once."""

    text: str
    split: int
    ends_text: bool
    ends_document: bool


def _pieces(documents: Iterable[Document], recipe: Recipe, counts: dict[str, int]) -> Iterator[_Piece]:
    packed = recipe.separator is not None
    for document in documents:
        # By content, so that the copies of a document are all on one side.
        split = int(xxhash.xxh3_64_intdigest("\n".join(document).encode()) < recipe.held_out * 2**64)
        counts["documents"] += 1
        counts["held_out"] += split
        counts["texts"] += len(document)
        for left, text in zip(range(len(document) - 1, -1, -1), document, strict=True):
            cut = _cut(text + "\n" if packed and left else text)
            for more, piece in zip(range(len(cut) - 1, -1, -1), cut, strict=True):
                yield _Piece(piece, split, not more, not more and not left)


def _cut(text: str) -> list[str]:
    pieces = []
    while len(text) > _PIECE:
        space = max(text.rfind(" ", 1, _PIECE), text.rfind("\n", 1, _PIECE))
        at = space if space > 0 else _PIECE
        pieces.append(text[:at])
        text = text[at:]
    return [*pieces, text]


def _batches(pieces: Iterator[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text) + 16
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitRows:
    """Tokens to rows of one split: cut from the stream of all documents, or a row a text."""

    def __init__(self, recipe: Recipe, writer: RowWriter) -> None:
        self.empty = self.cut = 0
        self._recipe, self._writer = recipe, writer
        self._ids: list[int] = []
        self._starts: list[bool] = []
        self._bodies: list[int] = []  # tokens of the rows whose length is known
        self._text = self._document = 0  # tokens so far
        self._separate = False  # before the next token

    def add(self, ids: list[int], starts: list[bool] | None, piece: _Piece) -> None:
        separator = self._recipe.separator
        if ids and self._separate and separator is not None:
            self._ids.append(separator)
            self._starts.append(True)
            self._separate = False
        self._ids += ids
        self._starts += starts or ()
        self._text += len(ids)
        self._document += len(ids)
        if piece.ends_text:
            self.empty += not self._text
            if separator is None and self._text:
                self._end_row()
            self._text = 0
        if piece.ends_document:
            self._separate |= self._document > 0
            self._document = 0

    def flush(self, last: bool = False) -> None:
        """Write the rows that are complete; of the last ones all."""
        if self._recipe.separator is not None:
            rows, rest = divmod(len(self._ids), self._recipe.body)
            self._bodies = [self._recipe.body] * rows + [rest] * (last and rest > 0)
        bodies = np.array(self._bodies, np.int64)
        end = int(bodies.sum())
        ids = np.array(self._ids[:end], np.int64)
        starts = np.array(self._starts[:end], bool) if self._recipe.word_starts else None
        self._writer.write(*_with_special_tokens(self._recipe, ids, starts, bodies))
        del self._ids[:end], self._starts[:end]
        self._bodies = []

    def _end_row(self) -> None:
        """Cut the text that just ended to the length of a row."""
        body = min(self._text, self._recipe.body)
        if surplus := self._text - body:
            self.cut += 1
            at = len(self._ids) - self._text + (0 if self._recipe.cut_left else body)
            del self._ids[at : at + surplus], self._starts[at : at + surplus]
        self._bodies.append(body)


def _with_special_tokens(
    recipe: Recipe, ids: Array, starts: Array | None, bodies: Array
) -> tuple[Array, Array, Array | None]:
    """Return all tokens of rows, their lengths, and where words start: at special tokens, and where a row's text does.

    Args:
        recipe: The recipe.
        ids: (tokens of all bodies).
        starts: (tokens of all bodies), or ``None``.
        bodies: (rows), tokens of each body.
    """
    lengths = bodies + len(recipe.prefix) + len(recipe.suffix)
    ends = np.cumsum(lengths)
    first = ends - lengths + len(recipe.prefix)
    of_body = np.arange(len(ids)) + np.repeat(first - (np.cumsum(bodies) - bodies), bodies)
    tokens = np.empty(lengths.sum(), np.int64)
    tokens[of_body] = ids
    for i, token in enumerate(recipe.prefix):
        tokens[first - len(recipe.prefix) + i] = token
    for i, token in enumerate(recipe.suffix):
        tokens[ends - len(recipe.suffix) + i] = token
    if starts is None:
        return tokens, lengths, None
    all_starts = np.ones(len(tokens), bool)
    all_starts[of_body] = starts
    all_starts[first] = True  # a row may begin within a word
    return tokens, lengths, all_starts


def main() -> None:
    """Pack the parts that come through standard input, and answer each with nothing or the error it met."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed must not be taken for an answer
    tasks = sys.stdin.buffer
    try:
        recipe, folder = pickle.load(tasks)
        encoder = Encoder(recipe)
        while True:
            number, part = pickle.load(tasks)
            error = None
            try:
                pack_part(recipe, encoder, folder, number, part)
            except IldistilError as caught:
                error = caught
            pickle.dump(error, answers)
            answers.flush()
    except (EOFError, BrokenPipeError):  # there is no more to do, or the process that started this one is gone
        os._exit(0)


if __name__ == "__main__":
    main()
