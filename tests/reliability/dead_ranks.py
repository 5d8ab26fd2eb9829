"""One of four ranks dies or hangs: the others end soon, and the first line on their standard error names it."""

from __future__ import annotations

import random
import time
from pathlib import Path

from step37_lit.exit_codes import RANK_LOST
from tests.forks import PATIENCE
from tests.reliability.figure import Figure
from tests.reliability.rank_runs import Act, RankRun, acted, gone, launched

RANKS, HANG_TIMEOUT = 4, 8.0
WITHIN = {"SIGKILL": 10.0, "raise": 10.0, "SIGSTOP": 1.5 * HANG_TIMEOUT, "loop": 1.5 * HANG_TIMEOUT}  # seconds
SAID = {
    "SIGKILL": "is dead: its connection broke",
    "raise": "has failed with ArithmeticError: raised on purpose",
    "SIGSTOP": f"has not answered for {HANG_TIMEOUT:g} s",
    "loop": "is stuck in ",
}
MOMENTS = ("loading", "step", "between", "validation", "captions")


def measure(full: bool, seed: int, folder: Path) -> Figure:
    acts = [Act(rank, moment, what) for rank in range(RANKS) for moment in MOMENTS for what in SAID]
    acts = [act for act in acts if (act.moment, act.what) != ("loading", "loop")]  # loading may take its time
    if not full:
        acts = [Act(2, "step", "SIGKILL"), Act(0, "validation", "SIGSTOP")]
    random.Random(seed).shuffle(acts)
    problems, slowest = [], dict.fromkeys(SAID, 0.0)
    for number, act in enumerate(acts):
        problem, seconds = one(folder / f"run{number}", act)
        slowest[act.what] = max(slowest[act.what], seconds)
        if problem:
            problems.append(f"{act}: {problem}")
    tried = len(acts)
    if full:
        for launcher in ("lightning", "torchrun"):
            for rank in range(RANKS):
                for what in ("SIGKILL", "SIGSTOP"):
                    tried += 1
                    problem = under(folder / f"{launcher}-{rank}-{what}", launcher, Act(rank, "step", what))
                    if problem:
                        problems.append(f"{what} of rank {rank} under {launcher}: {problem}")
    times = ", ".join(f"{seconds:.1f} s ({what})" for what, seconds in slowest.items() if seconds)
    return Figure(
        tried - len(problems), tried, f"the last one ended after {times}; {'; '.join(problems) or 'all named'}"
    )


def one(folder: Path, act: Act) -> tuple[str, float]:
    """What is wrong with how the others ended, and the seconds until the last one had."""
    run = RankRun(folder, RANKS, act, hang_timeout=HANG_TIMEOUT)
    others = [rank for rank in range(RANKS) if rank != act.rank]
    deadline = time.monotonic() + PATIENCE
    while any(run.children[rank].running for rank in others) and time.monotonic() < deadline:
        time.sleep(0.02)
    ended = time.time()
    done = run.wait(without=act.rank)
    seconds = ended - acted(folder)["time"]
    if [done[rank].code for rank in others] != [RANK_LOST] * len(others):
        return f"exit codes {[each.code for each in done]}", seconds
    told = [line for rank in others for line in done[rank].err.splitlines()]
    problem = _misnamed(told[:1], act) or ("" if len(told) == 1 else f"more than a line: {told}")
    if not problem and seconds > WITHIN[act.what]:
        problem = f"ended after {seconds:.1f} s"
    return problem or ("" if gone(folder) else "processes were left"), seconds


def _misnamed(told: list[str], act: Act) -> str:
    right = bool(told) and told[0].startswith(f"error: rank {act.rank} (") and SAID[act.what] in told[0]
    return "" if right else f"said {told}"


def under(folder: Path, launcher: str, act: Act) -> str:
    """The same where a launcher has started the ranks; it may print more behind the line."""
    process = launched(folder, RANKS, act, launcher, hang_timeout=HANG_TIMEOUT)
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    ended = time.time()
    left = not gone(folder, 30.0 if process.poll() is not None else 0.0)
    process.wait()
    if process.returncode == 0:
        return "exit code 0"
    seconds = ended - acted(folder)["time"]
    problem = _misnamed((folder / "err").read_text().splitlines()[:1], act)
    if not problem and seconds > WITHIN[act.what]:
        problem = f"ended after {seconds:.1f} s"
    return problem or ("processes were left" if left else "")
