"""README, docs and examples: what they show runs, what they list exists, where they point to is there.

Every python block is executed, every ``ildistil`` command is executed (or parsed, where it needs the hub, minutes or a
second process), every yaml block is parsed by the command line. A block whose first line is ``# name.py`` or
``# name.yaml`` is saved under this name first. The folder they run in holds a small random teacher, ``teacher/``, a
pretrained model, ``base/``, SST-2 in miniature, ``glue/``, a data set of one's own, ``reviews/``, and a folder of text,
``texts/``.
"""

import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from transformers import AutoModel

import ildistil.data
import tiny
from ildistil import cli, init_student, mappings, objectives, presets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*"))
# Commands that are only parsed: they take minutes, download, or start processes.
PARSED_ONLY = re.compile(r"quickstart|examples/|--trainer\.devices|--print_config")
BASE = """
model: {teacher: {class_path: pretrained, init_args: {path: ./teacher}}, student: {layers: [1, 2, 3]}}
objectives: {logits: {class_path: LogitsKL}}
data: {class_path: Glue, init_args: {task: sst2, path: glue}}
"""


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(m[1], m[2], text[: m.start()].count("\n") + 2) for m in found]


def commands(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language == "bash":
            yield from block.text.replace("\\\n", " ").splitlines()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the pages and examples work on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ILDISTIL_CACHE", "cache")
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny.save_teacher(Path("teacher"))
    AutoModel.from_pretrained("teacher").save_pretrained("base")  # no head, as pretrained encoders come
    tiny.tokenizer().save_pretrained("base")
    tiny.save_data(Path("glue/sst2"))
    Path("reviews").mkdir()
    for split in ("train", "validation"):
        rows = Path(f"glue/sst2/{split}.tsv").read_text().splitlines()[1:]
        labelled = (row.replace("\t0", "\tbad").replace("\t1", "\tgood") for row in rows)
        Path(f"reviews/{split}.tsv").write_text("\n".join(["review\tsentiment", *labelled]) + "\n")
    Path("reviews/test.tsv").write_text("review\nthe film is good\nthe plot was poor\n")
    Path("texts").mkdir()
    Path("texts/all.txt").write_text(
        "\n\n".join(" ".join(tiny.WORDS[i % 5 :] * 8) for i in range(60)), encoding="utf-8"
    )
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    Path("run.yaml").write_text(BASE)
    return tmp_path


def stand_ins() -> dict[str, Any]:
    """What the blocks of a page may use without having made it."""
    teacher = tiny.bert(6, labels=2, max_position_embeddings=128)
    return {
        "teacher": teacher,
        "student": init_student(teacher, layers=[1, 2, 3]),
        "datamodule": ildistil.data.Glue("sst2", path="glue", tokenizer="./teacher"),
        "batch": tiny.batch(labels=2),
    }


def run(command: str) -> None:
    """Run a line of a shell if it is a command of ours."""
    words = [word for word in shlex.split(command, comments=True) if not word.startswith("PYTHONPATH=")]
    if not words or words[0] != "ildistil":
        return
    if not PARSED_ONLY.search(command):
        cli.main(words[1:])
        return
    extra = [] if "--print_config" in words else ["--help" if words[1] == "quickstart" else "--print_config"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words[1:], *extra])
    assert stop.value.code in (0, None), command


