"""Run many distillations and compare them: 'study run STUDY.yaml', 'study status FOLDER', 'study report FOLDER'."""

import argparse
import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ildistil.errors import ConfigError, IldistilError, ProcessError
from ildistil.study import progress, runner
from ildistil.study.jobs import Job, Plan
from ildistil.study.planning import make_plan
from ildistil.study.specification import Study
from ildistil.study.worker import fork, last_lines

__all__ = ["main", "read_files", "run_study"]

# What runs import, once for all of them.
_COMMANDS = ("fit", "finetune", "precompute", "predict", "export", "_study")


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.")


def main(command: str, arguments: Sequence[str]) -> None:
    """Do what the first word says."""
    parser = _Words(prog="ildistil study", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run what isn't finished of a study, or go on with it")
    run.add_argument("file", help="the study's YAML file")
    run.add_argument("--jobs", type=_count, default=1, help="runs at a time; they share cores and GPUs")
    run.add_argument("--retry-failed", action="store_true", help="run again what failed before")
    status = verbs.add_parser("status", help="show how far a study is")
    status.add_argument("folder", help="the study's folder")
    _add_report(verbs.add_parser("report", help="write tables, figures and what follows from them, of a study"))
    given = parser.parse_args(list(arguments))
    if given.verb == "status":
        print(progress.describe(Path(given.folder)))
        return
    if given.verb == "report":
        options = {name: value for name, value in vars(given).items() if name != "verb"}
        files = import_module("ildistil.commands._report").report(**options)
        print("\n".join(map(str, files)))
        return
    if not run_study(Path(given.file), given.jobs, given.retry_failed):
        raise SystemExit(1)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="the study's folder, or a CSV file with a line for each run")
    parser.add_argument("--output", type=Path, help="folder to write; by default 'report' in the study's")
    formats = ["html", "md", "tex", "csv", "svg", "png"]
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats, help="what to write; all by default")
    parser.add_argument("--title", help="title of the report; by default the study's")
    parser.add_argument("--metric", help="metric that is compared on all tasks; by default each task's own")
    parser.add_argument("--rows", help="factor that is compared; by default the objective")
    parser.add_argument("--columns", help="factor beside it; by default the initialisation")
    parser.add_argument("--best-over", nargs="+", default=[], help="factors of which each cell takes its best level")
    parser.add_argument("--baseline", help="level that all others are compared with, instead of all with each other")


def run_study(file: Path, jobs: int, retry_failed: bool = False) -> bool:
    """Check a study, and run what isn't finished of it; return whether all of it is.

    Raises:
        ConfigError: all that is wrong with it, before anything is run.
    """
    problems: list[str] = []
    study = Study.read(read_files(file), problems)
    print(f"{study.title}: {len(study.choices)} configurations are checked ...", flush=True)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look at the GPUs must not open one before the forks
    for name in _COMMANDS:
        import_module(f"ildistil.commands.{name}")
    plan = _plan_elsewhere(study, problems)
    folder = Path(study.folder)
    runner.keep_plan(folder, plan)
    print(f"{len(plan.jobs)} jobs in {folder}, {jobs} at a time.", flush=True)
    return runner.run_jobs(folder, plan, jobs, retry_failed, lambda text: print(text, flush=True))


def _plan_elsewhere(study: Study, problems: Sequence[str]) -> Plan:
    """Make the plan in another process, since it loads models: what forks the runs has computed nothing."""
    reading, writing = os.pipe()
    log = Path(study.folder or ".") / "plan.log"

    def answer() -> int:
        os.close(reading)
        _redirect(log)
        try:
            plan = make_plan(study, import_module("ildistil.commands._study").Configurations(), problems)
            said: dict[str, Any] = plan.as_dict() | {"configs": plan.configs}
        except IldistilError as error:
            said = {"error": str(error)}
        with os.fdopen(writing, "w", encoding="utf-8") as file:
            json.dump(said, file)
        return 0

    child = fork(answer)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as file:
        text = file.read()
    os.waitpid(child, 0)
    if not text:
        raise ProcessError(f"The study could not be checked:\n{last_lines(log)}")
    found = json.loads(text)
    if "error" in found:
        raise ConfigError(found["error"])
    return Plan(found["title"], [Job(**each) for each in found["jobs"]], found["configs"])


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


def read_files(file: Path) -> dict[str, Any]:
    """Read a study's file, and the configurations that it names, which are found from its folder."""
    from ildistil.commands._config import read

    given = read(str(file))

    def put(holder: Any, key: str) -> None:
        if isinstance(holder, dict) and isinstance(holder.get(key), str):
            path = Path(holder[key]).expanduser()
            holder[key] = read(str(path if path.is_absolute() else file.parent / path))

    put(given, "base")
    put(given.get("teacher"), "finetune")
    put(given.get("finetune"), "base")
    return given


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number
