import html.parser
import itertools
import math
import random
import re
import statistics as plain
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ildistil.commands._report import report
from ildistil.errors import ConfigError, DataError
from ildistil.study.report import Document, build, write
from ildistil.study.runs import Run, write_csv

OBJECTIVES, STARTS, TASKS, SEEDS = ("kd", "hidden", "attention"), ("1,2,3", "4,5,6"), ("qnli", "cola"), range(3)
METRIC = {"qnli": "accuracy", "cola": "matthews"}


def study() -> list[Run]:
    """All combinations, each with a value of its own."""
    draw, runs = random.Random(0), []
    for objective, start, task, seed in itertools.product(OBJECTIVES, STARTS, TASKS, SEEDS):
        value = 0.5 + 0.1 * OBJECTIVES.index(objective) * STARTS.index(start) + draw.gauss(0, 0.02)
        factors = {"objective": objective, "initialisation": start, "task": task, "seed": str(seed)}
        curve = [
            {"step": step, METRIC[task]: value - 0.05 * (2 - number)} for number, step in enumerate((50, 100, 150))
        ]
        cost = {"seconds": 60.0 + seed, "tokens_per_second": 900.0, "teacher_runs": 10.0, "teacher_runs_saved": 30.0}
        name = f"{objective}_{start}_{task}_{seed}"
        runs.append(Run(name, factors, "finished", {METRIC[task]: value, "loss": 1 - value}, curve, cost))
    return runs


def changed(runs: list[Run], name: str, **fields: object) -> list[Run]:
    return [replace(run, **fields) if run.name == name else run for run in runs]  # type: ignore[arg-type]


def made(runs: list[Run], **options: object) -> Document:
    return build(runs, "A study", draws=200, **options)  # type: ignore[arg-type]


