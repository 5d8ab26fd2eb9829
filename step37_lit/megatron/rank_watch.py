"""The ranks of a run watch each other, so that one that died or hangs ends the run at once, and by its name.

    rank 1 ----.
    rank 2 ----+---- rank 0      a TCP connection each, kept by a thread of each rank
    rank 3 ----'

Each rank says every few seconds how far it has come. Rank 0 judges (`rank_verdict`) and tells all ranks; the lowest
living rank of each machine prints the verdict, and all end without waiting for the collective that they are in. Where
rank 0 itself is gone or silent, each rank finds that alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from step37_lit import signals
from step37_lit.exit_codes import RANK_LOST
from step37_lit.megatron.rank_verdict import Member, Position, Progress, Seen, Verdict, judge, place, places

LONGEST_INTERVAL = 5.0  # seconds between two reports of a rank
INTERVALS = 20  # in a time-out
CONNECT_SECONDS = 60.0
SEND_SECONDS = 1.0
LINGER = 10.0  # that rank 0, with which Lightning's processes end, gives the others to end
FAILED_SECONDS = 30.0  # that a rank which failed waits for what rank 0 says of it
LONGEST_LINE = 1 << 16  # bytes of a message
# What a collective raises on ranks whose peer has ended.
BROKEN = ("connection", "gloo", "nccl", "peer", "socket", "store")


class Link:
    """Messages over a connection: a line of JSON each."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._received = b""
        self._lock = threading.Lock()
        connection.settimeout(SEND_SECONDS)

    def send(self, **message: Any) -> None:
        """Drops it where the other side does not take it; what becomes of that side is found out otherwise."""
        with self._lock, contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that are there, None where the connection has ended. To be called when there is something."""
        try:
            data = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._received = (self._received + data).split(b"\n")
        if len(self._received) > LONGEST_LINE:
            return None
        return [json.loads(line) for line in lines]


class RankWatch:
    """One rank's part; see this file's top.

    Args:
        member: This rank.
        progress: How far it has come.
        hang_timeout: Seconds without an answer or progress; None watches only for ranks that end.
    """

    def __init__(self, member: Member, progress: Progress, hang_timeout: float | None):
        self.member, self.progress, self.hang_timeout = member, progress, hang_timeout
        patience = math.inf if hang_timeout is None else hang_timeout
        self.interval = min(LONGEST_INTERVAL, patience / INTERVALS)
        self._longest_pause = patience / 2
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._selector.register(self._wake_reader, selectors.EVENT_READ, None)
        self._released = threading.Event()
        self._closing = self._failing = False
        self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
        _open.add(self)

    def start(self) -> None:
        self._thread.start()

    def failed(self, error: BaseException) -> None:
        """Says that this rank ends with an error. Returns when it may: where another one's end is what it comes from,
        this process has ended before."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self._failing = True
        self._say_failed(text, any(word in str(error).lower() for word in BROKEN))
        self._released.wait(FAILED_SECONDS)

    def close(self) -> None:
        """This rank has nothing more to do with the others. Without effect behind `failed`."""
        if self._failing:
            return
        self._closing = True
        self._wake()
        self._thread.join(LINGER)

    def close_in_child(self) -> None:
        """A forked process must not keep the connections open: their end tells of this one's."""
        for connection in self._connections():
            connection.close()

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # a fault of the watch's own must not look like one of the rank's
            text = f"warning: {self.member} is watched no more: {type(error).__name__}: {error}\n"
            os.write(2, text.encode())
        if self._released.is_set():  # it fails by itself, and its end is to be seen from the connections' end
            return
        self._leave()
        for connection in self._connections():
            connection.close()
        self._selector.close()
        self._released.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closing:
            ready = [key for key, _ in self._selector.select(self._patience())]
            now = time.monotonic()
            if now - last > self._longest_pause:  # stopped itself, and others may have been, too
                self._forgive(now - last)
            last = now
            for key in ready:
                if key.data is None:
                    self._wake_reader.recv(64)
                else:
                    key.data(now)
            if not self._closing:
                self._turn(now)

    def _release(self) -> None:
        """Lets the main thread go on with its error, and nobody else's end matters any more."""
        self._closing = True
        self._released.set()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_writer.send(b"w")

    def _tell(self, line: str, speaks: bool, kills: int | None) -> None:
        """Prints the verdict and ends a process of this machine that does not answer, where this rank is to do it."""
        if speaks:
            os.write(2, f"error: {line}\n".encode())
        if kills is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(kills, signal.SIGKILL)

    def _end(self) -> None:
        """Ends this process: without waiting for the main thread, which is in a collective that never ends."""
        flushing = threading.Thread(target=sys.stdout.flush, daemon=True)  # whose lock the main thread may hold
        flushing.start()
        flushing.join(SEND_SECONDS)
        signals.end_process(RANK_LOST)

    def _connections(self) -> list[socket.socket]:
        return [self._wake_reader, self._wake_writer]

    def _patience(self) -> float:
        return self.interval

    def _say_failed(self, text: str, of_another: bool) -> None:
        raise NotImplementedError

    def _forgive(self, seconds: float) -> None:
        raise NotImplementedError

    def _turn(self, now: float) -> None:
        raise NotImplementedError

    def _leave(self) -> None:
        raise NotImplementedError


