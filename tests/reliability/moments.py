"""Random moments of a run: within a step, a validation, a load or a save."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from tests.forks import PATIENCE, Child
from tests.reliability.runs import LOADING, STEP, VALIDATION, Place, phases_file

SAVING = ".step_??????.part"
AIMS = {"step": STEP, "validation": VALIDATION, "load": LOADING, "save": b""}
LONGEST = {"step": 0.02, "validation": 0.05, "load": 0.3, "save": 0.03}  # seconds that one takes on a quiet machine


@dataclass(frozen=True)
class Moment:
    """A moment of one start of a run.

    Args:
        aim: The phase.
        number: Which of its kind since the start, from 1.
        part: Of the phase's usual length that passes before the moment has come, 0 to 1.
    """

    aim: str
    number: int
    part: float

    @classmethod
    def draw(cls, draw: random.Random, aims: list[str]) -> Moment:
        aim = draw.choice(aims)
        return cls(aim, draw.randint(1, 6) if aim == "step" else 1, draw.random() ** 2)

    def wait(self, place: Place, child: Child, begun: int, before: int) -> None:
        """Until it has come, or the run has ended.

        Args:
            place: The run.
            child: A rank of it.
            begun: Time of its start (ns).
            before: Bytes of its phases file at that time.
        """
        file, deadline = phases_file(place.ledger), time.monotonic() + PATIENCE

        def reached() -> bool:
            if self.aim == "save":
                return saving(place, begun)
            return file.exists() and file.read_bytes()[before:].count(AIMS[self.aim]) >= self.number

        while child.running and not reached():
            assert time.monotonic() < deadline, f"no {self.aim} in {PATIENCE} s"
            time.sleep(0.001)
        time.sleep(self.part * LONGEST[self.aim])


def saving(place: Place, since: int) -> bool:
    """Whether a save is or was under way that began behind `since` (ns); the next one removes what is older."""
    try:
        return any(path.stat().st_ctime_ns > since for path in place.checkpoints.glob(SAVING))
    except FileNotFoundError:  # it has just got its name
        return False


def phase(place: Place, begun: int) -> str:
    """What a run that was killed was doing."""
    if saving(place, begun):
        return "save"
    last = place.phase()
    return next((aim for aim, byte in AIMS.items() if byte and byte == last), "moment between")
