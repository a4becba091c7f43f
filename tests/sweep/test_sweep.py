"""The sweep itself works, on one model of each kind; ``nox -s sweep`` has them all."""

import json
import subprocess
import sys
from pathlib import Path

from sweep import page

CLASSES = ("BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "ViTForImageClassification")


def test_one_model_of_each_kind_is_right(tmp_path: Path) -> None:
    results, table = tmp_path / "sweep.json", tmp_path / "models.md"
    table.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n", encoding="utf-8")
    command = [sys.executable, "-m", "sweep", "--json", results, "--page", table, "--jobs", "1", "--only", *CLASSES]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True)
    rows = json.loads(results.read_text(encoding="utf-8"))
    assert {row["name"]: page.results(row) for row in rows} == {name: {"right"} for name in CLASSES}
    assert {row["name"]: row["predicts"] for row in rows if row["predicts"]} == {
        "BertForMaskedLM": "own",
        "GPT2LMHeadModel": "next",
        "T5ForConditionalGeneration": "own",
    }
    text = table.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| GPT2LMHeadModel | right | right | right | right | the next one |" in text