def parse(text: str) -> None:
    """Parse a run's configuration; parts of one are completed by BASE."""
    Path("block.yaml").write_text(text)
    if "path" in yaml.safe_load(text).get("model", {}):
        words = ["finetune", "--config", "block.yaml"]
    else:
        Path("base.yaml").write_text(BASE)
        words = ["fit", "--config", "base.yaml", "--config", "block.yaml"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--print_config"])
    assert stop.value.code in (0, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("mine", "sources"):  # a page's own modules are gone with its folder
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, module)
    namespace: dict[str, Any] = {"__name__": "page"} | stand_ins()
    for block in blocks(page):
        if named := re.match(r"# (\w+\.(?:py|yaml))\n", block.text):
            Path(named[1]).write_text(block.text)
        torch.manual_seed(0)
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        try:
            if block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
            elif block.language == "yaml":
                parse(block.text)
            elif block.language == "bash":
                for command in block.text.replace("\\\n", " ").splitlines():
                    run(command)
            else:
                assert block.language in ("text", "bibtex"), "every block says what it is"
        except SystemExit as error:
            raise AssertionError(f"{where}: a command ended with code {error.code}") from error
        except Exception as error:
            error.add_note(where)
            raise


def test_the_test_command_is_what_ci_runs() -> None:
    setup = [line for line in commands(ROOT / "README.md") if line.startswith("python3.11")]
    assert len(setup) == 2
    assert setup[0].endswith("ildistil quickstart")
    assert setup[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        assert "://" not in target or target.startswith("https://"), target
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(linked), f"{page.name}: {target}"


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def first_column(page: Path, header: str) -> list[str]:
    """The names in the first column of the table with this header; rows without one are titles."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = [line.split("|")[1] for line in lines[start + 2 : lines.index("", start)]]
    return [name for row in rows for name in re.findall(r"`([\w-]+)", row)[:1]]


def concrete(module: Any, base: type) -> set[str]:
    classes = {name: getattr(module, name) for name in module.__all__}
    return {n for n, c in classes.items() if issubclass(c, base) and not inspect.isabstract(c)}


@pytest.mark.parametrize(
    ("page", "header", "names"),
    [
        ("README.md", "objective", concrete(objectives, objectives.Objective)),
        ("docs/objectives.md", "objective", concrete(objectives, objectives.Objective)),
        ("README.md", "mapping", concrete(mappings, mappings.LayerMapping)),
        ("docs/layers.md", "mapping", concrete(mappings, mappings.LayerMapping)),
        ("docs/objectives.md", "preset", set(presets.names())),
    ],
)
def test_tables_list_what_there_is(page: str, header: str, names: set[str]) -> None:
    listed = first_column(ROOT / page, header)
    assert sorted(listed) == sorted(names)


def test_the_mappings_table_is_right() -> None:
    rows = re.findall(r"^\| `(.+?)` \| ((?:\(\d+, \d+\) ?)+)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for call, pairs in rows:
        mapping = eval(f"mappings.{call}")
        resolved = [(s % 4 if s < 0 else s, t % 13 if t < 0 else t) for s, t in mapping(3, 12)]
        assert resolved == [(int(s), int(t)) for s, t in re.findall(r"\((\d+), (\d+)\)", pairs)]


def test_the_tests_that_are_named_exist() -> None:
    text = (ROOT / "docs/correctness.md").read_text(encoding="utf-8")
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"^\|[^|]+\| (?:`(tests/\S+)`, )?`(test_\w+)` \|$", text, re.MULTILINE)
    assert len(named) > 10
    for file, test in named:
        path = ROOT / (file or "tests/objectives/test_invariants.py")
        assert f"def {test}(" in sources[path], test


def test_the_messages_of_troubleshooting_exist() -> None:
    """The words of every message in the tables stand in the package, whatever is filled in between."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    code = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "ildistil").rglob("*.py")))
    code = re.sub(r"[\"']\s*\n\s*f?[\"']", "", code)  # strings over several lines
    messages = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(messages) > 30
    for message in messages:
        parts = re.split(r"\.\.\.|'[\w.]+'|'\./\w+'|\b\d+(?:, \d+)*\b|\[|\]|\(|\)", message)
        for part in (part.strip(" ,:?") for part in parts):
            if len(part) > 12:
                assert part in code, f"{part!r} of {message!r}"


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.suffix == ".py"], ids=lambda example: example.name)
def test_python_examples_run(example: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(example.parent))  # as when it is run as a script
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.suffix == ".yaml"], ids=lambda example: example.name)
def test_yaml_examples_are_parsed(example: Path, folder: Path) -> None:
    parse(example.read_text(encoding="utf-8"))


def test_the_sst2_examples_run_on_local_files(folder: Path) -> None:
    local = ("--data.path=glue", "--trainer.max_epochs=1")
    cli.main(["finetune", "--config=examples/finetune_sst2.yaml", "--model.path=./base", *local])
    cli.main(["fit", "--config=examples/sst2.yaml", "--model.teacher.path=./teacher", *local])
