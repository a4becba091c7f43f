import json
import logging
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ildistil.data import packing as packing_module
from ildistil.data import pool, sources
from ildistil.data.packing import HubText, Packed, Packing, Rows, TextFiles, open_packed, pack
from ildistil.errors import ConfigError, DataError, MissingFileError, ProcessError, WriteError
from ildistil.shards import documents, rows
from tiny_data import WORDS, make_tokenizer

PLAIN = WORDS[5:]
TEXT = "The Film, (good) film: a cat sat on the mat; don't be dull!\nNaïve 猫 films 3.14 and more\n\nfine\n"


def documents_of(number: int, seed: int = 0) -> list[list[str]]:
    """Random documents of one to four lines of one to twenty words."""
    draw = random.Random(seed)
    return [
        [" ".join(draw.choices(PLAIN, k=draw.randint(1, 20))) for _ in range(draw.randint(1, 4))] for _ in range(number)
    ]


def text_of(documents: list[list[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in documents) + "\n"


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that splits words into pieces, of one of the three kinds there are."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>"]
    lines = [*TEXT.split("\n"), *(" ".join(PLAIN) for _ in range(20))]
    if kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        core.train_from_iterator(lines, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
        core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        return PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
        )
    if kind == "bytelevel":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
        core.train_from_iterator(lines, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="</s>")
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.train_from_iterator(
        lines, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]", show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 5)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="</s>", unk_token="[UNK]")


KINDS = ["wordpiece", "bytelevel", "metaspace"]


def stream_of(documents: list[list[str]], tokenizer: Any, separator: int) -> list[int]:
    """Encode line by line, the slow way."""
    ids: list[int] = []
    for number, lines in enumerate(documents):
        ids += [separator] if number else []
        for i, line in enumerate(lines):
            ids += tokenizer(line + ("\n" if i < len(lines) - 1 else ""), add_special_tokens=False)["input_ids"]
    return ids


def ids_of(rows: Rows) -> list[list[int]]:
    return [rows[i]["input_ids"].tolist() for i in range(len(rows))]


def files_of(packed: Packed) -> dict[str, bytes]:
    return {str(p.relative_to(packed.folder)): p.read_bytes() for p in packed.folder.rglob("*") if p.is_file()}


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PART", 1000)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    caplog.set_level(logging.INFO, logger=logger.name)
    logging.getLogger("lightning.pytorch").addHandler(caplog.handler)
    return lambda: caplog.text


# ---- which rows come out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [5, 16])
def test_rows_are_the_stream_of_all_documents_cut_to_length(kind: str, max_length: int, write: Any) -> None:
    tokenizer = trained(kind)
    texts = [*documents_of(30), ["The Film, (good) film", "don't"], ["Naïve 猫"]]
    found = pack(TextFiles(write("a.txt", text_of(texts))), Packing(tokenizer, max_length), processes=1)
    separator = {"wordpiece": 3}.get(kind, 5)
    before, after = {"wordpiece": ([2], [3]), "bytelevel": ([], []), "metaspace": ([], [5])}[kind]
    stream = stream_of(texts, tokenizer, separator)
    body = max_length - len(before) - len(after)
    expected = [before + stream[i : i + body] + after for i in range(0, len(stream), body)]
    assert ids_of(found.train) == expected
    assert found.train.lengths.tolist() == [len(row) for row in expected]
    assert found.train.tokens == sum(map(len, expected))
    assert found.train[0]["input_ids"].dtype == np.int64
    assert found.validation is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_a_row(kind: str, side: str, write: Any, said: Callable[[], str]) -> None:
    tokenizer = trained(kind)
    tokenizer.truncation_side = side
    texts = documents_of(20)
    found = pack(TextFiles(write("a.txt", text_of(texts))), Packing(tokenizer, 12, packed=False), processes=1)
    lines = [line for lines in texts for line in lines]
    assert ids_of(found.train) == [tokenizer(line, truncation=True, max_length=12)["input_ids"] for line in lines]
    cut = sum(len(tokenizer(line)["input_ids"]) > 12 for line in lines)
    assert f"{cut:,} of {len(lines)} texts are cut" in said()


def test_all_formats_give_the_same_rows(tmp_path: Path, write: Any) -> None:
    lines = [lines[0] for lines in documents_of(50)]
    write("a.txt", "\n".join(lines))
    write("b.jsonl", "".join(json.dumps({"id": i, "body": line}) + "\n\n" for i, line in enumerate(lines)))
    pq.write_table(pa.table({"id": range(50), "body": pa.array(lines).dictionary_encode()}), tmp_path / "c.parquet", 7)
    hub = tmp_path / "hub"
    write("hub/train.jsonl", "".join(json.dumps({"body": line}) + "\n" for line in lines))
    found = [TextFiles(str(tmp_path / name), "body") for name in ("a.txt", "b.jsonl", "c.parquet")]
    found += [HubText(str(hub), text_column="body", streaming=streaming) for streaming in (True, False)]
    packing = Packing(make_tokenizer(), 10)
    expected = ids_of(pack(found[0], packing, processes=1).train)
    for source in found[1:]:
        assert ids_of(pack(source, packing, processes=1).train) == expected
        assert ids_of(open_packed(source, packing).train) == expected


def test_marks_and_breaks_of_other_systems(write: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfgood film\r\nthe cat\r\n \t\r\nfine\r\n")
    plain = write("b.txt", "good film\nthe cat\n\nfine")
    packing = Packing(make_tokenizer(), 10)
    assert ids_of(pack(TextFiles(tmp_path / "a.txt"), packing).train) == ids_of(pack(TextFiles(plain), packing).train)


@pytest.mark.parametrize("blank", ["\n", "\r\n", " \n\t\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_mark_before_blank_lines_is_no_document(blank: str, name: str, write: Any, tmp_path: Path) -> None:
    lines = ["good film", "the cat", "fine"]
    lines = lines if name == "a.txt" else [json.dumps({"text": line}) for line in lines]
    plain = Path(write(name, "\n".join(lines)))
    marked = tmp_path / f"marked{plain.suffix}"
    marked.write_bytes(b"\xef\xbb\xbf" + blank.encode() + plain.read_bytes())
    assert documents.scan(marked)[1] == documents.scan(plain)[1]
    packed = [pack(TextFiles(path), Packing(make_tokenizer(), 10)) for path in (marked, plain)]
    assert [ids_of(each.train) for each in packed] == [ids_of(packed[1].train)] * 2
    counts = [json.loads((each.folder / "index" / "index.json").read_text())["counts"] for each in packed]
    assert counts == [counts[1]] * 2
    assert counts[1]["documents"] == 3


@given(st.lists(st.sampled_from(["a", " ", "\n", "\n\n", "\t", "\r", "b c"]), max_size=30), st.integers(1, 9))
def test_blank_lines_separate_documents_only_between_others(pieces: list[str], block: int) -> None:
    import tempfile

    text = "".join(pieces)
    lines = [bool(line.strip()) for line in text.split("\n")]
    expected = any(not lines[i] and any(lines[:i]) and any(lines[i:]) for i in range(len(lines)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BLOCK", block)
        path = Path(folder, "a.txt")
        path.write_bytes(text.encode())
        assert documents.scan(path)[1] == expected


@given(st.lists(st.sampled_from(["a", "bc", "", " ", "d e f"]), max_size=30), st.integers(1, 20), st.booleans())
def test_parts_cut_between_documents(lines: list[str], size: int, separated: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_text("\n".join(lines))
        stamp = documents.stamp_of(path)
        whole, cut = (documents.cut(path, stamp, separated, "", n) for n in (1 << 20, size))
        assert [d for part in cut for d in documents.read(part)] == [d for part in whole for d in documents.read(part)]
        assert len(whole) <= 1


def test_empty_texts_are_skipped_and_counted(write: Any, said: Callable[[], str]) -> None:
    path = write("a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in ["good film", "", "  ", "fine"]))
    found = pack(TextFiles(path), Packing(make_tokenizer(), 8, packed=False))
    assert len(found.train) == 2
    assert "2 of 4 texts have no token and are skipped" in said()
    found = pack(TextFiles(path), Packing(make_tokenizer(), 8))
    assert ids_of(found.train) == [[2, 6, 8, 3, 15, 3]]


def test_a_text_of_any_length_loses_no_token(write: Any, small_parts: None) -> None:
    words = random.Random(0).choices(PLAIN, k=60_000)
    path = write("a.txt", "good film\n\n" + " ".join(words) + "\nfine\n\ndull")
    found = pack(TextFiles(path), Packing(make_tokenizer(), 100), processes=1)
    body = [i for row in ids_of(found.train) for i in row if i > 3]
    assert (
        body == make_tokenizer()(["good", "film", *words, "fine", "dull"], is_split_into_words=True)["input_ids"][1:-1]
    )


def test_large_vocabularies_have_larger_tokens(write: Any) -> None:
    for size, kind in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        vocabulary = {word: i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), size)}
        core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[SEP]")
        found = pack(TextFiles(write("a.txt", f"w{size - 1} good")), Packing(tokenizer, 4))
        assert ids_of(found.train) == [[size - 1, 6]]
        assert json.loads((found.folder / "index" / "index.json").read_text())["dtype"] == kind


# ---- held-out documents


@pytest.mark.parametrize("packed", [True, False])
def test_held_out_documents_are_chosen_by_content(write: Any, packed: bool, small_parts: None) -> None:
    texts = [[f"w{i} w{i}", f"w{i}"] for i in range(200)]
    words = {w: i for i, w in enumerate([*WORDS[:4], *(f"w{i}" for i in range(200))])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", sep_token="[SEP]", eos_token="[SEP]")
    twice = [*texts, *reversed(texts)]
    packing = Packing(tokenizer, 6, packed=packed, held_out=0.25)
    found = pack(TextFiles(write("a.txt", text_of(twice))), packing, processes=1)
    assert found.validation is not None
    sides = [[i for row in ids_of(side) for i in row if i > 3] for side in (found.train, found.validation)]
    assert not set(sides[0]) & set(sides[1])
    assert sorted(sides[0] + sides[1]) == sorted(list(range(4, 204)) * 6)
    assert 25 < len(set(sides[1])) < 75
    assert found.train.digest != found.validation.digest


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_held_out_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match="held_out"):
        Packing(make_tokenizer(), 8, held_out=share)


def test_held_out_must_leave_something_on_both_sides(write: Any) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(10))))
    with pytest.raises(DataError, match=r"share of 1e-09 for validation keeps 0 of 10 documents.*Raise it"):
        pack(source, Packing(make_tokenizer(), 8, held_out=1e-9))
    with pytest.raises(DataError, match=r"validation keeps 10 of 10 documents.*Lower it"):
        pack(source, Packing(make_tokenizer(), 8, held_out=1 - 1e-9))


# ---- where words start


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_words_start_where_the_pieces_say(kind: str, packed: bool, write: Any) -> None:
    tokenizer = trained(kind)
    texts = [[" ".join(lines)] for lines in documents_of(40)]  # without punctuation, which "Ġ" knows nothing of
    packing = Packing(tokenizer, 9, packed=packed, word_starts=True)
    found = pack(TextFiles(write("a.txt", text_of(texts))), packing)
    special = {2, 3, 5}
    first_of_text = {tokenizer(lines[0], add_special_tokens=False)["input_ids"][0] for lines in texts}
    for i in range(len(found.train)):
        row = found.train[i]
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"].tolist())
        for at, (token, id_, starts) in enumerate(zip(tokens, row["input_ids"], row["word_starts"], strict=True)):
            after_special = at == 0 or row["input_ids"][at - 1] in special
            marked = {
                "wordpiece": not token.startswith("##"),
                "bytelevel": token.startswith("Ġ") or (after_special and int(id_) in first_of_text),
                "metaspace": token.startswith("▁"),
            }[kind]
            assert starts == (marked or int(id_) in special or after_special), (tokens, at)
    plain = pack(TextFiles(write("a.txt", text_of(texts))), Packing(tokenizer, 9, packed=packed))
    assert ids_of(plain.train) == ids_of(found.train)
    assert "word_starts" not in plain.train[0]


def test_a_tokenizer_without_words_has_no_word_starts(write: Any) -> None:
    tokenizer = trained("metaspace")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    with pytest.raises(DataError, match="a whole text for one word.*word_starts: false"):
        pack(TextFiles(write("a.txt", "good")), Packing(tokenizer, 9, word_starts=True))


def test_slow_tokenizers_pack_but_know_no_words(write: Any) -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    texts = documents_of(5)
    source = TextFiles(write("a.txt", text_of(texts)))
    stream = stream_of(texts, tokenizer, 1)
    assert ids_of(pack(source, Packing(tokenizer, 20)).train) == [
        [*stream[i : i + 19], 1] for i in range(0, len(stream), 19)
    ]
    with pytest.raises(DataError, match="slow"):
        pack(source, Packing(tokenizer, 20, word_starts=True))


# ---- processes, kills, damage


@pytest.mark.parametrize("options", [{}, {"packed": False, "held_out": 0.3, "word_starts": True}])
def test_any_number_of_processes_gives_the_same_bytes(
    write: Any, tmp_path: Path, small_parts: None, options: dict[str, Any]
) -> None:
    texts = documents_of(100)
    source = TextFiles(write("a.txt", text_of(texts)))
    packing = Packing(make_tokenizer(), 16, **options)
    one, three = (pack(source, packing, str(tmp_path / str(n)), processes=n) for n in (1, 3))
    assert len(rows.shard_numbers(one.folder)) > 5
    assert files_of(one) == files_of(three)
    sides = [one.train] if one.validation is None else [one.train, one.validation]
    words = sorted(i for side in sides for row in ids_of(side) for i in row if i > 3)
    if not options:
        assert words == sorted(i for i in stream_of(texts, make_tokenizer(), 3) if i > 3)
        ends = np.cumsum(json.loads((one.folder / "index" / "index.json").read_text())["splits"]["train"]["rows"]) - 1
        assert set(np.flatnonzero(one.train.lengths != 16)) <= set(ends)


def test_a_killed_run_goes_on_with_its_finished_shards(write: Any, tmp_path: Path, small_parts: None) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(60))))
    packing = Packing(make_tokenizer(), 16)
    undisturbed = pack(source, packing, str(tmp_path / "undisturbed"), processes=1)
    folder = tmp_path / "cache" / "packed" / undisturbed.folder.name
    script = """if True:
        import os, pickle, sys
        from ildistil.shards import packer, rows
        recipe, folder, parts = pickle.load(sys.stdin.buffer)
        close = rows.RowWriter.close
        def killed(writer):
            if "000003" in str(writer._file.name):
                os.kill(os.getpid(), 9)
            return close(writer)
        rows.RowWriter.close = killed
        for number, part in enumerate(parts):
            packer.pack_part(recipe, packer.Encoder(recipe), folder, number, part)
    """
    plan = source.plan(1)
    given = pickle.dumps((packing.recipe(), folder, list(plan.parts())))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], input=given, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert rows.shard_numbers(folder) == [0, 1, 2]
    assert list(folder.glob(".*"))
    times = {p: p.stat().st_mtime_ns for p in folder.rglob("*.rows")}
    found = pack(source, packing, processes=1)
    assert found.folder == folder
    assert files_of(found) == files_of(undisturbed)
    assert all(p.stat().st_mtime_ns == t for p, t in times.items() if not p.parent.name.startswith("."))


