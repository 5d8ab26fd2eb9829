"""A run that goes on with other numbers of data-parallel ranks in the middle of an epoch sees the same data."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

from tests.reliability.figure import Figure
from tests.reliability.runs import Place, make_set, read_ledger

SAMPLES, STEPS = 150, 24  # two epochs of about a dozen steps
RANKS = (1, 2, 4, 2)
TOLERANCE = 1e-5  # of the loss, relative


def measure(full: bool, seed: int, folder: Path) -> Figure:
    draw = random.Random(seed)
    data = make_set(folder, SAMPLES)
    straight = Place.make(folder / "straight", data, STEPS, every=100, validation=100)
    straight.finish()
    expected = read_ledger(straight.ledger)
    good, largest, schedules = 0, 0.0, 6 if full else 1
    for number in range(schedules):
        place = Place.make(folder / f"run{number}", data, STEPS, every=100, validation=100)
        ranks = RANKS if full else (2, 1)
        stops = [*sorted(draw.sample(range(1, STEPS), len(ranks) - 1)), STEPS]
        found = _elastic(place, list(zip(ranks, stops, strict=True)))
        keys = [line["keys"] for line in found] == [line["keys"] for line in expected]
        far = max(abs(_loss(a) / _loss(b) - 1) for a, b in zip(found, expected, strict=True))
        good += keys and far <= TOLERANCE
        largest = max(largest, far)
        print(f"ranks {ranks} up to steps {stops}: the same order {keys}, loss within {far:.1e}", flush=True)
    times = Counter(key for line in expected for pack in line["keys"] for key in pack)
    chain = " -> ".join(map(str, RANKS if full else (2, 1)))
    detail = (
        f"{chain} ranks, stops at random steps of {STEPS}; order of {times.total()} samples the same as one rank's, "
    )
    return Figure(good, schedules, detail + f"none lost or repeated; loss within {largest:.1e}")


def _elastic(place: Place, parts: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The ledger of a run of several parts, each with its number of ranks and its last step."""
    lines: list[dict[str, Any]] = []
    for ranks, stop in parts:
        place.finish(f"--trainer.max_steps={stop}", "--resume=auto", ranks=ranks)
        ledgers = [read_ledger(place.ledger_of(rank)) for rank in range(ranks)]
        for rank in range(4):  # each part in ledgers of its own
            place.ledger_of(rank).unlink(missing_ok=True)
        lines += [_joined(own) for own in zip(*ledgers, strict=True)]
    return lines


def _joined(ranks: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One step's line with the packs of all ranks in the global order; the ranks agree on the rest."""
    assert len({(line["step"], line["loss"], line["norm"], line["lr"]) for line in ranks}) == 1, ranks
    packs = [line["keys"][i] for i in range(len(ranks[0]["keys"])) for line in ranks]
    return {**ranks[0], "keys": packs}


def _loss(line: dict[str, Any]) -> float:
    return float.fromhex(line["loss"])