class FirstRankWatch(RankWatch):
    """Rank 0: knows all ranks, judges, and tells the others."""

    def __init__(self, member: Member, progress: Progress, hang_timeout: float | None, world_size: int):
        super().__init__(member, progress, hang_timeout)
        self.world_size, self.token = world_size, secrets.token_hex(16)
        self._server = _listening_socket(world_size)
        self.port: int = self._server.getsockname()[1]
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)
        self._links: dict[int, Link] = {}  # by rank
        self._strangers: set[socket.socket] = set()  # that have not said who they are
        self._seen: dict[int, Seen] = {0: Seen(member, time.monotonic())}
        self._told = 0.0

    def _connections(self) -> list[socket.socket]:
        of_ranks = [link.connection for link in self._links.values()]
        return [*super()._connections(), self._server, *of_ranks, *self._strangers]

    def _accept(self, now: float) -> None:
        connection, _ = self._server.accept()
        link = Link(connection)
        self._strangers.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda now: self._greet(link, now))

    def _greet(self, link: Link, now: float) -> None:
        """Takes a rank, which knows the token; anyone else is turned away."""
        try:
            messages = link.receive()
        except ValueError:
            messages = None
        if messages == []:
            return
        self._strangers.discard(link.connection)
        self._selector.unregister(link.connection)
        if messages is None or not isinstance(messages[0], dict) or messages[0].get("token") != self.token:
            link.connection.close()
            return
        member = Member(**messages[0]["member"])
        self._links[member.rank] = link
        self._seen[member.rank] = Seen(member, now, moved=now)
        self._selector.register(link.connection, selectors.EVENT_READ, lambda now: self._listen(member.rank, now))
        self._take(member.rank, messages[1:], now)

    def _listen(self, rank: int, now: float) -> None:
        messages = self._links[rank].receive()
        if messages is not None:
            self._take(rank, messages, now)
            return
        self._selector.unregister(self._links[rank].connection)
        self._links.pop(rank).connection.close()
        if self._seen[rank].state == "here":
            self._seen[rank].state = "dead"

    def _take(self, rank: int, messages: list[dict[str, Any]], now: float) -> None:
        seen = self._seen[rank]
        for message in messages:
            seen.hear(Position(**message["position"]), now)
            if "failed" in message:
                seen.fail(message["failed"], message["of_another"], now)
            if "bye" in message:
                seen.state = "left"

    def _say_failed(self, text: str, of_another: bool) -> None:
        self._seen[0].fail(text, of_another, time.monotonic())
        self._wake()

    def _patience(self) -> float:
        failing = any(each.state == "failed" for each in self._seen.values())
        return min(self.interval, 0.2) if failing else self.interval

    def _forgive(self, seconds: float) -> None:
        for each in self._seen.values():
            each.heard += seconds
            each.moved += seconds

    def _turn(self, now: float) -> None:
        own = self._seen[0]
        own.hear(self.progress.position(), now)
        verdict = judge(self._seen, now, self.hang_timeout)
        if verdict is not None:
            self._carry_out(verdict)
            return
        states = {each.state for each in self._seen.values()}
        if "failed" in states and "here" not in states:  # all have the same error, and each tells its own
            for link in self._links.values():
                link.send(release=True)
            self._release()
            return
        if now - self._told >= self.interval:
            self._told = now
            others = places([each for rank, each in self._seen.items() if rank != 0])
            for link in self._links.values():
                link.send(position=asdict(own.position), places=others)

    def _carry_out(self, verdict: Verdict) -> None:
        living = [each.member for each in self._seen.values() if each.state in ("here", "failed")]
        others = [member for member in living if member != verdict.culprit] or living
        speakers = {member.host: member.rank for member in sorted(others, key=lambda member: -member.rank)}
        culprit = verdict.culprit
        kills = culprit.pid if culprit is not None and verdict.kind == "silent" else None
        killer = speakers.get(culprit.host) if culprit is not None else None
        releases = culprit.rank if culprit is not None and verdict.kind == "failed" else None
        for rank, link in self._links.items():
            speaks, own_kill = rank in speakers.values(), kills if rank == killer else None
            if rank == releases:
                link.send(release=True)
            else:
                link.send(verdict=verdict.line, speaks=speaks, kills=own_kill)
        if releases == 0:
            self._release()
            return
        self._tell(verdict.line, speakers.get(self.member.host) == 0, kills if killer == 0 else None)
        self._linger()
        self._end()

    def _linger(self) -> None:
        """Until the others have ended: this process's end takes those with it that Lightning started."""
        deadline = time.monotonic() + LINGER
        while self._links and time.monotonic() < deadline:
            for key, _ in self._selector.select(SEND_SECONDS):
                if key.data not in (None, self._accept):
                    key.data(time.monotonic())

    def _leave(self) -> None:
        for link in self._links.values():
            link.send(bye=True)


