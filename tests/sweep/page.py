"""The results as Markdown: counts, the families people use most, and the rest as lists."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

START, END = "<!-- made by nox -s sweep -->", "<!-- end of the sweep -->"
RESULTS = ("right", "refused", "wrong", "foreign", "no reference")
KINDS = ("HiddenMSE", "CLSMSE", "AttentionKL", "logits")
KNOWN = {
    "albert", "bart", "beit", "bert", "big_bird", "bloom", "clip", "codegen", "cohere", "deberta", "deberta-v2",
    "deepseek_v3", "deit", "dinov2", "distilbert", "electra", "falcon", "gemma", "gemma2", "gemma3", "glm4", "gpt2",
    "gpt_neo", "gpt_neox", "gpt_oss", "hubert", "jamba", "llama", "llama4", "longformer", "mamba", "marian", "mbart",
    "mistral", "mixtral", "modernbert", "mpnet", "mt5", "olmo2", "opt", "pegasus", "phi", "phi3", "qwen2", "qwen2_vl",
    "qwen3", "qwen3_moe", "rembert", "roberta", "siglip", "smollm3", "swin", "t5", "t5gemma", "vit", "wav2vec2",
    "whisper", "xlm-roberta", "xlnet",
}  # fmt: skip
PREDICTS = {"next": "the next one", "own": "its own", "unknown": "not known", None: ""}

Row = dict[str, Any]


def results(row: Row) -> set[str]:
    """Which results a row has."""
    return {cell["result"] for cell in row["cells"]} or {"not built"}


def counts(rows: Iterable[Row]) -> dict[str, int]:
    """How often each result occurs."""
    found = Counter(cell["result"] for row in rows for cell in row["cells"])
    found["not built"] = sum(1 for row in rows if not row["cells"])
    return {name: found[name] for name in (*RESULTS, "not built")}


def write(page: Path, rows: list[Row]) -> None:
    """Replace what stands between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    before, after = text.split(START)[0], text.split(END)[1]
    page.write_text(f"{before}{START}\n\n{markdown(rows)}\n{END}{after}", encoding="utf-8")


def markdown(rows: list[Row]) -> str:
    """All that is between the markers."""
    rows = sorted(rows, key=lambda row: row["name"].lower())
    reasons = Reasons()
    return "\n".join([*_counts(rows), "", *_known(rows, reasons), "", *reasons.lines(), "", *_rest(rows)])


class Reasons:
    """Numbers the reasons of refusals, which differ in names only."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, row: Row, why: str) -> int:
        """The number of a reason."""
        return self._numbers.setdefault(reason(row, why), len(self._numbers) + 1)

    def lines(self) -> list[str]:
        """The numbered list."""
        return [f"{number}. {text}" for text, number in self._numbers.items()]


def reason(row: Row, why: str) -> str:
    """The first sentence of a refusal, without what differs between models."""
    text = re.sub(r"^\w+Error: | \[[a-z ]+\]$", "", why)
    text = re.sub(rf"(student|teacher) {row['name']}\b|\b{row['name']}\b", "model", text)
    text = re.sub(r"\b[A-Z]\w*(Attention|Attn)\w*", "Its attention", text)
    text = re.sub(r"\([\d, ]+\)|\d+", "n", text)
    sentence = re.split(r"(?<=[.:]) (?=[A-Z])|\n", text)[0].rstrip(":. ")
    return sentence.replace("|", "\\|")[:200]


def _kind(cell: dict[str, str]) -> str:
    return re.sub(r"Logits\w+", "logits", cell["term"].split(",")[0])


def _counts(rows: list[Row]) -> list[str]:
    built = [row for row in rows if row["cells"]]
    types = {row["model_type"] for row in built}
    lines = [f"{len(built)} classes of {len(types)} model types; {len(rows) - len(built)} could not be built tiny.", ""]
    lines += [f"| term | {' | '.join(RESULTS)} |", "|---" * (len(RESULTS) + 1) + "|"]
    for kind in KINDS:
        found = Counter(cell["result"] for row in built for cell in row["cells"] if _kind(cell) == kind)
        lines.append(f"| {kind} | {' | '.join(str(found[result]) for result in RESULTS)} |")
    return lines


def _known(rows: list[Row], reasons: Reasons) -> list[str]:
    lines = [f"| class | {' | '.join(KINDS)} | a row of logits predicts |", "|---" * (len(KINDS) + 2) + "|"]
    for row in rows:
        if row["model_type"] in KNOWN and row["cells"] and row["head"] != "texts":
            cells = [_told(row, kind, reasons) for kind in KINDS]
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {PREDICTS[row['predicts']]} |")
    return lines


def _told(row: Row, kind: str, reasons: Reasons) -> str:
    """The result of a term; of an encoder-decoder for each stack, unless all are alike."""
    found = {}
    for cell in row["cells"]:
        if _kind(cell) == kind:
            number = f" ({reasons.number(row, cell['why'])})" if cell["result"] == "refused" else ""
            found[cell["term"].partition(", ")[2]] = cell["result"] + number
    if len(set(found.values())) > 1:
        return ", ".join(f"{stack}: {result}" for stack, result in found.items())
    return next(iter(found.values()), "-")


def _rest(rows: list[Row]) -> list[str]:
    """All classes by what they have in common."""
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[_in_common(row)].append(row["name"])
    lines = []
    for label, names in sorted(groups.items(), key=lambda group: (group[0] != "right", -len(group[1]))):
        lines += [f"**{label}** ({len(names)}): {', '.join(names)}.", ""]
    return lines[:-1]


def _in_common(row: Row) -> str:
    """Which terms aren't right, by result."""
    found: dict[str, list[str]] = defaultdict(list)
    for kind in KINDS:
        cells = [cell for cell in row["cells"] if _kind(cell) == kind]
        for result in RESULTS[1:]:
            stacks = [cell["term"].partition(", ")[2] for cell in cells if cell["result"] == result]
            if stacks:
                found[result].append(kind if len(stacks) == len(cells) else f"{kind} ({' and '.join(stacks)})")
    told = "; ".join(f"{result}: {', '.join(terms)}" for result, terms in found.items())
    return told or ("right" if row["cells"] else "not built")
