"""From a corpus of text to rows of tokens that are mapped into memory, packed once in parallel processes."""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ildistil import storage
from ildistil.data.cache import cache_folder
from ildistil.data.pool import run, usable_processors
from ildistil.data.sources import HubText, Plan, TextFiles
from ildistil.data.tokenizing import check_tokenizer, tokenizer_digest
from ildistil.errors import ConfigError, DataError, MissingFileError, WriteError
from ildistil.shards.documents import Part, Texts, read
from ildistil.shards.packer import Encoder, Recipe
from ildistil.shards.rows import SPLITS, Rows, index_counts, is_indexed, is_of, shard_folder, shard_numbers, write_index

__all__ = ["HubText", "Packed", "Packing", "Rows", "TextFiles", "open_packed", "pack"]

# Part of every key; to be raised when the same input would be packed in another way.
FORMAT = 2
_PROBE_DOCUMENTS, _PROBE_CHARACTERS, _PROBE_WORDS = 50, 1000, 6
_WAIT = 1.0  # seconds


@dataclass(frozen=True)
class Packing:
    """Everything that decides which rows are made of a text.

    Each line of a text file is encoded by itself, with its line break if another line of the document follows; a record
    is encoded whole. Texts of more than 100,000 characters are encoded in pieces, cut before a space.

    Args:
        tokenizer: The tokenizer.
        max_length: Tokens of a row, special tokens included.
        packed: Cut rows of exactly ``max_length`` tokens from the stream of all texts, with the separator (else the
            end-of-text token) between documents, as RoBERTa does with full sentences; only the last row of a shard is
            shorter, and no token is lost. Else every line or record is a row of its own, cut to ``max_length``.
        word_starts: Keep where words begin, for whole-word masking. A row's special tokens, separators, and the first
            token of its text begin one.
        held_out: Share of the documents that is kept for validation, chosen by a hash of their content: copies of a
            document are all on one side.

    Raises:
        ConfigError: ``held_out`` isn't a share.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    packed: bool = True
    word_starts: bool = False
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}; it is a share of the documents: at least 0, less than 1.")

    def recipe(self) -> Recipe:
        """Return the same in a form that light processes understand.

        Raises:
            DataError: The tokenizer can't make such rows.
        """
        tokenizer = self.tokenizer
        check_tokenizer(tokenizer, self.max_length, pair=False)
        separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        if self.packed and separator is None:
            raise DataError(
                f"The tokenizer {tokenizer.name_or_path!r} has neither a separator nor an end-of-text token to put "
                "between documents. Set one (tokenizer.eos_token = ...), or packed: false."
            )
        if self.word_starts:
            _check_words(tokenizer)
        prefix, suffix = _special_tokens(tokenizer)
        return Recipe(
            rules=tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else pickle.dumps(tokenizer),
            split_special=bool(getattr(tokenizer, "split_special_tokens", False)),
            max_length=self.max_length,
            prefix=prefix,
            suffix=suffix,
            separator=separator if self.packed else None,
            cut_left=tokenizer.truncation_side == "left",
            word_starts=self.word_starts,
            held_out=self.held_out,
            dtype="uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32",
        )


@dataclass(frozen=True)
class Packed:
    """The packed rows of a corpus: their folder, those to train on, and those held out, if any."""

    folder: Path
    train: Rows
    validation: Rows | None


def pack(
    source: TextFiles | HubText, packing: Packing, cache_dir: str | None = None, processes: int | None = None
) -> Packed:
    """Pack a corpus, or find it packed; for ``prepare_data``, in one process of each node.

    The whole source is read, since content alone decides whether it was packed before. Shards that are there are
    compared with their checksums; damaged ones are made anew, with a warning. Where another process packs the same
    corpus, this one waits for it. A run that was killed goes on with the shards that it finished.

    Args:
        source: The corpus.
        packing: How it becomes rows.
        cache_dir: Where the cache is; see `cache_folder`.
        processes: How many processes share the work, which changes nothing in the result; ``None`` takes one for each
            processor.

    Returns:
        The rows.

    Raises:
        MissingFileError: There is no such file.
        DataError: The source can't be used, holds no text, or no document for either split; or there is no space.
        WriteError: The disk is full now; the finished shards stay.
        ProcessError: A process was killed.
    """
    if processes is not None and processes < 1:
        raise ConfigError(f"processes is {processes}; it is at least 1.")
    processes = processes or usable_processors()
    recipe = packing.recipe()
    address = _address(source, packing, recipe, cache_dir)
    plan = source.plan(processes)
    digest = _digest([plan.content, _key(packing, recipe)])
    folder = address.parent / digest[:32]
    if not is_indexed(folder, _intact(folder, processes)):
        with _alone(folder):
            intact = _intact(folder, processes, remove=True)
            if not is_indexed(folder, intact):  # as it may be by now, where another process was waited for
                _make(folder, plan, recipe, set(intact), processes, digest)
    _check_counts(folder, packing, source)
    if not address.is_file() or address.read_text(encoding="utf-8") != folder.name:  # the cache may be read-only
        storage.write_text(address, folder.name)
    return _open(folder, packing)


def open_packed(source: TextFiles | HubText, packing: Packing, cache_dir: str | None = None) -> Packed:
    """Open what `pack` made of a source; for ``setup``, in every process: it reads neither source nor shards.

    Args:
        source: The corpus.
        packing: How it became rows.
        cache_dir: Where the cache is.

    Raises:
        MissingFileError: It wasn't packed, or its files have changed since.
        DataError: The packed corpus is damaged.
    """
    address = _address(source, packing, packing.recipe(), cache_dir)
    if not address.is_file():
        raise MissingFileError(
            f"This corpus is not packed in {address.parent}, or has changed since. Call prepare_data() before setup(), "
            "on every node that has a cache of its own; a Trainer does both."
        )
    return _open(address.parent / address.read_text(encoding="utf-8"), packing)


def _open(folder: Path, packing: Packing) -> Packed:
    return Packed(folder, Rows(folder, "train"), Rows(folder, "validation") if packing.held_out else None)


def _make(folder: Path, plan: Plan, recipe: Recipe, finished: set[int], processes: int, digest: str) -> None:
    """Pack the parts whose shards are missing, and write the index."""
    _check_space(folder, plan, recipe, len(finished))
    total = 0

    def missing() -> Iterator[tuple[int, Part | Texts]]:
        nonlocal total
        for number, part in enumerate(plan.parts()):
            total += 1
            if number in finished and is_of(folder, number, part):
                bar.update(part.size)
            else:
                yield number, part

    pause = 0.1 if sys.stderr.isatty() else 30  # seconds
    with tqdm(total=plan.size, unit="B", unit_scale=True, desc="Packing the corpus", mininterval=pause) as bar:
        try:
            run(recipe, folder, missing(), processes, lambda part: bar.update(part.size))
        except WriteError as error:
            kept = len(shard_numbers(folder))
            raise WriteError(f"{error} {kept} shards are finished and stay in {folder}; run again to go on.") from error
    if total:
        facts = {"dtype": recipe.dtype, "word_starts": recipe.word_starts, "digest": digest}
        _report(folder, write_index(folder, total, facts))


def _check_space(folder: Path, plan: Plan, recipe: Recipe, finished: int) -> None:
    """Print how much space the missing shards need, about, and refuse if there is less."""
    if plan.size is None or not plan.number:
        return
    encoder, read_bytes, row_bytes = Encoder(recipe), 0, 0.0
    special = recipe.max_length - recipe.body
    token_bytes = np.dtype(recipe.dtype).itemsize + recipe.word_starts / 8
    for part in plan.probes:
        texts = [text for document in islice(read(part), _PROBE_DOCUMENTS) for text in document]
        texts = [text[:_PROBE_CHARACTERS] for text in texts[:_PROBE_DOCUMENTS]]
        read_bytes += sum(len(text.encode()) + 1 for text in texts)
        lengths = np.array([len(ids) for ids, _ in encoder(texts)] or [0])
        rows = lengths.sum() / recipe.body if recipe.separator is not None else np.count_nonzero(lengths)
        bodies = lengths if recipe.separator is not None else np.minimum(lengths, recipe.body)
        row_bytes += float((bodies.sum() + special * rows) * token_bytes + 20 * rows)
    share = max(0, 1 - finished / plan.number)
    need = int(1.1 * plan.size * share * row_bytes / max(1, read_bytes))
    place = next(p for p in folder.parents if p.is_dir())
    free = shutil.disk_usage(place).free
    figures = f"about {need / 1e6:,.1f} MB, of {free / 1e6:,.1f} MB that are free in {place}"
    if need > free:
        raise DataError(
            f"Packing {plan.size / 1e6:,.1f} MB of text takes {figures}. Free space there, or set cache_dir or "
            "$ILDISTIL_CACHE to another folder."
        )
    rank_zero_info(f"Packing {plan.size / 1e6:,.1f} MB of text into {folder} takes {figures}.")


def _report(folder: Path, counts: dict[str, int]) -> None:
    rows = " and ".join(f"{counts[split]:,} rows of {split}" for split in SPLITS if split in counts)
    notes = [f"{counts['documents']:,} documents gave {rows} in {folder}."]
    if counts["empty"]:
        notes.append(f"{counts['empty']:,} of {counts['texts']:,} texts have no token and are skipped.")
    if counts["cut"]:
        notes.append(f"{counts['cut']:,} of {counts['texts']:,} texts are cut to a row's length.")
    rank_zero_info("Packed the corpus: " + " ".join(notes))


def _check_counts(folder: Path, packing: Packing, source: object) -> None:
    """Refuse a corpus that has no rows for a split."""
    counts = index_counts(folder)
    if not counts or counts["texts"] == counts["empty"]:
        raise DataError(f"The corpus ({source}) is empty: it holds no text that gives a token. Name files with text.")
    if not packing.held_out:
        return
    kept = f"{counts['held_out']:,} of {counts['documents']:,} documents"
    said = f"A share of {packing.held_out:g} for validation keeps {kept}"
    if not counts["validation"]:
        raise DataError(f"{said}: too few. Raise it, or name files to validate on.")
    if not counts["train"]:
        raise DataError(f"{said}: none is left for training. Lower it.")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process packs into a folder, and keep others waiting."""
    lock = folder.with_suffix(".lock")
    handle = storage.hold(lock)
    if handle is None:
        rank_zero_info(f"Another process packs this corpus into {folder}: waiting for it.")
    while handle is None:
        time.sleep(_WAIT)
        handle = storage.hold(lock)
    try:
        yield
    finally:
        os.close(handle)


