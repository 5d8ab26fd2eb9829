"""kill -9 at a random moment, and the same command again: nothing of the run is lost, and no step is another one."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

from tests.forks import PATIENCE
from tests.reliability.atomic_save import SAVING
from tests.reliability.figure import Figure
from tests.reliability.runs import LOADING, STEP, VALIDATION, Place, compare, debris, make_set, phases_file

STEPS, KILLS_OF_A_RUN = 42, 8
AIMS = {"step": STEP, "validation": VALIDATION, "load": LOADING, "save": b""}
LONGEST = {"step": 0.02, "validation": 0.05, "load": 0.3, "save": 0.03}  # seconds that one takes on a quiet machine


def measure(full: bool, seed: int, folder: Path) -> Figure:
    times, draw = 50 if full else 3, random.Random(seed)
    data = make_set(folder)
    straight = Place.make(folder / "straight", data, STEPS)
    straight.finish()
    hits: Counter[str] = Counter()
    good, problems, runs = 0, [], 0
    while hits.total() < times:
        place = Place.make(folder / f"run{runs}", data, STEPS)
        killed = _disturb(place, min(KILLS_OF_A_RUN, times - hits.total()), draw)
        place.finish()
        wrong = [*compare(straight, place, STEPS), *debris(place.run)]
        hits, good, runs = hits + killed, good + (0 if wrong else killed.total()), runs + 1
        problems += wrong[:3]
    where = ", ".join(f"{hits[aim]} in a {aim}" for aim in [*AIMS, "moment between"] if hits[aim])
    return Figure(good, hits.total(), f"{where}; {runs} runs of {STEPS} steps; {'; '.join(problems) or 'bit-equal'}")


def _disturb(place: Place, times: int, draw: random.Random) -> Counter[str]:
    """Kills a run up to `times` times; what it was doing when it was hit."""
    hits: Counter[str] = Counter()
    for number in range(times):
        aim = draw.choice(list(AIMS) if number else ["step", "validation", "save"])  # the first has nothing to load
        hit = kill(place, aim, draw)
        if hit is None:
            break
        hits[hit] += 1
    return hits


def kill(place: Place, aim: str, draw: random.Random) -> str | None:
    """Starts the run and kills it in a phase; what it was doing, or None where it came to its end before."""
    file = phases_file(place.ledger)
    before = file.stat().st_size if file.exists() else 0
    wanted = draw.randint(1, 6) if aim == "step" else 1
    begun, deadline = time.time_ns(), time.monotonic() + PATIENCE
    child = place.start()

    def reached() -> bool:
        if aim == "save":
            return saving(place, begun)
        return file.exists() and file.read_bytes()[before:].count(AIMS[aim]) >= wanted

    try:
        while child.running and not reached():
            assert time.monotonic() < deadline, f"no {aim} in {PATIENCE} s"
            time.sleep(0.001)
        time.sleep(draw.random() ** 2 * LONGEST[aim])
    finally:
        child.kill()
    if child.process.exitcode == 0:
        return None
    assert child.process.exitcode == -9, child.done().err
    if saving(place, begun):
        return "save"
    return {LOADING: "load", STEP: "step", VALIDATION: "validation"}.get(place.phase(), "moment between")


def saving(place: Place, since: int) -> bool:
    """Whether a save is or was under way that began behind `since` (ns); the next one removes what is older."""
    try:
        return any(path.stat().st_ctime_ns > since for path in place.checkpoints.glob(SAVING))
    except FileNotFoundError:  # it has just got its name
        return False