def table(document: Document, section: str, caption: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (row, column) to what the cell says."""
    part = next(part for part in document.sections if part.title == section)
    found = next(each for each in part.tables if each.caption.startswith(caption))
    return {
        (row[0].text, name): (cell.text, cell.small)
        for row in found.rows
        for name, cell in zip(found.header[1:], row[1:], strict=True)
    }


def words(document: Document) -> str:
    said = [*document.summary, *(sentence for _, sentences in document.answers for sentence in sentences)]
    return " ".join([*said, *(sentence for part in document.sections for sentence in part.sentences)])


def values(runs: list[Run], objective: str, start: str, task: str) -> list[float]:
    wanted = {"objective": objective, "initialisation": start, "task": task}
    return [100 * r.metrics[METRIC[task]] for r in runs if wanted.items() <= r.factors.items() and r.metrics]


def test_every_cell_has_mean_deviation_and_n() -> None:
    runs = study()
    document = made(runs)
    for objective, start, task in itertools.product(OBJECTIVES, STARTS, TASKS):
        each = values(runs, objective, start, task)
        expected = (f"{plain.mean(each):.1f}", f"± {plain.stdev(each):.1f} (3)")
        assert table(document, "Scores", task)[objective, start] == expected
        both = [plain.mean(pair) for pair in zip(*(values(runs, objective, start, t) for t in TASKS), strict=True)]
        expected = (f"{plain.mean(both):.1f}", f"± {plain.stdev(both):.1f} (3)")
        assert table(document, "Scores", "Mean over the 2 tasks")[objective, start] == expected


def test_the_best_of_a_column_is_marked() -> None:
    runs = study()
    part = next(part for part in made(runs).sections if part.title == "Scores")
    shown = next(each for each in part.tables if each.caption.startswith("qnli"))
    for column, start in enumerate(STARTS, 1):
        means = {objective: f"{plain.mean(values(runs, objective, start, 'qnli')):.1f}" for objective in OBJECTIVES}
        best = {objective for objective, mean in means.items() if mean == max(means.values())}
        assert {row[0].text for row in shown.rows if row[column].mark == "best"} == best


def test_differences_are_paired_over_seeds_and_tested_by_sign_flips() -> None:
    runs = study()
    cell = "kd − hidden"
    part = next(part for part in made(runs).sections if part.title == "Differences")
    rows = [row for row in part.tables[0].rows if row[0].text == cell and row[1].text == "4,5,6"]
    each = [a - b for t in TASKS for a, b in zip(values(runs, "kd", "4,5,6", t), values(runs, "hidden", "4,5,6", t),
                                                strict=True)]  # fmt: skip
    flips = [
        abs(sum(s * d for s, d in zip(signs, each, strict=True))) for signs in itertools.product((1, -1), repeat=6)
    ]
    p = sum(flip >= abs(sum(each)) - 1e-9 for flip in flips) / 64
    assert [(row[2].text, row[3].text, row[4].text) for row in rows] == [
        (f"{plain.mean(each):+.1f}", "3 seeds, 2 tasks", f"{p:.2g}")
    ]
    seeds = [plain.mean(pair) for pair in zip(each[:3], each[3:], strict=True)]
    half = 4.302652729911275 * plain.stdev(seeds) / math.sqrt(3)  # t of two degrees of freedom
    assert rows[0][2].small == f"{plain.mean(seeds) - half:+.1f} to {plain.mean(seeds) + half:+.1f}"


def test_too_few_seeds_cannot_reach_the_level_and_the_words_say_so() -> None:
    runs = [run for run in study() if run.factors["task"] == "qnli"]
    document = made(runs)
    assert "p = 1, adjusted for 6 comparisons (Holm); so few pairs give no p below 1." in words(document)
    assert "6 cannot reach 0.05 with so few pairs" in words(document)
    assert "significant" not in words(document)


def test_each_sentence_follows_from_the_numbers() -> None:
    runs = study()
    said = made(runs).answers[0][1]
    means = {}
    for objective in OBJECTIVES:
        seeds = zip(*(values(runs, objective, "4,5,6", task) for task in TASKS), strict=True)
        means[objective] = plain.mean(map(plain.mean, seeds))
    first, second = sorted(means, key=lambda objective: -means[objective])[:2]
    sentence = next(each for each in said if each.startswith("Initialisation 4,5,6"))
    assert sentence.startswith(f"Initialisation 4,5,6: {first} is first with {means[first]:.1f} (95 % interval ")
    assert f"{first} less {second}, the second: {means[first] - means[second]:+.1f} points (95 % interval" in sentence
    spread = {objective: max(m) - min(m) for objective, m in ((o, [plain.mean(plain.mean(values(runs, o, s, t))
              for t in TASKS) for s in STARTS]) for o in OBJECTIVES)}  # fmt: skip
    assert f"most for {max(spread, key=lambda o: spread[o])}" in said[-1]
    assert "1,080 of 1,440 teacher runs (75 %) were read from stored targets." in words(made(runs))
    assert "36 of 36 runs with a value: 3 objectives × 2 initialisations × 2 tasks × 3 seeds." in words(made(runs))


def with_predictions(runs: list[Run], folder: Path, wrong: bool = False) -> list[Run]:
    """Write predictions of 200 rows that give the metrics of the runs, and round the metrics to them."""
    found = []
    for run in runs:
        hits = round(200 * run.metrics["accuracy"])
        right = random.Random(run.name).sample(range(200), hits)
        lines = [f"{row}\t{'yes' if row in set(right) else 'no'}\tyes\t0.5\t0.5" for row in range(200)]
        file = folder / f"{run.name}.tsv"
        file.write_text("\n".join(["row_id\tprediction\tlabel\tp_no\tp_yes", *lines]) + "\n")
        accuracy = hits / 200 + (0.02 if wrong else 0)
        found.append(replace(run, predictions=file, metrics={"accuracy": accuracy}))
    return found


def test_predictions_are_paired_by_row(tmp_path: Path) -> None:
    runs = [run for run in study() if run.factors["task"] == "qnli"]
    runs = with_predictions(runs, tmp_path)
    part = next(part for part in made(runs).sections if part.title == "Differences")
    assert "the 200 validation rows" in part.tables[0].note
    ones, others = (values(runs, name, "4,5,6", "qnli") for name in ("kd", "attention"))
    row = next(r for r in part.tables[0].rows if r[0].text == "kd − attention" and r[1].text == "4,5,6")
    assert (row[2].text, row[3].text) == (f"{plain.mean(ones) - plain.mean(others):+.1f}", "3 seeds, 200 rows")


def test_predictions_of_something_else_are_not_used(tmp_path: Path) -> None:
    runs = with_predictions([run for run in study() if run.factors["task"] == "qnli"], tmp_path, wrong=True)
    part = next(part for part in made(runs).sections if part.title == "Differences")
    assert "the predictions don't give the accuracy that was logged" in part.tables[0].note
    (tmp_path / f"{runs[4].name}.tsv").write_text("row_id\tprediction\n0\tyes\n")
    part = next(part for part in made(runs).sections if part.title == "Differences")
    assert f"the predictions of {runs[4].name} aren't there, or have no labels" in part.tables[0].note


def test_missing_runs_are_seen_everywhere() -> None:
    runs = changed(study(), "kd_1,2,3_qnli_0", state="failed", metrics={}, reason="loss is NaN\nat step 3")
    runs = changed(runs, "hidden_1,2,3_qnli_1", metrics={"accuracy": math.nan})
    runs = changed(runs, "hidden_1,2,3_qnli_2", state="waiting", metrics={})
    runs = changed(runs, "hidden_1,2,3_qnli_0", state="running", metrics={"accuracy": 0.99})
    runs = [run for run in runs if not run.name.startswith("attention_4,5,6")]
    document = made(runs)
    scores = table(document, "Scores", "qnli")
    assert scores["kd", "1,2,3"][1].endswith("(2 of 3)")
    assert scores["hidden", "1,2,3"] == ("missing", "(0 of 3: 1 running, 1 not finite, 1 waiting)")
    assert scores["attention", "4,5,6"] == ("not run", "(0)")
    assert table(document, "Scores", "Mean over")["hidden", "1,2,3"][0] == "missing"
    assert "26 of 30 runs with a value (1 failed, 1 running, 1 waiting and 1 finished without a finite value)" in words(
        document
    )
    part = document.sections[-1]
    assert [(row[0].text, row[2].text, row[3].text) for row in part.tables[0].rows] == [
        ("kd_1,2,3_qnli_0", "failed", "loss is NaN\nat step 3"),
        ("hidden_1,2,3_qnli_0", "running", ""),
        ("hidden_1,2,3_qnli_1", "accuracy is not finite", ""),
        ("hidden_1,2,3_qnli_2", "waiting", ""),
    ]
    assert "without seed 0 of hidden" not in words(document)
    assert any("(without seed 0 of attention)" in row[3].small for row in differences(document, "qnli"))


def differences(document: Document, task: str) -> list[list[object]]:
    part = next(part for part in document.sections if part.title == "Differences")
    return next(list(map(list, each.rows)) for each in part.tables if each.caption.startswith(task))  # type: ignore[misc]


def only(**wanted: str) -> list[Run]:
    return [run for run in study() if wanted.items() <= run.factors.items()]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        (only(seed="0"), "One seed: no spread between runs can be told"),
        (only(task="qnli"), "18 of 18 runs"),
        (only(initialisation="1,2,3"), "The same in all runs: initialisation 1,2,3."),
        (only(objective="kd"), "kd reaches"),
        (only(objective="kd", initialisation="1,2,3", task="qnli", seed="0"), "1 of 1 run with a value"),
        ([replace(run, state="failed", metrics={}) for run in study()], "No run has a value yet"),
        ([replace(run, metrics=dict.fromkeys(run.metrics, math.nan)) for run in study()], "No run has a value yet"),
        ([Run("alone", {}, "finished", {"accuracy": 0.5})], "reaches 50.0 (n = 1)"),
        ([Run("nothing", {})], "No run has a value yet"),
        (
            [replace(run, metrics={}) if run.factors["task"] == "cola" else run for run in study()],
            "18 finished without",
        ),
    ],
    ids=["seed", "task", "initialisation", "objective", "one", "failed", "nan", "bare", "waiting", "no metric"],
)
def test_small_and_broken_studies_are_told_in_words(tmp_path: Path, runs: list[Run], expected: str) -> None:
    document = made(runs)
    assert expected in words(document)
    write(document, runs, tmp_path, ("md", "tex") if len(runs) > 1 else ("html", "md", "tex"))
    text = (tmp_path / "report.md").read_text()
    assert not re.search(r"\bnan\b|\binf\b|None", text)


def test_another_axis_is_reported_level_by_level_or_by_its_best() -> None:
    runs = [
        replace(
            run, name=f"{run.name}_{rate}", factors={**run.factors, "learning_rate": rate},
            metrics={name: value - 0.2 * (rate == "1e-3") for name, value in run.metrics.items()},
        )
        for run in study() for rate in ("1e-3", "1e-4")
    ]  # fmt: skip
    document = made(runs)
    assert [heading for heading, _ in document.answers] == ["learning rate 1e-3", "learning rate 1e-4"]
    assert "Each learning rate is reported by itself" in words(document)
    document = made(runs, best_over=["learning_rate"])
    assert [heading for heading, _ in document.answers] == [""]
    text, small = table(document, "Scores", "qnli")["kd", "1,2,3"]
    assert text == f"{plain.mean(values(study(), 'kd', '1,2,3', 'qnli')):.1f}"
    assert small.endswith("(3; learning rate 1e-4)")
    assert "being chosen so, these means are a little too high" in words(document)


def test_what_isnt_there_is_refused() -> None:
    with pytest.raises(DataError, match="no runs"):
        made([])
    with pytest.raises(DataError, match="same factors"):
        made([*study(), replace(study()[0], name="again")])
    with pytest.raises(ConfigError, match="No run has the factor 'lr'"):
        made(study(), best_over=["lr"])
    with pytest.raises(ConfigError, match="No run on qnli measured 'f1'"):
        made(study(), metrics={"qnli": "f1"})
    with pytest.raises(ConfigError, match="no 'task'"):
        made(study(), baseline="task")
    with pytest.raises(ConfigError, match="no format 'pdf'"):
        write(made(study()[:1]), study()[:1], Path("nowhere"), ["pdf"])


def test_comparisons_with_a_baseline_alone_are_a_smaller_family() -> None:
    rows = differences(made(study(), baseline="kd"), "qnli")
    assert sorted({row[0].text for row in rows}) == ["attention − kd", "hidden − kd"]  # type: ignore[attr-defined]


class Page(html.parser.HTMLParser):
    """Checks that each element is closed, and collects attributes."""

    VOID = ("meta", "br", "link", "img", "hr", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_whole_by_itself(tmp_path: Path) -> None:
    runs = study()
    write(made(runs), runs, tmp_path, ("html",))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text)
    names = [value for _, name, value in page.attributes if name == "id"]
    assert len(names) == len(set(names))
    references = [value for _, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert references
    assert all(value.startswith("#") and value[1:] in names for value in references)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(names)
    assert text.count("<svg") == len(made(runs).figures) + sum(len(part.figures) for part in made(runs).sections)


HOSTILE = ("<script>alert(1)</script>", "50% & a_b $x$ #1 ~^\\{y}", "a|b*c`d`", "雪 é & <b>")


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    names = dict(zip(("kd", "hidden", "1,2,3", "cola"), HOSTILE, strict=True))
    runs = [
        replace(run, factors={name: names.get(level, level) for name, level in run.factors.items()})
        for run in only(seed="0") + only(seed="1")
    ]
    runs[0] = replace(runs[0], state="failed", reason=HOSTILE[1], metrics={})
    write(build(runs, HOSTILE[0], draws=200), runs, tmp_path, ("html", "md", "tex"))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert text.count("<script") == 1
    assert all(name in page.words for name in HOSTILE)
    tex = (tmp_path / "report.tex").read_text(encoding="utf-8")
    body = re.sub(r"\\[%&_$#{}]|\\text\w+\{\}|\$\\pm\$|\$\\times\$|\$-\$", "", tex[tex.index(r"\section*") :])
    assert not re.search(r"[%#_$~^]", body)
    assert body.count("{") == body.count("}")
    rows = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert not re.search(r"<(script|b)>", rows)
    widths = [re.sub(r"\\\|", "", row).count("|") for row in rows.splitlines() if row.startswith("|")]
    assert all(len(list(group)) > 2 for _, group in itertools.groupby(widths))


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "all.csv"
    write_csv(only(seed="0", task="qnli") + only(seed="1", task="qnli"), source)
    one, other = (report(source, tmp_path / name) for name in ("one", "other"))
    assert [path.relative_to(tmp_path / "one") for path in one] == [p.relative_to(tmp_path / "other") for p in other]
    assert {path.suffix for path in one} == {".html", ".md", ".tex", ".csv", ".svg", ".png"}
    for first, second in zip(one, other, strict=True):
        assert first.read_bytes() == second.read_bytes(), first.name
    assert (tmp_path / "one" / "runs.csv").read_bytes() == source.read_bytes()


def captions(document: Document) -> Iterator[str]:
    for part in document.sections:
        yield from (each.caption for each in part.tables)
        yield from (each.caption for each in part.figures)


def test_tables_have_an_n_in_every_cell() -> None:
    document = made(study())
    for part in document.sections:
        for each in part.tables if part.title in ("Scores", "Ranks", "Cost", "Other metrics") else ():
            cells = [cell for row in each.rows for cell in row[1:]]
            assert all(re.search(r"\(\d+( of \d+)?|n = \d", cell.small) for cell in cells), each.caption
    assert all(len(caption) > 5 for caption in captions(document))
