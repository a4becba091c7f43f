"""Checks of the project: ``nox -s lint types tests``; ``nox -l`` lists them all."""

import re
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "tests"]

PINNED = ("-c", "constraints.txt")


@nox.session
def lint(session: nox.Session) -> None:
    session.install(*PINNED, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    session.install(*PINNED, "-e", ".[dev]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    session.install(*PINNED, "-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def lowest(session: nox.Session) -> None:
    """The tests with the oldest versions that pyproject.toml allows; torch is the one CPU build at hand."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = (re.match(r"([\w.-]+)(\[.*\])?>=([\w.]+)", need) for need in project["dependencies"])
    oldest = [f"{m[1]}{m[2] or ''}=={m[3]}" for m in wanted if m is not None and m[1] != "torch"]
    session.install(*PINNED, "torch")
    session.install(*oldest, "pytest", "pytest-xdist", "hypothesis", "statsmodels", "scikit-posthocs", "matplotlib")
    session.install("--no-deps", "-e", ".")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    session.install(*PINNED, "-e", ".[dev,docs]")
    session.run("mkdocs", "build", "--strict")


@nox.session
def examples(session: nox.Session) -> None:
    session.install(*PINNED, "-e", ".[dev]")
    session.run("pytest", "tests/test_docs.py", *session.posargs)


@nox.session
def sweep(session: nox.Session) -> None:
    """Compare every architecture of transformers with runs by hand; some of them: ``-- --only bert t5``."""
    session.install(*PINNED, "-e", ".[dev]")
    page, env = Path("docs/models.md").resolve(), {"OMP_NUM_THREADS": "1"}
    results = Path(session.create_tmp()).resolve() / "sweep.json"
    session.chdir("tests")
    session.run("python", "-m", "sweep", "--json", str(results), "--page", str(page), *session.posargs, env=env)


@nox.session
def faults(session: nox.Session) -> None:
    """Try to lose a run's work: 200 experiments of each kind, or ``-- resume --count 20``."""
    session.install(*PINNED, "-e", ".[dev]")
    session.chdir("tests")
    session.run("python", "-m", "faults", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def soak(session: nox.Session) -> None:
    """Twenty minutes of mixed experiments beside an undisturbed training: nothing is lost, nothing grows."""
    session.install(*PINNED, "-e", ".[dev]")
    session.chdir("tests")
    session.run("python", "-m", "faults", "--soak", "20", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it into an empty environment, and run the quickstart in another folder."""
    session.install(*PINNED, "build", "hatchling")
    folder = Path(session.create_tmp())
    session.run("python", "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder))
    constraints = str(Path("constraints.txt").resolve())
    wheel_file = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime).resolve()
    session.run("python", "-m", "venv", "--clear", str(folder / "empty"))
    session.chdir(folder)
    session.run("empty/bin/pip", "install", "-q", "-c", constraints, f"{wheel_file}[demo]", external=True)
    session.run("empty/bin/ildistil", "quickstart", "--overwrite=true", external=True)
