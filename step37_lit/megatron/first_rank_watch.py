"""What rank 0 does in the watch of the ranks (`rank_watch`): it hears all of them, judges, and tells them."""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from dataclasses import asdict
from typing import Any

from step37_lit.megatron.rank_link import SEND_SECONDS, Link, listening_socket
from step37_lit.megatron.rank_verdict import Member, Position, Progress, Seen, Verdict, judge, places
from step37_lit.megatron.rank_watch import LINGER, RankWatch


class FirstRankWatch(RankWatch):
    """Rank 0: knows all ranks, judges, and tells the others."""

    def __init__(self, member: Member, progress: Progress, hang_timeout: float | None, world_size: int):
        super().__init__(member, progress, hang_timeout)
        self.world_size, self.token = world_size, secrets.token_hex(16)
        self._server = listening_socket(world_size)
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