def test_a_killed_process_is_told_in_words(
    write: Any, small_parts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(60))))
    packing = Packing(make_tokenizer(), 16)
    receive = pool._Worker.receive
    lock, calls = threading.Lock(), []

    def killing(worker: Any) -> Any:
        answer = receive(worker)
        with lock:
            calls.append(worker)
            if len(calls) == 2:
                worker.process.kill()
                worker.process.wait()
        return answer

    monkeypatch.setattr(pool._Worker, "receive", killing)
    with pytest.raises(ProcessError, match="One of the 2 processes.* killed by signal 9, most likely because memory"):
        pack(source, packing, processes=2)
    monkeypatch.undo()
    monkeypatch.setattr(sources, "_PART", 1000)
    again = pack(source, packing, str(tmp_path / "cache"), processes=2)
    assert files_of(again) == files_of(pack(source, packing, str(tmp_path / "other"), processes=1))


@pytest.mark.parametrize("name", ["000001/train.rows", "000002/shard.json", "000001/checksums.json"])
def test_a_flipped_bit_is_named_and_the_shard_made_anew(write: Any, small_parts: None, name: str) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(30))))
    packing = Packing(make_tokenizer(), 16)
    found = pack(source, packing, processes=1)
    before = files_of(found)
    path = found.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{name[:6]}.*made anew"):
        again = pack(source, packing, processes=1)
    assert files_of(again) == before


