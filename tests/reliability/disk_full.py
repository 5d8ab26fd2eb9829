"""A full or read-only disk at each stage: one line, the checkpoint before is intact, nothing is left behind."""

from __future__ import annotations

import contextlib
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from step37_lit.checkpoint.folder import list_checkpoints
from step37_lit.checkpoint.manifest import MANIFEST, verify
from step37_lit.hub.importing import import_hub
from tests import forks, shard_sets
from tests.hub_folders import every_feature, write_hub
from tests.reliability.figure import Figure
from tests.reliability.moments import Moment
from tests.reliability.mounts import fill, make_read_only, read_only_view, refusal, tmpfs
from tests.reliability.runs import Place, compare, debris, fit, make_set, phases_file
from tests.sharding import make_source

STEPS, EVERY, FIRST = 21, 3, 3
DISK = "size=24m"
SMALLEST = 1_000  # bytes; below this the process could not even write its line into a file
LEFT = (0, 3_000, 60_000, 500_000, 900_000, 1_700_000, 2_400_000)  # bytes, of a checkpoint of 2.5 MB


def measure(full: bool, seed: int, folder: Path) -> Figure:
    draw = random.Random(seed)
    data = make_set(folder)
    straight = Place.make(folder / "straight", data, STEPS, every=EVERY)
    straight.finish()
    rows = Rows(folder, straight, data)
    sizes = {path.stat().st_size for path in straight.run.rglob("*") if path.is_file()}
    limits = sorted(size - 1 for size in sizes if size > SMALLEST)
    for limit in limits if full else limits[-1:]:
        rows.limited(limit)
    if refusal() is None:
        for left in LEFT if full else LEFT[4:5]:
            for aim in ("load", "step", "save") if full else ("save",):
                rows.filled(left, Moment(aim, draw.randint(1, 2), draw.random()))
        rows.read_only(resumed=True)
        for resumed in (False, True) if full else ():
            rows.read_only(resumed)
            rows.read_only_meanwhile(Moment("step" if resumed else "save", 1, draw.random()))
    if full:
        _commands(rows)
    skipped = "" if refusal() is None else f"; full and read-only disks not tried: {refusal()}"
    wrong = (
        "; ".join(rows.wrong) or "one line, exit code 2, the checkpoint before as it was, nothing left behind, goes on"
    )
    kinds = ", ".join(f"{number} {name}" for name, number in rows.kinds.items())
    stages = ", ".join(f"{name} {number}" for name, number in rows.stages.most_common())
    return Figure(rows.tried - len(rows.wrong), rows.tried, f"{kinds}{skipped}; hit: {stages}; {wrong}")