class OtherRankWatch(RankWatch):
    """Every other rank: reports to rank 0 and does what it says.

    Args:
        first: Rank 0.
        address: Where rank 0's watch listens.
        port: Where rank 0's watch listens.
        token: What rank 0 knows its ranks by.
        speaks: Whether this rank is the one of its machine that prints what is wrong with rank 0.
    """

    def __init__(
        self,
        member: Member,
        progress: Progress,
        hang_timeout: float | None,
        first: Member,
        address: str,
        port: int,
        token: str,
        speaks: bool,
    ):
        super().__init__(member, progress, hang_timeout)
        self._speaks = speaks
        now = time.monotonic()
        self._first = Seen(first, now)
        self._places = ""
        self._link = Link(socket.create_connection((address, port), timeout=CONNECT_SECONDS))
        self._link.send(token=token, member=asdict(member))
        self._selector.register(self._link.connection, selectors.EVENT_READ, self._listen)

    def _connections(self) -> list[socket.socket]:
        return [*super()._connections(), self._link.connection]

    def _listen(self, now: float) -> None:
        messages = self._link.receive()
        if messages is None:
            self._lost("is dead: its connection broke", kills=False)
            return
        for message in messages:
            if "verdict" in message:
                self._tell(message["verdict"], message["speaks"], message["kills"])
                self._end()
            if "release" in message:
                self._release()
            if "bye" in message:
                self._closing = True
            if self._closing:
                return
            if "position" in message:
                self._first.hear(Position(**message["position"]), now)
                self._places = message["places"]

    def _report(self, **more: Any) -> None:
        self._link.send(position=asdict(self.progress.position()), **more)

    def _say_failed(self, text: str, of_another: bool) -> None:
        self._report(failed=text, of_another=of_another)

    def _forgive(self, seconds: float) -> None:
        self._first.heard += seconds

    def _turn(self, now: float) -> None:
        self._report()
        if self.hang_timeout is not None and now - self._first.heard >= self.hang_timeout:
            text = f"has not answered for {self.hang_timeout:g} s: it is stopped, or its machine hangs"
            self._lost(text, kills=True)

    def _lost(self, what: str, kills: bool) -> None:
        first = self._first.member
        near = kills and self._speaks and first.host == self.member.host
        line = f"{first} {what}; last seen in {place(self._first.position)}; {self._places}"
        self._tell(line, self._speaks, first.pid if near else None)
        self._end()

    def _leave(self) -> None:
        self._report(bye=True)


def _listening_socket(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be known and switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=backlog)


_open: weakref.WeakSet[RankWatch] = weakref.WeakSet()


def _in_child() -> None:
    for watch in _open:
        watch.close_in_child()


os.register_at_fork(after_in_child=_in_child)


def watch_ranks(
    member: Member,
    world_size: int,
    address: str,
    progress: Progress,
    hang_timeout: float | None,
    gather: Callable[[Any], list[Any]],
) -> RankWatch:
    """Begins to watch; collective.

    Args:
        member: This rank.
        world_size: Ranks.
        address: At which the others reach rank 0.
        progress: How far this rank has come.
        hang_timeout: See `RankWatch`.
        gather: A value of each rank on every rank.

    Raises:
        OSError: on all ranks where one cannot connect.
    """
    own: RankWatch | None = FirstRankWatch(member, progress, hang_timeout, world_size) if member.rank == 0 else None
    where: Mapping[str, Any] | None = None
    if isinstance(own, FirstRankWatch):
        where = {"address": address, "port": own.port, "token": own.token}
        own.start()
    told = gather((member, where))
    members, where = [each for each, _ in told], told[0][1]
    error = None
    if own is None:
        assert where is not None
        lowest = min(each.rank for each in members if each.host == member.host and each.rank > 0)
        try:
            own = OtherRankWatch(member, progress, hang_timeout, members[0], **where, speaks=lowest == member.rank)
            own.start()
        except OSError as found:
            error = f"rank {member.rank} on {member.host} cannot reach rank 0 at {address}:{where['port']}: {found}"
    errors = [each for each in gather(error) if each is not None]
    if errors:
        raise OSError(errors[0])
    assert own is not None
    return own
