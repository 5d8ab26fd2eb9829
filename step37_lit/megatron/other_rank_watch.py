"""What the ranks but the first one do in the watch (`rank_watch`)."""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import asdict
from typing import Any

from step37_lit.megatron.rank_link import Link
from step37_lit.megatron.rank_verdict import Member, Position, Progress, Seen, place
from step37_lit.megatron.rank_watch import RankWatch

CONNECT_SECONDS = 60.0


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
