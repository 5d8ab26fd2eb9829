"""A signal to any rank, at any moment: a checkpoint within two steps, and the signal's exit code from every rank."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

from tests.forks import PATIENCE
from tests.reliability.figure import Figure
from tests.reliability.rank_runs import MOMENTS, Act, RankRun, acted, gone, launched, newest

CODES = {"SIGTERM": 143, "SIGUSR1": 75, "SIGINT": 130}
# torchrun has an exit code of its own. It hands on SIGTERM and SIGINT; SIGUSR1 ends it, and its ranks get SIGTERM.
LAUNCHERS = {"lightning": CODES, "torchrun": {"SIGTERM": 1, "SIGINT": 1, "SIGUSR1": -signal.SIGUSR1}}


def measure(full: bool, seed: int, folder: Path) -> Figure:
    acts = [
        (n, Act(rank, moment, name)) for n in range(1, 5) for rank in range(n) for moment in MOMENTS for name in CODES
    ]
    if not full:
        acts = [(2, Act(1, "validation", "SIGTERM")), (2, Act(0, "step", "SIGUSR1"))]
    random.Random(seed).shuffle(acts)  # so that a part of them is one of everything
    problems, steps = [], []
    for number, (ranks, act) in enumerate(acts):
        problem, late = one(folder / f"run{number}", ranks, act)
        steps.append(late)
        if problem:
            problems.append(f"{act} of {ranks}: {problem}")
    tried = len(acts)
    if full:
        for launcher, codes in LAUNCHERS.items():
            for name, code in codes.items():
                tried += 1
                problem = to_the_launcher(folder / f"{launcher}-{name}", launcher, name, code)
                if problem:
                    problems.append(f"{name} to {launcher}: {problem}")
    found = f"checkpoints {min(steps)} to {max(steps)} steps behind the signal; " + (
        "; ".join(problems) or "no process left"
    )
    return Figure(tried - len(problems), tried, found)


def one(folder: Path, ranks: int, act: Act) -> tuple[str, int]:
    """What is wrong with how a run ended, and how many steps behind the signal its checkpoint is."""
    run = RankRun(folder, ranks, act)
    done = run.wait()
    late = newest(folder) - acted(folder)["step"]
    return _problem(folder, [each.code for each in done], CODES[act.what], late, [each.err for each in done]), late


def _problem(folder: Path, found: list[int], expected: int, late: int, errors: list[str]) -> str:
    if found != [expected] * len(found):
        return f"exit codes {found}, expected {expected}"
    if not 0 <= late <= 2:
        return f"the checkpoint is {late} steps behind the signal"
    if any("Traceback" in text for text in errors):
        return f"a traceback: {errors}"
    return "" if gone(folder) else "processes were left"


def to_the_launcher(folder: Path, launcher: str, name: str, code: int) -> str:
    """What is wrong where the process that started the ranks gets the signal."""
    process = launched(folder, 2, Act(1, "step", "wait"), launcher)
    deadline = time.monotonic() + PATIENCE
    try:
        while not (folder / "acted").exists():
            assert process.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        (folder / "go").touch()
        found = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no end in {PATIENCE} s"
    finally:
        left = not gone(folder, PATIENCE if process.poll() is not None else 0)  # torchrun's ranks save without it
    late = newest(folder) - 2
    if found != code or not 0 <= late <= 2:
        return f"exit code {found}, expected {code}; the checkpoint is {late} steps behind the signal"
    return "processes were left" if left else ""
