import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ildistil.commands import quickstart as q


def holdings(example: q.Example) -> dict[str, list[str]]:
    bag, box = example.premise.split(",")
    return {name: [w for w in part.split() if w in q.THINGS] for name, part in (("bag", bag), ("box", box))}


def test_labels_are_right() -> None:
    """By a derivation of their own: the asked thing is in the bag, or in the box."""
    for example in q.make_examples(500, seed=1):
        held = holdings(example)
        (asked,) = [word for word in example.hypothesis.split() if word in q.THINGS]
        assert len({*held["bag"], *held["box"]}) == 4
        assert asked in held["bag" if example.label else "box"]


def test_the_seed_decides() -> None:
    assert q.make_examples(50, seed=1) == q.make_examples(50, seed=1)
    assert q.make_examples(50, seed=1) != q.make_examples(50, seed=2)


def test_no_bag_of_words_can_solve_it() -> None:
    """Each example has a twin of the same words in each sentence and the other label."""
    for example in q.make_examples(200, seed=1):
        held = holdings(example)
        asked = next(w for w in example.hypothesis.split() if w in q.THINGS)
        numbers = [q.THINGS.index(w) for w in [*held["box"], *held["bag"]]]
        twin = q._example([q.THINGS[n] for n in numbers], [q.THINGS[n] for n in numbers].index(asked))
        assert Counter(twin.premise.split()) == Counter(example.premise.split())
        assert twin.hypothesis == example.hypothesis
        assert twin.label != example.label


def test_validation_is_new() -> None:
    trained = set(q.make_examples(5000, seed=1)) | set(q.make_examples(5000, seed=2))
    assert trained.isdisjoint(q.make_examples(2000, seed=1, held_out=True))


def test_the_whole_run_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "TEACHER_ROWS": 64,
        "STUDENT_ROWS": 64,
        "VALIDATION_ROWS": 50,
        "STUDENT_EPOCHS": 1,
        "TAUGHT": 0.0,
    }.items():
        monkeypatch.setattr(q, name, value)
    folder = tmp_path / "out"
    q.quickstart(str(folder), seeds=2)
    printed = capsys.readouterr().out
    assert "student, + attention KL" in printed
    assert "Best student: " in printed
    results = json.loads((folder / "results.json").read_text())
    assert [r["model"] for r in results] == ["teacher", "start", "task", "logits", "attention"] * 2
    assert (folder / "quickstart.png").stat().st_size > 10_000
    model, info = AutoModelForSequenceClassification.from_pretrained(folder / "attention", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = AutoTokenizer.from_pretrained(folder / "attention")(
        "the bag holds a key .", "the bag holds a key .", return_tensors="pt"
    )
    assert model(**inputs).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="is not empty"):
        q.quickstart(str(folder))


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        q.quickstart(str(tmp_path), seeds=0)