@pytest.mark.parametrize("name", ["index.json", "train.lengths", "checksums.json"])
def test_a_damaged_index_is_made_anew(write: Any, name: str) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(30))))
    packing = Packing(make_tokenizer(), 16)
    found = pack(source, packing)
    before = files_of(found)
    path = found.folder / "index" / name
    path.write_bytes(path.read_bytes()[:-3])
    assert files_of(pack(source, packing)) == before


@pytest.mark.parametrize("word_starts", [False, True])
def test_a_row_that_is_damaged_after_it_was_packed_is_named_when_it_is_read(write: Any, word_starts: bool) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(30))))
    packing = Packing(make_tokenizer(), 16, word_starts=word_starts)
    found = pack(source, packing)
    path = found.folder / "000000" / "train.rows"
    whole = path.read_bytes()
    before = [{name: values.tolist() for name, values in row.items()} for row in found.train]
    refused = 0
    for at in random.Random(0).sample(range(len(whole)), 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        rows_now = open_packed(source, packing).train
        for number, row in enumerate(before):
            try:
                found_row = rows_now[number]
            except DataError as error:
                refused += 1
                message = str(error)
                assert f"000000/train.rows is damaged: row {number} isn't" in message
            else:
                assert {name: values.tolist() for name, values in found_row.items()} == row
    assert refused >= 50  # a few bytes only fill up, or belong to no row


def test_the_shard_of_another_place_is_noticed(write: Any) -> None:
    lines = "\n".join(" ".join(PLAIN[:8]) for _ in range(12000))
    paths = [write(name, lines.replace(PLAIN[0], word)) for name, word in (("a.txt", PLAIN[1]), ("b.txt", PLAIN[2]))]
    source, packing = TextFiles(paths), Packing(make_tokenizer(), 16)
    found = pack(source, packing, processes=1)
    first, second = (found.folder / number / "train.rows" for number in ("000000", "000001"))
    assert first.stat().st_size == second.stat().st_size
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataError, match="000000/train.rows is damaged: row 0 isn't what was written"):
        open_packed(source, packing).train[0]


