"""Kill a training, go on, and compare with one that was left alone: bit by bit."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from faults import processes
from faults.fits import KILL, PLACES, Case, Trap, differs, fit


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Yield trainings that between them have every value of every choice, alone and together with others."""
    draw = random.Random(seed)
    for number in range(count):
        case = Case(
            workers=(0, 2, 4)[number % 3],
            ranks=2 if number % 5 == 4 else 1,
            precision=draw.choice(["32-true", "32-true", "bf16-mixed"]),
            accumulate=draw.choice([1, 1, 2, 3]),
            batching=draw.choice(["grouped", "plain", "tokens"]),
            terms=draw.choice(["plain", "stages", "balance", "contrast", "drawn"]),
            validate=draw.choice(["epoch", "often", "never"]),
            max_steps=draw.choice([-1, -1, -1, 11]),
        )
        if case.terms == "contrast":
            case = replace(case, accumulate=1)
        if case.terms == "stages":
            case = replace(case, max_steps=-1)
        yield case


def fit_all(folder: Path, case: Case, traps: list[Trap | None]) -> list[int]:
    """Train in as many processes as the training has ranks; return their exit codes."""
    folder.mkdir(parents=True, exist_ok=True)
    return processes.together([lambda trap=trap: fit(folder, case, trap) for trap in traps], folder / "log")


def undisturbed(root: Path, case: Case) -> Path | None:
    """Train once and be left alone; return the folder, or ``None`` where that fails."""
    folder = root / "alone" / f"{hash(case) & 0xFFFFFFFF:08x}"
    if not (folder / "final.pt").exists():
        codes = fit_all(folder, case, [None] * case.ranks)
        if any(codes):
            return None
    return folder


def one(root: Path, case: Case, number: int, signum: int = KILL) -> str:
    """Kill a training again and again, and go on until it ends; return what came of it."""
    draw = random.Random(number)
    alone = undisturbed(root, case)
    if alone is None:
        return "the undisturbed run failed"
    folder, kills = root / "killed" / str(number), 0
    while not (folder / "final.pt").exists():
        traps: list[Trap | None] = [None] * case.ranks
        if kills < 3:
            whose = draw.randrange(case.ranks)
            traps[whose] = Trap(draw.choice(PLACES), draw.randint(1, 6), signum)
        if (best := folder / "checkpoints" / "best.ckpt").exists() and draw.random() < 0.2:
            for name in ("last", "previous"):
                (folder / "checkpoints" / f"{name}.ckpt").unlink(missing_ok=True)
        codes = fit_all(folder, case, traps)
        kills += 1
        if kills > 8 or (traps == [None] * case.ranks and any(codes)):
            return f"it can't go on: exit codes {codes}, see {folder / 'log'}"
    told = differs(alone, folder)
    return f"differs in {told} after {kills - 1} kills" if told else "equal"