def _intact(folder: Path, processes: int, remove: bool = False) -> list[int]:
    """Compare all shards with their checksums; return which are whole, and remove the others, with a warning."""
    numbers = shard_numbers(folder)
    with ThreadPoolExecutor(processes) as pool:
        damages = list(pool.map(_damage, (shard_folder(folder, number) for number in numbers)))
    for number, damage in zip(numbers, damages, strict=True):
        if damage and remove:
            try:
                shutil.rmtree(shard_folder(folder, number))
            except OSError as error:
                raise DataError(f"{damage} But it can't be removed ({error}): delete {folder}, run again.") from error
            rank_zero_warn(damage)
    return [number for number, damage in zip(numbers, damages, strict=True) if not damage]


def _damage(shard: Path) -> str:
    """Return what is wrong with a shard, or nothing."""
    remedy = "It is made anew."
    try:
        return "" if storage.verify_folder(shard, DataError, remedy) else f"{shard} has lost its checksums. {remedy}"
    except DataError as error:
        return str(error)


def _address(source: TextFiles | HubText, packing: Packing, recipe: Recipe, cache_dir: str | None) -> Path:
    """Return the file that names the folder of a source's rows."""
    name = _digest([source.address(), _key(packing, recipe)])[:32]
    return cache_folder(cache_dir) / "packed" / f"{name}.txt"


