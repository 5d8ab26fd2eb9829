"""Who is to blame when a run of several ranks stands still: from what each rank last said of itself.

dead      its connection broke: the process has ended
failed    it raised an error that others did not
silent    nothing has been heard of it for the time-out: it is stopped, or its machine hangs
stuck     it answers, but all ranks stand still, and it has come less far than the others
"""

from __future__ import annotations

import linecache
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

GRACE = 2.0  # seconds behind a rank's error in which others may turn out to have died, or to have the same error
STANDING = 1.0  # seconds at one mark behind which it is looked up where in the code that is
MOST_PLACES = 6  # in a line
DEBUGGERS = ("bdb.py", "pdb.py", "pydevd.py")
WAITING = (".wait(", "_engine_run_backward(", ".item()", ".tolist()", "synchronize(")  # innermost lines of Python


@dataclass(frozen=True)
class Member:
    """A rank; `role` is its place in the groups, such as "DP 1, PP 0"."""

    rank: int
    host: str
    pid: int
    role: str

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.role}; {self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Position:
    """How far a rank has come.

    Args:
        marks: Marks that it has passed; every rank passes the same ones.
        where: Such as "step 17 (forward and backward)".
        timed: Whether standing still here means anything. Loading and saving take as long as they take.
        line: Where its Python code stands; empty if unknown.
        waits: Whether that is a line in which it may wait for other ranks.
    """

    marks: int
    where: str
    timed: bool
    line: str = ""
    waits: bool = False


class Progress:
    """Marks that this process passes; the watching thread reads them."""

    def __init__(self) -> None:
        self._thread = threading.current_thread().ident
        self._at: tuple[int, str, bool, float] = (0, "start", False, time.monotonic())

    def mark(self, where: str, timed: bool = True) -> None:
        self._at = (self._at[0] + 1, where, timed, time.monotonic())

    @contextmanager
    def untimed(self, where: str) -> Iterator[None]:
        self.mark(where, timed=False)
        yield
        self.mark("between steps")

    def position(self) -> Position:
        marks, where, timed, since = self._at
        frame = sys._current_frames().get(self._thread or 0) if time.monotonic() - since > STANDING else None
        if frame is None:
            return Position(marks, where, timed)
        if any(Path(each.f_code.co_filename).name in DEBUGGERS for each in _stack(frame)):
            return Position(marks, f"a debugger, {where}", False)
        file, line = frame.f_code.co_filename, frame.f_lineno  # None between two lines
        code = linecache.getline(file, line) if line else ""
        waits = "/torch/distributed/" in file or any(call in code for call in WAITING)
        return Position(marks, where, timed, f"{Path(file).name}:{line} {frame.f_code.co_name}", waits)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


@dataclass
class Seen:
    """What is known of a rank: times are of this process's clock, in seconds."""

    member: Member
    heard: float
    position: Position = field(default_factory=lambda: Position(0, "start", False))
    moved: float = 0.0  # when its marks last changed
    state: Literal["here", "left", "failed", "dead"] = "here"
    failure: str = ""
    failed: float = 0.0
    of_another: bool = False  # the error is one that another rank's end gives

    def hear(self, position: Position, now: float) -> None:
        if position.marks != self.position.marks or not position.timed:
            self.moved = now
        self.heard, self.position = now, position

    def fail(self, failure: str, of_another: bool, now: float) -> None:
        self.state, self.failure, self.of_another, self.failed = "failed", failure, of_another, now


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end.

    Args:
        line: What is told.
        culprit: None where all ranks look alike.
        kind: See this file's top.
    """

    line: str
    culprit: Member | None
    kind: Literal["dead", "failed", "silent", "stuck"]


def judge(seen: Mapping[int, Seen], now: float, hang_timeout: float | None) -> Verdict | None:
    """The verdict on what has been seen until `now`, or None while nothing is wrong."""
    ranks = list(seen.values())
    for each in ranks:
        if each.state == "dead":
            return _verdict("dead", each, "is dead: its connection broke", seen)
    failed = sorted((each for each in ranks if each.state == "failed"), key=lambda each: (each.of_another, each.failed))
    here = [each for each in ranks if each.state == "here"]
    if failed and here and now - min(each.failed for each in failed) >= GRACE:
        return _verdict("failed", failed[0], f"has failed with {failed[0].failure}", seen)
    if failed or not here or hang_timeout is None:
        return None
    quiet = min(here, key=lambda each: each.heard)
    if now - quiet.heard >= hang_timeout:
        text = f"has not answered for {hang_timeout:g} s: it is stopped, or its machine hangs"
        return _verdict("silent", quiet, text, seen)
    if now - max(each.moved for each in here) >= hang_timeout:
        return _stuck(here, hang_timeout)
    return None


def _stuck(here: list[Seen], hang_timeout: float) -> Verdict:
    least = min(each.position.marks for each in here)
    behind = [each for each in here if each.position.marks == least]
    # Of several at the same mark, who does not wait there is who the others wait for.
    behind = [each for each in behind if not each.position.waits] or behind
    text = f"no rank has come further for {hang_timeout:g} s"
    if len(behind) == len(here):
        return Verdict(f"{text}: {places(here, with_code=True)}", None, "stuck")
    others = [each for each in here if each is not behind[0]]
    at = place(behind[0].position, with_code=True)
    line = f"{behind[0].member} is stuck in {at}: {text}; {places(others, with_code=True)}"
    return Verdict(line, behind[0].member, "stuck")


def _verdict(kind: Literal["dead", "failed", "silent"], one: Seen, text: str, seen: Mapping[int, Seen]) -> Verdict:
    others = [each for each in seen.values() if each is not one and each.state in ("here", "failed")]
    rest = f"; {places(others)}" if others else ""
    return Verdict(f"{one.member} {text}; last seen in {place(one.position)}{rest}", one.member, kind)


def places(seen: Sequence[Seen], with_code: bool = False) -> str:
    """Where ranks were last seen, those at one place together: "ranks 0, 1 in step 3 (optimizer)"."""
    at: dict[str, list[int]] = {}
    for each in sorted(seen, key=lambda each: each.member.rank):
        at.setdefault(place(each.position, with_code), []).append(each.member.rank)
    shown = [f"{ranks_text(ranks)} in {where}" for where, ranks in list(at.items())[:MOST_PLACES]]
    return ", ".join(shown) + (f", {len(at) - MOST_PLACES} places more" if len(at) > MOST_PLACES else "")


def place(position: Position, with_code: bool = False) -> str:
    return f"{position.where} at {position.line}" if with_code and position.line else position.where


def ranks_text(ranks: list[int]) -> str:
    """ "rank 3", or "ranks 0, 1, 2" and how many more."""
    shown = ", ".join(map(str, ranks[:8]))
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
