"""The runs behind docs/results.md, "Without labels": general students, by objective and initialisation, fine-tuned.

Expects in the working folder ``minilm`` (the folder of all-MiniLM-L6-v2), ``corpus`` and ``glue`` (the data). It goes
on where it was stopped: a run that is finished has its lines in results.csv.
"""

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

HERE = Path(__file__).parent
RESULTS, LOCK = Path("results.csv"), Lock()
COLUMNS = ["objective", "initialisation", "task", "seed", "metric", "value"]
#: The paper's objectives, in the order in which they are run; "none" is a student that isn't distilled.
OBJECTIVES = ["none", "att-mse", "att-kl", "hid-seq", "vanilla", "hid-cls", "att-kl-val-kl", "att-kl-hid-seq"]
INITIALISATIONS = {"random": "{config: {num_hidden_layers: 3, attention_probs_dropout_prob: 0.0}}",
                   "first": "{layers: [1, 2, 3], config: {attention_probs_dropout_prob: 0.0}}"}  # fmt: skip
#: Epochs, and what else is set.
TASKS = {
    "sst2": (3, ["--data.limit_train=6000"]),
    "qnli": (3, ["--data.limit_train=5000", "--data.train_file=train_derived.tsv"]),
    "cola": (5, []),
    "mrpc": (5, []),
    "rte": (5, []),
}
TEACHER = "{class_path: pretrained, init_args: {path: teacher, head: masked-lm}}"


def ildistil(command: str, run: Path, *words: str) -> None:
    """Run a command in a folder of its own, or go on with it."""
    run.parent.mkdir(parents=True, exist_ok=True)
    call = [sys.executable, "-m", "ildistil.cli", command, *words]
    with open(f"{run}.log", "a", encoding="utf-8") as log:
        subprocess.run(call, stdout=log, stderr=log, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def trained(command: str, run: Path, *words: str) -> Path:
    """Train, unless that is done, and return the exported folder."""
    folder = Path("exported") / run
    if not folder.is_dir():
        ildistil(command, run, f"--run={run}", "--resume", *words)
        folder.parent.mkdir(parents=True, exist_ok=True)
        ildistil("export", run, str(run / "checkpoints/last.ckpt"), str(folder))
    return folder


def student(objective: str, initialisation: str) -> Path:
    """Return the folder of a general student."""
    name = f"{objective}-{initialisation}"
    config = ["--config", str(HERE / "distil.yaml"), f"--model.student={INITIALISATIONS[initialisation]}"]
    if objective == "none":  # one step at a learning rate of nothing: the student as it starts
        words = ["--preset=minilm", *config, "--trainer.max_steps=1", "--model.learning_rate=1e-30"]
    else:
        words = [f"--preset=paper-agnostic-{objective}", *config]
    if objective == "vanilla":
        words += [f"--model.teacher={TEACHER}", "--data.labels=masked"]
    return trained("fit", Path("general") / name, *words)


def measure(made: "Future[Path]", objective: str, initialisation: str, task: str, seed: int) -> None:
    """Fine-tune a general student on a task, and add what the last epoch gave to the results."""
    epochs, words = TASKS[task]
    run = Path("tuned") / f"{objective}-{initialisation}" / f"{task}-{seed}"
    model = made.result()
    ildistil(
        "finetune", run, f"--run={run}", "--resume", "--config", str(HERE / "finetune.yaml"), f"--model.path={model}",
        f"--data.task={task}", f"--seed_everything={seed}", f"--trainer.max_epochs={epochs}", *words,
    )  # fmt: skip
    with open(run / "metrics.csv", encoding="utf-8") as file:
        last = [row for row in csv.DictReader(file) if row.get("val/loss")][-1]
    with LOCK, RESULTS.open("a", encoding="utf-8", newline="") as file:
        for key, value in last.items():
            if key.startswith("val/") and value:
                csv.writer(file).writerow([objective, initialisation, task, seed, key.removeprefix("val/"), value])


def missing(seeds: int) -> Iterator[tuple[str, str, str, int]]:
    """Yield what isn't in the results, in the order of its value."""
    with RESULTS.open(encoding="utf-8") as file:
        done = {tuple(row[name] for name in COLUMNS[:4]) for row in csv.DictReader(file)}
    for initialisation in INITIALISATIONS:
        for objective in OBJECTIVES:
            for seed in range(seeds):
                for task in TASKS:
                    if (objective, initialisation, task, str(seed)) not in done:
                        yield objective, initialisation, task, seed


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--seeds", type=int, default=3, help="fine-tunings of each student on each task")
    options = parser.parse_args()
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    if not Path("teacher").is_dir():
        Path("teacher").symlink_to(trained("finetune", Path("mlm"), "--config", str(HERE / "teacher.yaml")))
    todo = list(missing(options.seeds))
    pairs = list(dict.fromkeys((objective, initialisation) for objective, initialisation, *_ in todo))
    with ThreadPoolExecutor(options.jobs) as pool:
        made = [pool.submit(student, *pair) for pair in pairs[:1]]
        runs: list[Future[None]] = []
        for number, pair in enumerate(pairs):  # the next student is made beside the runs that start from this one
            made += [pool.submit(student, *each) for each in pairs[number + 1 : number + 2]]
            runs += [pool.submit(measure, made[number], *run) for run in todo if run[:2] == pair]
    futures: list[Future[Any]] = [*made, *runs]
    for error in filter(None, (future.exception() for future in futures)):
        print(error)


if __name__ == "__main__":
    main()
