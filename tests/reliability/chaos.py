"""Faults of all kinds at random moments of one run, which is started again and must end as the straight one.

    python tests/reliability/chaos.py --seed 1 --hits 50 [--ranks 2]

Kills, signals, stops, damage to the newest checkpoint, a full disk. The same seed draws the same faults; how far a run
has come when one hits depends on the machine, too. Prints a line for each hit and the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from step37_lit.checkpoint.folder import list_checkpoints  # noqa: E402
from tests.forks import Child, Done  # noqa: E402
from tests.reliability.corruption import KINDS  # noqa: E402
from tests.reliability.figure import Figure  # noqa: E402
from tests.reliability.moments import AIMS, Moment  # noqa: E402
from tests.reliability.mounts import fill, refusal, tmpfs  # noqa: E402
from tests.reliability.runs import Place, compare, debris, make_set, phases_file, read_ledger  # noqa: E402

STEPS, HITS_OF_A_RUN = 42, 10
SIGNALS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "SIGUSR1": signal.SIGUSR1}
FAULTS = ["kill", "kill", *SIGNALS, "pause", "damage", "full disk"]
DISK = "size=40m"  # of a run: four checkpoints of 2.5 MB, and what else it writes
DEAD_PATIENCE = 60.0  # seconds that the ranks beside a dead one may take to end
PAUSE = 0.7  # seconds between SIGSTOP and SIGCONT


@dataclass
class Run:
    """A run that is being disturbed.

    Args:
        place: Where it is.
        ranks: Of data parallelism.
        draw: What is drawn.
        hits: How often each fault has hit.
        wrong: What was not as promised.
    """

    place: Place
    ranks: int
    draw: random.Random
    hits: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def disturb(self, times: int) -> None:
        """Starts it and hits it until it has been hit `times` times or comes to its end."""
        while self.hits.total() < times:
            children, begun, before = self._start()
            try:
                if not self._hit(children, begun, before):
                    return
            finally:
                for child in children:
                    child.kill()

    def _start(self) -> tuple[list[Child], int, int]:
        file = phases_file(self.place.ledger)
        before, begun = file.stat().st_size if file.exists() else 0, time.time_ns()
        return self.place.start_ranks(self.ranks), begun, before

    def _hit(self, children: list[Child], begun: int, before: int) -> bool:
        """One fault, or several of those that the run outlives; False where it came to its end."""
        fault = self.draw.choice(FAULTS)
        if fault == "full disk" and refusal() is not None:
            fault = "kill"
        moment = Moment.draw(self.draw, list(AIMS))
        moment.wait(self.place, children[0], begun, before)
        if not all(child.running for child in children):
            ends = [child.wait() for child in children]
            self._check(all(done.code == 0 for done in ends), f"an end of its own: {[done.err for done in ends]}")
            return False
        rank = self.draw.randrange(self.ranks)
        print(f"{fault} of rank {rank}, {moment.aim} {moment.number}, behind {self._steps()} steps", flush=True)
        self.hits[fault] += 1
        if fault == "pause":
            children[rank].send(signal.SIGSTOP)
            time.sleep(PAUSE)
            children[rank].send(signal.SIGCONT)
            return self._hit(children, begun, phases_file(self.place.ledger).stat().st_size)
        if fault in SIGNALS:
            children[rank].send(SIGNALS[fault])
            self._ended(children, fault)
        elif fault == "full disk":
            with fill(self.place.run):
                self._ended(children, fault)
        else:
            children[rank].kill()
            self._ended([child for i, child in enumerate(children) if i != rank], "death of another rank")
        if fault == "damage":
            self._damage()
        return True

    def _ended(self, children: list[Child], fault: str) -> None:
        """They end of themselves, and not as if nothing had been."""
        for child in children:
            child.process.join(DEAD_PATIENCE)
            if child.running:
                self.wrong.append(f"{fault}: no end in {DEAD_PATIENCE:.0f} s")
                child.kill()
                continue
            self._check_end(child.done(), fault)

    def _check_end(self, done: Done, fault: str) -> None:
        finished = f"reached     step {STEPS}:" in done.out  # the fault came when nothing was left to do
        self._check(done.code != 0 or finished, f"{fault}: exit code 0 at {self._steps()} steps")
        if fault == "full disk" and done.code != 0:
            lines = done.err.strip().splitlines()
            told = done.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
            self._check(told or self.ranks > 1, f"{fault}: exit code {done.code}: {done.err[-1500:]}")

    def _damage(self) -> None:
        """To a file of the newest checkpoint, where there is one before it."""
        good = [each for each in list_checkpoints(self.place.checkpoints) if each.manifest is not None]
        if len(good) < 2:
            return
        newest = good[0].path
        name = self.draw.choice(sorted(good[0].manifest.files))  # type: ignore[union-attr]
        kind = self.draw.choice(["flip", "truncate", "delete"])
        KINDS[kind](newest / name, self.draw)
        print(f"  {kind}: {newest.name}/{name}", flush=True)

    def _steps(self) -> int:
        lines = read_ledger(self.place.ledger)
        return lines[-1]["step"] if lines else 0

    def _check(self, condition: bool, problem: str) -> None:
        if not condition:
            self.wrong.append(problem)


def measure(full: bool, seed: int, folder: Path) -> Figure:
    if not full:
        return disturbed(folder, seed, hits=3, ranks=1)
    one = disturbed(folder / "one", seed, hits=60, ranks=1)
    two = disturbed(folder / "two", seed, hits=30, ranks=2)
    return Figure(one.good + two.good, one.tried + two.tried, f"one rank: {one.detail}; two: {two.detail}")


def disturbed(folder: Path, seed: int, hits: int, ranks: int) -> Figure:
    """Runs until so many faults have hit; `good` counts those of runs that ended as the straight one."""
    draw = random.Random(seed)
    data = make_set(folder)
    straight = Place.make(folder / "straight", data, STEPS)
    straight.finish(ranks=ranks)
    counts: Counter[str] = Counter()
    good, number, problems = 0, 0, []
    while counts.total() < hits:
        with _disk(folder / f"disk{number}") as disk:
            place = Place.make(folder / f"run{number}", data, STEPS, run=disk / "run")
            run = Run(place, ranks, draw)
            run.disturb(min(HITS_OF_A_RUN, hits - counts.total()))
            place.finish(ranks=ranks)
            wrong = [*run.wrong, *compare(straight, place, STEPS, ranks), *debris(place.run)]
        counts, good, number = counts + run.hits, good + (0 if wrong else run.hits.total()), number + 1
        problems += wrong[:3]
        print(f"run {number}: {run.hits.total()} hits, {wrong or 'ended as the straight one'}", flush=True)
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    outcome = "; ".join(problems) or "ledger, metrics.csv, weights and moments bit-equal, nothing left behind"
    return Figure(good, counts.total(), f"{kinds}; {number} runs of {STEPS} steps; {outcome}")


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A small disk for the run's folder where one can be mounted."""
    folder.mkdir()
    with tmpfs(folder, DISK) if refusal() is None else contextlib.nullcontext():
        yield folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hits", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    if (reason := refusal()) is not None:
        print(f"without full disks: {reason}")
    with tempfile.TemporaryDirectory() as name:
        figure = disturbed(Path(name), options.seed, options.hits, options.ranks)
    print(f"seed {options.seed}: {figure.good} of {figure.tried} hits; {figure.detail}")
    return 0 if figure.good == figure.tried else 1


if __name__ == "__main__":
    sys.exit(main())
