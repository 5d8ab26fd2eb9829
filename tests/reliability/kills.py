"""kill -9 at a random moment, and the same command again: nothing of the run is lost, and no step is another one."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

from tests.reliability.figure import Figure
from tests.reliability.moments import AIMS, Moment, phase
from tests.reliability.runs import Place, compare, debris, make_set, phases_file

STEPS, KILLS_OF_A_RUN = 42, 8


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
        moment = Moment.draw(draw, list(AIMS) if number else ["step", "validation", "save"])  # nothing to load at first
        hit = kill(place, moment)
        if hit is None:
            break
        hits[hit] += 1
    return hits


def kill(place: Place, moment: Moment) -> str | None:
    """Starts the run and kills it; what it was doing, or None where it came to its end before."""
    file = phases_file(place.ledger)
    before, begun = file.stat().st_size if file.exists() else 0, time.time_ns()
    child = place.start()
    try:
        moment.wait(place, child, begun, before)
    finally:
        child.kill()
    if child.process.exitcode == 0:
        return None
    assert child.process.exitcode == -9, child.done().err
    return phase(place, begun)
