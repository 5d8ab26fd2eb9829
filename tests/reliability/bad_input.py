"""Malformed configs, shards, hub folders and checkpoints: one line, exit code 2, nothing written, soon."""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests import forks
from tests.reliability.figure import Figure

PROMISED = 5.0  # seconds


@dataclass(frozen=True)
class Case:
    """A command that must be refused.

    Args:
        kind: What is malformed.
        name: How.
        args: Of the command; `{made}` is the folder of what is good.
        words: What the line must have in it.
        prepare: Breaks something in the case's folder, which is the command's.
        copied: Names of what is good that lies in the case's folder before.
    """

    kind: str
    name: str
    args: tuple[str, ...]
    words: tuple[str, ...]
    prepare: Callable[[Path], object] | None = None
    copied: tuple[str, ...] = ()


def measure(full: bool, seed: int, folder: Path) -> Figure:
    from tests.reliability import bad_configs, bad_files

    made = bad_files.make(folder / "made")
    cases = [*bad_configs.cases(), *bad_files.cases()]
    if not full:
        cases = [case for number, case in enumerate(cases) if case.kind == "mistake" or number % 12 == 0]
    slowest: list[tuple[float, str]] = []
    wrong: list[str] = []
    for case in cases:
        problem, seconds = refused(case, folder / "case", made)
        slowest.append((seconds, f"{case.kind} {case.name}"))
        if problem is not None:
            wrong.append(f"{case.kind}, {case.name}: {problem}")
            print(wrong[-1], flush=True)
    slowest.sort(reverse=True)
    late = [f"{seconds:.1f} s for {name}" for seconds, name in slowest if seconds > PROMISED]
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(case.kind for case in cases).items())
    times = f"slowest {slowest[0][0]:.1f} s, median {slowest[len(slowest) // 2][0]:.1f} s (imports not counted)"
    if full and late:
        wrong += late
    return Figure(
        len(cases) - len(wrong), len(cases), f"{kinds}; {times}{'; late: ' + ', '.join(late) if late else ''}"
    )


def refused(case: Case, folder: Path, made: Path) -> tuple[str | None, float]:
    """What is not as promised, and the seconds that the command took."""
    work = folder / "work"
    work.mkdir(parents=True)
    for name in case.copied:
        source = made / name
        shutil.copytree(source, work / name) if source.is_dir() else shutil.copy2(source, work / name)
    if case.prepare is not None:
        case.prepare(work)
    before = snapshot(folder)
    args = [argument.format(made=made) for argument in case.args]
    log = folder.with_name(f"{folder.name}-log")
    done = forks.call(timed, args, str(log.with_suffix(".seconds")), cwd=work, log=log)
    seconds = float(log.with_suffix(".seconds").read_text())
    problem = _problem(case, done, before == snapshot(folder))
    shutil.rmtree(folder)
    return problem, seconds


def _problem(case: Case, done: forks.Done, unchanged: bool) -> str | None:
    lines = done.err.splitlines()
    if done.code != 2:
        return f"exit code {done.code}: {(done.err or done.out)[-400:]}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"{len(lines)} lines: {done.err[:600]}"
    if missing := [word for word in case.words if word not in lines[0]]:
        return f"{missing} not in: {lines[0]}"
    return None if unchanged else "something was written"


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def timed(args: list[str], file: str) -> int:
    """The command in this process, whose modules are imported already."""
    begun = time.perf_counter()
    try:
        return forks.command(args)
    finally:
        Path(file).write_text(str(time.perf_counter() - begun))
        sys.stdout.flush()