class Rows:
    """Cases of a run that has a checkpoint and goes on where the disk does not let it."""

    def __init__(self, folder: Path, straight: Place, data: Path):
        self.folder, self.straight, self.data = folder, straight, data
        self.kinds: Counter[str] = Counter()
        self.stages: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.late = 0
        self.first = Place.make(folder / "first", data, STEPS, every=EVERY)
        self.first.finish(f"--trainer.max_steps={FIRST}")

    @property
    def tried(self) -> int:
        return self.kinds.total()

    def limited(self, limit: int) -> None:
        """No file may be larger than `limit` bytes."""
        with self._case("file sizes") as place:
            child = forks.Child(_limited_fit, (limit, str(place.recipe), str(place.ledger)), place.folder, _log(place))
            self._check(place, child.wait(), f"files of at most {limit} bytes")

    def filled(self, left: int, moment: Moment) -> None:
        """The disk is filled up but for `left` bytes at a moment of the run."""
        with self._case("full disks", DISK) as place:
            child = self._started(place, moment)
            with fill(place.run.parent, left):
                done = child.wait()
            if f"reached     step {STEPS}" in done.out and done.code == 0:
                self.kinds["full disks"] -= 1  # too late: the run had ended
                self.late += 1
                return
            self._check(place, done, f"{left} bytes left at a {moment.aim}")

    def read_only(self, resumed: bool) -> None:
        """The run's folder cannot be written to from the beginning; root's permissions do not help it."""
        with self._case("read-only disks", DISK) as place:
            if not resumed:
                shutil.rmtree(place.run)
            make_read_only(place.run.parent)
            done = place.start().wait()
            make_read_only(place.run.parent, False)
            if not resumed:
                shutil.copytree(self.first.run, place.run)
            self._check(place, done, f"read-only, {'resumed' if resumed else 'new'}")

    def read_only_meanwhile(self, moment: Moment) -> None:
        """Files that are open can be written, new ones cannot."""
        with self._case("read-only disks", DISK) as place:
            child = self._started(place, moment)
            with read_only_view(place.run):
                done = child.wait()
            self._check(place, done, f"read-only from a {moment.aim} on", removable=False)

    @contextlib.contextmanager
    def _case(self, kind: str, disk: str | None = None) -> Iterator[Place]:
        folder = self.folder / f"case{self.tried + self.late}"
        self.kinds[kind] += 1
        with (
            tmpfs(self.folder / f"{folder.name}-disk", disk) if disk else contextlib.nullcontext(folder / "disk") as on
        ):
            place = Place.make(folder, self.data, STEPS, run=on / "run", every=EVERY)
            shutil.copytree(self.first.run, place.run)
            shutil.copy(self.first.ledger, place.ledger)
            yield place
        shutil.rmtree(folder)

    def _started(self, place: Place, moment: Moment) -> forks.Child:
        file = phases_file(place.ledger)
        before, begun = file.stat().st_size if file.exists() else 0, time.time_ns()
        child = place.start()
        moment.wait(place, child, begun, before)
        return child

    def _check(self, place: Place, done: forks.Done, case: str, removable: bool = True) -> None:
        """And goes on when there is room again.

        Args:
            place: The run.
            done: How it ended.
            case: What it is called.
            removable: Whether it could clear up behind itself; else the run that goes on does.
        """
        lines = done.err.splitlines()
        problems = []
        if done.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
            problems.append(f"exit code {done.code}, {len(lines)} lines: {done.err[-1500:]}")
        elif ".part/" in lines[0] and "needs " not in lines[0]:
            problems.append(f"no bytes needed: {lines[0]}")
        else:
            self.stages[_stage(lines[0])] += 1
        manifest = self.first.checkpoints / f"step_{FIRST:06d}" / MANIFEST
        good = [each.path for each in list_checkpoints(place.checkpoints) if each.manifest is not None]
        of_first = [path / MANIFEST for path in good if path.name == manifest.parent.name]  # it may have been replaced
        if not good or any(path.read_text() != manifest.read_text() for path in of_first):
            problems.append(f"the checkpoint before is not there, or another one: {good}")
        for path in good:
            verify(path)
        if not removable:
            place.finish()
        left = debris(place.run)
        halves = [each.path.name for each in list_checkpoints(place.checkpoints) if each.manifest is None]
        if left or halves:
            problems.append(f"left behind: {left} {halves}")
        if removable:
            place.finish()
        problems += compare(self.straight, place, STEPS)
        if problems:
            self.wrong.append(f"{case}: {problems[0]}")
            print(self.wrong[-1], flush=True)

    def command(self, case: str, done: forks.Done, kept: dict[str, int], folder: Path) -> None:
        """Of another command: a line, and nothing that was not there before."""
        self.kinds["other commands"] += 1
        lines = done.err.splitlines()
        problems = []
        if done.code != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
            problems.append(f"exit code {done.code}: {done.out[-500:]} {done.err[-1500:]}")
        if (now := _files(folder)) != kept:
            problems.append(f"left behind: {sorted(now.keys() ^ kept.keys())}")
        if problems:
            self.wrong.append(f"{case}: {problems[0]}")
            print(self.wrong[-1], flush=True)


def _stage(line: str) -> str:
    """The file that the line names, without where it is."""
    if "free on the disk" in line:
        return "the check before a save"
    named = next((word for word in line.split() if word.endswith(":") and "/" in word and ".yaml" not in word), "none")
    return Path(named.rstrip(":")).name


def _limited_fit(limit: int, recipe: str, ledger: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return fit(recipe, ledger)


def _limited_command(limit: int, args: list[str]) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return forks.command(args)


def _log(place: Place) -> Path:
    return place.folder / "limited"


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def _commands(rows: Rows) -> None:
    """Import, export, shards and their index, with a limit that a file of each reaches, and on a read-only disk."""
    folder = rows.folder / "commands"
    write_hub(folder / "hub", every_feature())
    import_hub(folder / "hub", folder / "ckpt")
    source = make_source(folder / "source")
    shard_sets.write_shards(folder / "set", range(40))
    commands = {
        "import": ["convert", "import", "--hub", str(folder / "hub"), "--output", "new"],
        "export": ["convert", "export", "--checkpoint", str(folder / "ckpt"), "--output", "new"],
        "shard": ["shard", str(source), "new", "--workers", "1"],
        "index": ["index", "set", "--workers", "1"],
    }
    limits = {
        "import": (100, 5_000, 100_000),
        "export": (100, 5_000, 100_000),
        "shard": (100, 5_000),
        "index": (100, 3_000),
    }
    for name, command in commands.items():
        for limit in limits[name]:
            _command(rows, folder, f"{name}{limit}", command, limit)
        if refusal() is None:
            _command(rows, folder, f"{name} read-only", command, None)


def _command(rows: Rows, folder: Path, case: str, command: list[str], limit: int | None) -> None:
    work, logs = folder / case / "work", folder / case
    with tmpfs(work, DISK) if limit is None else contextlib.nullcontext():
        work.mkdir(parents=True, exist_ok=True)
        if "index" in command:
            shutil.copytree(folder / "set", work / "set")
        kept = _files(work)
        if limit is None:
            make_read_only(work)
            done = forks.call(forks.command, command, cwd=work, log=logs / "log")
            make_read_only(work, False)
        else:
            done = forks.call(_limited_command, limit, command, cwd=work, log=logs / "log")
        if {"shard", "export"} & set(command[:2]):  # of which a second call goes on
            kept = _files(work)
            assert not [name for name in kept if name.endswith((".tmp", ".part"))], kept
        rows.command(case, done, kept, work)
