"""Kill a training, go on, and compare with one that was left alone: bit by bit."""

import random
import signal
from pathlib import Path

import torch

from faults import processes
from faults.fits import PLACES, Case, Trap, differs, fit, write_data


def case_of(number: int) -> Case:
    """Return a training; those of 50 numbers have every value of every choice between them."""
    draw = random.Random(number)
    terms = draw.choice(["plain", "stages", "balance", "contrast", "drawn"])
    return Case(
        workers=(0, 2, 4)[number % 3],
        ranks=2 if number % 5 == 4 else 1,
        precision=draw.choice(["32-true", "32-true", "bf16-mixed"]),
        accumulate=1 if terms == "contrast" else draw.choice([1, 1, 2, 3]),
        batching=draw.choice(["grouped", "plain", "tokens"]),
        terms=terms,
        validate=draw.choice(["epoch", "often", "never"]),
        max_steps=-1 if terms == "stages" else draw.choice([-1, -1, -1, 11]),
    )


def fit_all(folder: Path, case: Case, traps: list[Trap | None]) -> list[int]:
    """Train in as many processes as the training has ranks; return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder.parent / "train.csv").exists():
        write_data(folder.parent)
    return processes.together([lambda trap=trap: fit(folder, case, trap) for trap in traps], folder / "log")


def undisturbed(root: Path, number: int, case: Case) -> Path | None:
    """Train once and be left alone; return the folder, or ``None`` where that fails."""
    folder = root / f"alone-{number}" / "run"
    if not (folder / "final.pt").exists():
        codes = fit_all(folder, case, [None] * case.ranks)
        if any(codes):
            return None
    return folder


def one(root: Path, number: int) -> str:
    """Kill a training again and again, and go on until it ends; return what came of it."""
    draw, case = random.Random(f"kill {number}"), case_of(number)
    alone = undisturbed(root, number, case)
    if alone is None:
        return f"the undisturbed run failed: {case}"
    folder, kills = root / f"killed-{number}" / "run", 0
    while not (folder / "final.pt").exists():
        traps: list[Trap | None] = [None] * case.ranks
        if kills < 3:
            whose = draw.randrange(case.ranks)
            traps[whose] = Trap(draw.choice(PLACES), draw.randint(1, 6), signal.SIGKILL)
        if (folder / "checkpoints" / "best.ckpt").exists() and draw.random() < 0.2:
            for name in ("last", "previous"):
                (folder / "checkpoints" / f"{name}.ckpt").unlink(missing_ok=True)
        codes = fit_all(folder, case, traps)
        kills += 1
        if kills > 8 or (traps == [None] * case.ranks and any(codes)):
            return f"it can't go on: exit codes {codes}, see {folder / 'log'}"
    told = differs(alone, folder)
    return f"differs in {told} after {kills - 1} kills: {case}" if told else "equal"


def one_signal(root: Path, number: int) -> str:
    """Stop a training by a signal, to one of its processes or to all, and go on; return what came of it."""
    draw, case = random.Random(f"signal {number}"), case_of(number)
    alone = undisturbed(root, number, case)
    if alone is None:
        return f"the undisturbed run failed: {case}"
    folder = root / f"stopped-{number}" / "run"
    signum = draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
    for _ in range(2):
        place, at = draw.choice(PLACES), draw.randint(1, 4)
        hit = range(case.ranks) if draw.random() < 0.5 else [draw.randrange(case.ranks)]
        traps = [Trap(place, at, signum) if rank in hit else None for rank in range(case.ranks)]
        codes = fit_all(folder, case, traps)
        if set(codes) == {0}:
            break  # the training was over before
        if set(codes) != {128 + signum}:
            return f"ended with {codes}, not {128 + signum}; see {folder / 'log'}"
        if (sprung := folder / "sprung").exists():
            saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
            if saved < int(sprung.read_text()):
                return f"step {sprung.read_text()} is lost: step {saved} is saved"
            sprung.unlink()
    if not (folder / "final.pt").exists() and any(codes := fit_all(folder, case, [None] * case.ranks)):
        return f"it can't go on: exit codes {codes}, see {folder / 'log'}"
    told = differs(alone, folder)
    return f"differs in {told}: {case}" if told else "equal"