def _key(packing: Packing, recipe: Recipe) -> object:
    return [FORMAT, tokenizer_digest(packing.tokenizer), asdict(replace(recipe, rules=""))]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that doesn't know where words begin."""
    remedy = "Use a tokenizer that splits texts into words first, or word_starts: false."
    if not tokenizer.is_fast:
        raise DataError(f"The tokenizer {tokenizer.name_or_path!r} is a slow one, which knows no words. {remedy}")
    backend = tokenizer.backend_tokenizer
    words = {*backend.encode("to be or not to be", add_special_tokens=False).word_ids}
    if len(words) < _PROBE_WORDS:
        raise DataError(f"The tokenizer {tokenizer.name_or_path!r} takes a whole text for one word. {remedy}")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before and after a text."""
    for probe in ("a", *islice(tokenizer.get_vocab(), 100)):
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        row = tokenizer(probe)["input_ids"]
        number = len(row) - len(plain)
        for before in range(number + 1):
            if plain and plain[0] not in tokenizer.all_special_ids and row[before : before + len(plain)] == plain:
                return row[:before], row[before + len(plain) :]
    raise DataError(
        f"The tokenizer {tokenizer.name_or_path!r} doesn't put its special tokens before and after a text, as rows "
        "need it. Use another one."
    )
