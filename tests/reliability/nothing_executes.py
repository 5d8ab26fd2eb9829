"""Code that is planted in every file and option that is read: it does not run, and nothing is written elsewhere.

What is planted makes a folder of a given name where it runs; `payloads.controls` shows that it does so where it is let.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from tests import forks
from tests.reliability import payloads, plants
from tests.reliability.bad_input import snapshot
from tests.reliability.figure import Figure

MARKER = "executed"  # beside the folder that the command runs in


def measure(full: bool, seed: int, folder: Path) -> Figure:
    # Nothing is drawn at random here, so that the seed changes nothing.
    controls = payloads.controls(folder / "controls")
    made = plants.make(folder / "made")
    cases = plants.cases()
    if not full:
        cases = [case for case in cases if case.short]
    wrong, refused = [], 0
    for case in cases:
        problem, code = _problem(case, folder / "case", made)
        refused += code == 2
        if problem is not None:
            wrong.append(f"{case.kind}, {case.name}: {problem}")
            print(wrong[-1], flush=True)
    kinds = ", ".join(f"{number} {kind}" for kind, number in Counter(case.kind for case in cases).items())
    told = f"{refused} refused in one line, {len(cases) - refused} read without harm; {controls} controls do run"
    return Figure(len(cases) - len(wrong), len(cases), f"{kinds}; {told}")


def _problem(case: plants.Case, folder: Path, made: Path) -> tuple[str | None, int]:
    """What is not as promised, and the exit code. The command may write below `new`, and nowhere else."""
    work, marker = folder / "work", folder / MARKER
    work.mkdir(parents=True)
    for name in case.copied:
        source = made / name
        shutil.copytree(source, work / name) if source.is_dir() else shutil.copy2(source, work / name)
    case.prepare(work, marker)
    places = {"{made}": str(made), "{marker}": str(marker)}
    args = [_filled(argument, places) for argument in case.args]
    before = snapshot(folder), snapshot(made)
    done = forks.call(here, args, cwd=work, log=folder.with_name("log"))
    changed = dict(snapshot(folder).items() ^ before[0].items()) | dict(snapshot(made).items() ^ before[1].items())
    outside = sorted(path for path in changed if not Path(path).is_relative_to(work / "new") and path != str(work))
    ran = marker.exists()
    shutil.rmtree(folder)
    problem = None
    if ran:
        problem = f"EXECUTED: {done.out}{done.err}"
    elif outside:
        problem = f"written outside: {outside[:4]}"
    elif done.code not in case.codes or (done.code == 2 and not _one_line(done.err)):
        problem = f"exit code {done.code}: {(done.err or done.out)[-900:]}"
    return problem, done.code


def _one_line(err: str) -> bool:
    return err.startswith("error: ") and len(err.splitlines()) == 1


def _filled(argument: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        argument = argument.replace(name, place)
    return argument


def here(args: list[str]) -> int:
    """The command in this process, with modules of the working folder in reach, as behind `python -m`."""
    sys.path.insert(0, os.getcwd())
    return forks.command(args)
