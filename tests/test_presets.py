"""The named configurations: each trains, is what its name says, and can be overridden."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from transformers import AutoModel

import tiny
from ildistil import Distiller, cli, init_student, objectives, presets
from ildistil.data import Glue
from test_cli import fails
from test_distiller import loader, trainer

RUN = """
model:
  teacher: {class_path: pretrained, init_args: {path: ./teacher}}
  student: {layers: [1, 2]}
data: {class_path: Glue, init_args: {task: sst2, path: glue, batch_size: 8, cache_dir: cache}}
trainer: {accelerator: cpu, enable_progress_bar: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny.save_teacher(Path("teacher"), layers=4)
    tiny.save_data(Path("glue/sst2"))
    Path("run.yaml").write_text(RUN)
    return tmp_path


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_trains(name: str, folder: Path) -> None:
    heads = ["--objectives.relations.heads=4"] if name == "minilmv2" else []  # the tiny models have a width of 32
    cli.main(["fit", "--preset", name, "--config=run.yaml", *heads, "--trainer.fast_dev_run=1"])


WITHOUT_LABELS = sorted({"minilm", "minilmv2", "distilbert", "tinybert-general"} | {
    name for name in presets.names() if "agnostic" in name
})  # fmt: skip
MODELS = """
model: {teacher: {class_path: pretrained, init_args: {path: ./encoder, head: none}}, student: {layers: [1, 2]}}
"""
CORPUS = """
data: {class_path: Corpus, init_args: {files: texts.txt, validation_share: 0.2, batch_size: 4, max_length: 16,
  cache_dir: cache}}
trainer: {accelerator: cpu, enable_progress_bar: false, max_steps: 2, val_check_interval: 1}
"""


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_general_students_are_made_from_text(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    Path("texts.txt").write_text("\n".join(" ".join(tiny.WORDS[i % 6 :]) for i in range(60)), encoding="utf-8")
    Path("corpus.yaml").write_text(MODELS + CORPUS)
    Path("head.yaml").write_text("model: {path: encoder, freeze: true}" + CORPUS)
    AutoModel.from_pretrained("teacher").save_pretrained("encoder")
    tiny.tokenizer().save_pretrained("encoder")
    words = ["--objectives.relations.heads=4"] if name == "minilmv2" else []
    of_tokens = name in ("distilbert", "paper-agnostic-vanilla")
    if of_tokens:
        assert "has no head that makes them" in fails(capsys, "fit", "--preset", name, "--config=corpus.yaml")
        cli.main(["finetune", "--config=head.yaml", "--data.labels=masked", "--run=head"])
        cli.main(["export", "head/checkpoints/best.ckpt", "masked"])
        teacher = "{class_path: pretrained, init_args: {path: ./masked, head: masked-lm}}"
        words += ["--data.labels=masked", f"--model.teacher={teacher}"]
    cli.main(["fit", "--preset", name, "--config=corpus.yaml", "--run=general", *words])
    told = capsys.readouterr().out
    assert "best.ckpt (val/loss = " in told
    assert ("fine-tune it on a task next" in told) is not of_tokens
    cli.main(["export", "general/checkpoints/best.ckpt", "student"])
    assert AutoModel.from_pretrained("student").config.num_hidden_layers == 2


def test_a_preset_with_stages_trains_through_all_of_them(folder: Path) -> None:
    chosen = [{"objectives": names, "epochs": 1} for names in (["embedding", "hidden", "attention"], ["logits"])]
    stages = f"--model.stages={json.dumps(chosen)}"
    cli.main(["fit", "--config=run.yaml", "--preset=tinybert", stages, "--trainer.max_epochs=2"])
    checkpoints = Path("runs/fit/version_0/checkpoints")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert torch.load(checkpoints / "best.ckpt", weights_only=True)["epoch"] == 1
    cli.main(["fit", "--config=run.yaml", "--preset=tinybert", stages, "--trainer.max_epochs=2",
              f"--ckpt_path={checkpoints / 'last.ckpt'}"])  # fmt: skip


def test_a_preset_is_shown_and_overridden(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--preset=pkd", "--config=run.yaml", "--objectives.logits.temperature=5", "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert sorted(shown["objectives"]) == ["logits", "patience", "task"]
    assert shown["objectives"]["logits"]["init_args"]["temperature"] == 5
    assert shown["objectives"]["patience"]["init_args"]["mapping"]["class_path"] == "ildistil.mappings.Skip"


def configuration(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    shown: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return shown


KEPT = """
objectives:
  attention: {class_path: AttentionKL, init_args: {mapping: Last, weight: 3.0}}
  hidden: {class_path: HiddenMSE}
model: {stages: [{objectives: [attention], epochs: 1, learning_rate: 1.0}, {objectives: [hidden], epochs: 1}]}
trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/accuracy, mode: max, patience: 9}}]}
"""
LATER = """
objectives: {attention: {class_path: AttentionKL}, task: TaskLoss}
model: {stages: [{objectives: [attention], epochs: 2}, {objectives: [task], epochs: 2}]}
trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}
"""


def test_nothing_of_a_preset_stays_in_an_objective_of_a_file(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """MiniLM's `attention` is of the last layer; an `attention` of one's own is what it is without the preset."""
    Path("mine.yaml").write_text(RUN + "objectives: {attention: {class_path: AttentionKL}}\n")
    alone, both = (
        configuration(capsys, "--config=mine.yaml"),
        configuration(capsys, "--preset=minilm", "--config=mine.yaml"),
    )
    assert both["objectives"] == alone["objectives"]
    cli.main(["fit", "--preset=minilm", "--config=mine.yaml", "--trainer.fast_dev_run=true"])
    assert "1<-2 2<-4" in caplog.text


def test_of_several_files_the_later_replaces_objectives_and_lists(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"kept": KEPT, "later": LATER}.items():
        Path(f"{name}.yaml").write_text(text)
    later = configuration(capsys, "--config=run.yaml", "--config=later.yaml")
    for words in (
        ["--config=kept.yaml", "--config=later.yaml"],
        ["--config=kept.yaml", "--objectives.attention.weight=2", "--config=later.yaml"],
        ["--config=kept.yaml", *(f"--{key}={json.dumps(value)}" for key, value in (
            ("objectives", yaml.safe_load(LATER)["objectives"]),
            ("model.stages", yaml.safe_load(LATER)["model"]["stages"]),
            ("trainer.callbacks", yaml.safe_load(LATER)["trainer"]["callbacks"]),
        ))],
    ):  # fmt: skip
        assert configuration(capsys, "--config=run.yaml", *words) == later


def test_single_values_are_overridden(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By an option, and by a file that names no class."""
    Path("kept.yaml").write_text(KEPT)
    Path("weight.yaml").write_text("objectives: {attention: {init_args: {weight: 2.0}}}")
    kept = configuration(capsys, "--config=run.yaml", "--config=kept.yaml")["objectives"]
    kept["attention"]["init_args"]["weight"] = 2.0
    by_option = configuration(capsys, "--config=run.yaml", "--config=kept.yaml", "--objectives.attention.weight=2.0")
    assert by_option["objectives"] == kept
    by_file = configuration(capsys, "--config=run.yaml", "--config=kept.yaml", "--config=weight.yaml")
    assert by_file["objectives"] == {"attention": kept["attention"]}


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["presets"])
    listed = capsys.readouterr().out
    assert all(name in listed and presets.title(name) in listed for name in presets.names())


def test_an_unknown_preset_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no preset 'tinybrt'. Did you mean 'tinybert'?" in fails(capsys, "fit", "--preset", "tinybrt")
    assert "There is no preset ''. There are: distilbert" in fails(capsys, "fit", "--preset")


def test_presets_in_python() -> None:
    terms = presets.objectives("tinybert")
    assert {name: type(term) for name, term in terms.items()} == {
        "embedding": objectives.EmbeddingMSE,
        "hidden": objectives.HiddenMSE,
        "attention": objectives.AttentionMSE,
        "logits": objectives.LogitsKL,
    }
    assert [term.name for term in terms.values()] == list(terms)
    assert presets.objectives("tinybert")["hidden"] is not terms["hidden"]
    teacher = tiny.bert(4)
    module = Distiller(init_student(teacher, layers=[1, 2]), teacher, stages=presets.stages("tinybert"))
    run = trainer(*terms.values(), max_epochs=23, limit_train_batches=1)
    run.fit(module, loader())
    assert run.global_step == 23


def test_the_data_modules_give_what_the_memory_bank_needs(folder: Path) -> None:
    data: L.LightningDataModule = Glue("sst2", path="glue", tokenizer="./teacher", batch_size=4)
    data.prepare_data()
    data.setup("fit")
    assert {"row_id", "labels"} <= next(iter(data.train_dataloader())).keys()