def test_a_shard_that_is_cut_short_or_gone_is_named_when_it_is_read(write: Any) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(30))))
    packing = Packing(make_tokenizer(), 16)
    found = pack(source, packing)
    path = found.folder / "000000" / "train.rows"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"000000/train.rows has .* bytes, not .* damaged.*run again"):
        open_packed(source, packing).train[0]
    path.unlink()
    with pytest.raises(MissingFileError, match="000000/train.rows is missing"):
        open_packed(source, packing).train[0]
    (found.folder / "index" / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index.json can't be read"):
        open_packed(source, packing)


def test_another_process_that_packs_the_same_is_waited_for(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: Callable[[], str]
) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(30))))
    packing = Packing(make_tokenizer(), 16)
    name = pack(source, packing, str(tmp_path / "other")).folder.name
    lock = tmp_path / "cache" / "packed" / f"{name}.lock"
    script = "import sys; from ildistil import storage; from pathlib import Path; "
    script += "storage.hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    holding = subprocess.Popen(
        [sys.executable, "-c", script, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert holding.stdout is not None
    assert holding.stdin is not None
    holding.stdout.readline()
    start = time.monotonic()
    monkeypatch.setattr(packing_module, "_WAIT", 0.05)
    threading.Timer(0.3, holding.stdin.close).start()
    assert len(pack(source, packing).train)
    assert time.monotonic() - start > 0.3
    assert said().count("Another process packs this corpus") == 1
    holding.stdout.close()
    assert holding.wait() == 0


# ---- finding what was packed


def test_content_decides_whether_a_corpus_was_packed(write: Any, tmp_path: Path) -> None:
    path = Path(write("a.txt", text_of(documents_of(10))))
    packing = Packing(make_tokenizer(), 16)
    with pytest.raises(MissingFileError, match=r"not packed.*prepare_data"):
        open_packed(TextFiles(path), packing)
    first = pack(TextFiles(path), packing)
    before = path.stat()
    os.utime(path, (1, 1))
    with pytest.raises(MissingFileError, match="has changed since"):
        open_packed(TextFiles(path), packing)
    assert pack(TextFiles(path), packing).train.digest == first.train.digest
    assert pack(TextFiles([Path(write("other/b.txt", path.read_text()))]), packing).folder == first.folder
    path.write_text(path.read_text().replace("the", "cat"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    changed = pack(TextFiles(path), packing)
    assert changed.train.digest != first.train.digest
    assert ids_of(open_packed(TextFiles(path), packing).train) == ids_of(changed.train)
    assert len({first.train.digest, *(
        pack(TextFiles(path), Packing(make_tokenizer(**tokenizer), **options)).train.digest
        for tokenizer in ({}, {"special": False})
        for options in ({"max_length": 16}, {"max_length": 9}, {"max_length": 16, "packed": False},
                        {"max_length": 16, "word_starts": True}, {"max_length": 16, "held_out": 0.5})
    )}) == 11  # fmt: skip


def test_what_is_packed_is_not_packed_again(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, packing = TextFiles(write("a.txt", "good film")), Packing(make_tokenizer(), 16)
    first = pack(source, packing)
    monkeypatch.setattr(packing_module, "run", None)
    assert ids_of(pack(source, packing).train) == ids_of(first.train)


def test_a_stream_is_read_once(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None) -> None:
    write("hub/train.jsonl", "".join(json.dumps({"text": " ".join(d)}) + "\n" for d in documents_of(100)))
    source, packing = HubText(str(tmp_path / "hub"), streaming=True), Packing(make_tokenizer(), 16)
    read: list[int] = []
    parts = HubText._parts

    def counted(self: HubText, rows: Any) -> Iterator[documents.Texts]:
        read.append(0)
        for part in parts(self, rows):
            read[-1] += 1
            yield part

    monkeypatch.setattr(HubText, "_parts", counted)
    packed: list[int] = []
    pack_part = pool.pack_part

    def failing(*given: Any) -> None:
        if len(packed) == 2:
            raise WriteError("no space")
        packed.append(given[3])
        pack_part(*given)

    monkeypatch.setattr(pool, "pack_part", failing)
    with pytest.raises(WriteError, match=r"no space 2 shards are finished and stay"):
        pack(source, packing, processes=1)
    packed.clear()
    monkeypatch.setattr(pool, "pack_part", lambda *given: (packed.append(given[3]), pack_part(*given)))
    found = pack(source, packing, processes=1)
    assert packed[0] == 2
    assert len(packed) == read[-1] - 2
    assert len(read) == 2
    assert ids_of(pack(source, packing).train) == ids_of(found.train)
    assert len(read) == 2
    write("hub/train.jsonl", '{"text": "good film"}\n')
    assert ids_of(pack(source, packing, processes=1).train) == [[2, 6, 8, 3]]


def test_rows_go_to_other_processes_and_map_few_files(
    write: Any, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "_MAPPED_SHARDS", 2)
    found = pack(TextFiles(write("a.txt", text_of(documents_of(100)))), Packing(make_tokenizer(), 16), processes=1)
    train = found.train
    sent = pickle.dumps(train)
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    order = np.random.default_rng(0).permutation(len(train))
    descriptors = len(os.listdir("/proc/self/fd"))
    for i in order:
        assert np.array_equal(copy[i]["input_ids"], train[int(i) - len(train)]["input_ids"])
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 4
    assert np.array_equal(copy.lengths, train.lengths)
    assert copy.digest == train.digest
    for wrong in (len(train), -len(train) - 1):
        with pytest.raises(IndexError):
            train[wrong]


def test_folders_patterns_and_lists(tmp_path: Path, write: Any) -> None:
    names = ["b.txt", "a.TXT", "deep/er/c.jsonl", ".hidden/d.txt", "notes.md"]
    for name in names:
        write(name, '{"text": "good"}')
    inside = TextFiles(tmp_path).files()
    assert [str(p.relative_to(tmp_path)) for p in inside] == ["a.TXT", "b.txt", "deep/er/c.jsonl"]
    assert TextFiles([str(tmp_path / "b.txt"), tmp_path]).files() == [inside[1], inside[0], inside[2]]
    assert TextFiles(str(tmp_path / "**" / "*.jsonl")).files() == [inside[2]]


# ---- what is refused


def parquet(column: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({"text": column}), path, row_group_size=2)


REFUSED: dict[str, tuple[str, str | bytes | Callable[[Path], None], str]] = {
    "empty": ("a.txt", "", "is empty: it holds no text"),
    "only empty lines": ("a.txt", "\n \n\t\n", "is empty: it holds no text"),
    "no record": ("a.jsonl", "\n", "is empty: it holds no text"),
    "no row": ("a.parquet", parquet(pa.array([], pa.string())), "is empty: it holds no text"),
    "only empty texts": ("a.jsonl", '{"text": ""}', "is empty: it holds no text"),
    "not UTF-8": ("a.txt", b"good\nfilm \xff", r"a.txt is not UTF-8 \(invalid start byte at byte 10\)"),
    "not UTF-8 in records": ("a.jsonl", b'{"text": "a"}\n\xff', r"a.jsonl is not UTF-8 \(invalid .* at byte 14"),
    "binary": ("a.txt", b"good\nfi\0lm", "a.txt is not text: byte 7 is zero"),
    "no JSON": ("a.jsonl", '{"text": "a"}\n\n{"text"', r"a.jsonl, row 1 .*not valid JSON"),
    "no object": ("a.jsonl", '["text"]', r"row 0 .* not an object"),
    "no column": ("a.jsonl", '{"texts": "a", "b": 1}', r"row 0 .*no column 'text'. Did you mean 'texts'.*'texts', 'b'"),
    "null": ("a.jsonl", '{"text": "a"}\n{"text": null}', r"row 1 \(rows count from 0\): 'text' holds nothing \(null\)"),
    "number": ("a.jsonl", '{"text": 3}', r"row 0 .*: 'text' holds '3' \(int\), not a text"),
    "surrogate": ("a.jsonl", '{"text": "\\ud800"}', "row 0 .*half of a surrogate pair"),
    "no Parquet": ("a.parquet", "good film", "a.parquet is not a Parquet file"),
    "null in Parquet": ("a.parquet", parquet(["a", "b", "c", None]), "row 3 .*holds nothing"),
    "numbers in Parquet": ("a.parquet", parquet([1, 2]), "'text' holds int64, not texts"),
    "lists in Parquet": ("a.parquet", parquet([["a"], ["b"]]), "'text' holds list.*, not texts"),
    "another column in Parquet": (
        "a.parquet", lambda path: pq.write_table(pa.table({"texts": ["a"]}), path), "no column 'text'. Did you mean",
    ),
    "another ending": ("a.csv", "good", "end in '.txt', '.jsonl', '.parquet'"),
    "compressed": ("a.txt.gz", b"\x1f\x8b", "Unpack it"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_corpus_that_cannot_be_packed(case: str, tmp_path: Path) -> None:
    name, content, message = REFUSED[case]
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        pack(TextFiles(path), Packing(make_tokenizer(), 16), processes=1)


def test_a_shard_without_checksums_is_made_anew(write: Any) -> None:
    source = TextFiles(write("a.txt", "good film"))
    found = pack(source, Packing(make_tokenizer(), 16))
    (found.folder / "000000" / "checksums.json").unlink()
    with pytest.warns(UserWarning, match="000000 has lost its checksums"):
        assert len(pack(source, Packing(make_tokenizer(), 16)).train) == 1


def test_errors_come_back_from_other_processes(tmp_path: Path, small_parts: None) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text_of(documents_of(50)).encode() + b"\xff\n\n" + text_of(documents_of(50)).encode())
    with pytest.raises(DataError, match="is not UTF-8"):
        pack(TextFiles(path), Packing(make_tokenizer(), 16), processes=2)


def test_files_that_are_not_there(tmp_path: Path, write: Any) -> None:
    write("notes.md", "good")
    (tmp_path / "empty").mkdir()
    for paths, message in (
        (tmp_path / "a.txt", r"a.txt does not exist. .* holds: .*notes.md"),
        (str(tmp_path / "*.txt"), r"\*.txt does not exist"),
        (tmp_path, "has no file that ends in '.txt', '.jsonl', '.parquet'"),
    ):
        with pytest.raises(MissingFileError, match=message):
            pack(TextFiles(paths), Packing(make_tokenizer(), 16))
    with pytest.raises(DataError, match="has no files: name a file"):
        TextFiles([]).files()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read(write: Any) -> None:
    path = Path(write("a.txt", "good"))
    path.chmod(0)
    with pytest.raises(DataError, match=r"a.txt can't be read: Permission denied"):
        pack(TextFiles(path), Packing(make_tokenizer(), 16))


def test_a_file_that_changes_meanwhile(write: Any) -> None:
    path = Path(write("a.txt", "good\nfilm\n"))
    (part,) = TextFiles(path).plan(1).parts()
    reading = documents.read(part)
    assert next(reading) == ["good"]
    path.write_text("good\nfilms\n")
    with pytest.raises(DataError, match="was changed while it was packed"):
        list(reading)
    path.unlink()
    with pytest.raises(MissingFileError, match="does not exist any more"):
        list(documents.read(part))


def test_data_sets_that_cannot_be_packed(tmp_path: Path, write: Any) -> None:
    packing = Packing(make_tokenizer(), 16)
    with pytest.raises(MissingFileError, match="'.*nothing', train, can't be loaded"):
        pack(HubText(str(tmp_path / "nothing")), packing)
    write("broken/train.jsonl", '{"text": "a"}\n' * 10 + "{")
    with pytest.raises(MissingFileError, match=r"can't be loaded"):
        pack(HubText(str(tmp_path / "broken"), streaming=True), packing)
    write("hub/train.jsonl", '{"texts": "a"}\n')
    for streaming in (False, True):
        with pytest.raises(DataError, match="no column 'text'. Did you mean 'texts'"):
            pack(HubText(str(tmp_path / "hub"), streaming=streaming), packing)
    write("null/train.jsonl", '{"text": "a"}\n{"text": null}\n')
    with pytest.raises(DataError, match=r"row 1 \(rows count from 0\): 'text' holds nothing"):
        pack(HubText(str(tmp_path / "null")), packing)
    with pytest.raises(MissingFileError, match="split"):
        pack(HubText(str(tmp_path / "hub"), split="validation"), packing)


def test_the_space_is_looked_at_before(write: Any, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(300))))
    packing = Packing(make_tokenizer(), 16)
    monkeypatch.setattr(packing_module.shutil, "disk_usage", lambda place: shutil_usage(1000))
    with pytest.raises(DataError, match=r"takes about .* MB, of 0.0 MB that are free in .*cache_dir"):
        pack(source, packing)
    monkeypatch.undo()


def shutil_usage(free: int) -> Any:
    return type("Usage", (), {"free": free})()


@pytest.mark.parametrize("packed", [True, False])
def test_the_estimate_of_the_space_is_near(write: Any, said: Callable[[], str], packed: bool) -> None:
    source = TextFiles(write("a.txt", text_of(documents_of(20_000))))
    found = pack(source, Packing(make_tokenizer(), 32, packed=packed))
    estimate = float(re.search(r"takes about ([\d.]+) MB", said()).group(1))  # type: ignore[union-attr]
    size = sum(map(len, files_of(found).values())) / 1e6
    assert size < estimate < 1.4 * size


def test_tokenizers_that_cannot_make_rows(write: Any) -> None:
    source = TextFiles(write("a.txt", "good film"))
    core = make_tokenizer(special=False).backend_tokenizer
    bare = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]")
    for tokenizer, length, message in (
        (make_tokenizer(pad_token=None), 16, "no padding token"),
        (make_tokenizer(), 2, "special tokens"),
        (make_tokenizer(), 1000, "256"),
        (bare, 16, "neither a separator nor an end-of-text token"),
    ):
        with pytest.raises(DataError, match=message):
            pack(source, Packing(tokenizer, length))
    assert len(pack(source, Packing(bare, 16, packed=False)).train) == 1
    with pytest.raises(ConfigError, match="processes is 0"):
        pack(source, Packing(make_tokenizer(), 16), processes=0)


def test_a_packed_corpus_is_found_without_writing(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, packing = TextFiles(write("a.txt", text_of(documents_of(30)))), Packing(make_tokenizer(), 16)
    found = pack(source, packing)

    def refuse(*_: object) -> None:
        raise WriteError("read-only")

    monkeypatch.setattr(packing_module.storage, "write_text", refuse)
    assert pack(source, packing).folder == found.folder


def test_the_same_relative_names_in_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, word in (("one", PLAIN[0]), ("two", PLAIN[1])):
        (tmp_path / name / "texts").mkdir(parents=True)
        (tmp_path / name / "texts" / "a.txt").write_text(f"{word}\n")
        os.utime(tmp_path / name / "texts" / "a.txt", (1, 1))
    sources_now = [TextFiles("texts"), HubText("texts")]
    told = []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        told += [each.address() for each in sources_now]
    assert len({*told}) == 4
