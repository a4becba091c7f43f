import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ildistil import quickstart as q


def test_labels_are_right() -> None:
    """By a derivation of their own: the asked thing stands in the list, or doesn't."""
    examples = q.make_examples(500, seed=1)
    for example in examples:
        listed = [word for word in example.premise.split() if word in q.THINGS]
        asked = [word for word in example.hypothesis.split() if word in q.THINGS]
        assert len(asked) == 1
        assert 2 <= len(listed) <= 3
        assert example.label == int(asked[0] in listed)


def test_the_seed_decides() -> None:
    assert q.make_examples(50, seed=1) == q.make_examples(50, seed=1)
    assert q.make_examples(50, seed=1) != q.make_examples(50, seed=2)


def test_a_bag_of_words_does_not_solve_it() -> None:
    """Logistic regression on the word counts of both sentences, 4000 examples, stays at chance."""
    words = [*q.GLUE_WORDS, *q.THINGS]

    def counts(examples: list[q.Example]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [
            [float(Counter(text.split())[word]) for text in (e.premise, e.hypothesis) for word in words]
            for e in examples
        ]
        return torch.tensor(rows), torch.tensor([float(e.label) for e in examples])

    x, y = counts(q.make_examples(4000, seed=1))
    held_out, truth = counts(q.make_examples(4000, seed=2))
    weights = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weights[1:] + weights[0], y)
        loss = loss + 1e-3 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    hits = ((held_out @ weights[1:] + weights[0] > 0).float() == truth).float().mean()
    assert 0.45 < hits < 0.55


def test_the_whole_run_in_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"TEACHER_ROWS": 64, "STUDENT_ROWS": 64, "VALIDATION_ROWS": 50, "STUDENT_EPOCHS": 1}.items():
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
        "the bag holds a key .", "it holds a key .", return_tensors="pt"
    )
    assert model(**inputs).logits.shape == (1, 2)
    with pytest.raises(ValueError, match="is not empty"):
        q.quickstart(str(folder))


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        q.quickstart(str(tmp_path), seeds=0)
