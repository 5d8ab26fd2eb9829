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
import math
import os
import selectors
import signal
import socket
import sys
import threading
import time
import weakref
from abc import ABC, abstractmethod

from step37_lit import signals
from step37_lit.exit_codes import RANK_LOST
from step37_lit.megatron.rank_link import SEND_SECONDS
from step37_lit.megatron.rank_verdict import Member, Progress

LONGEST_INTERVAL = 5.0  # seconds between two reports of a rank
INTERVALS = 20  # in a time-out
LINGER = 10.0  # that rank 0, with which Lightning's processes end, gives the others to end
FAILED_SECONDS = 30.0  # that a rank which failed waits for what rank 0 says of it
# What a collective raises on ranks whose peer has ended.
BROKEN = ("connection", "gloo", "nccl", "peer", "socket", "store")


class RankWatch(ABC):
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

    @abstractmethod
    def _say_failed(self, text: str, of_another: bool) -> None:
        """Tells rank 0 of this rank's error; from the main thread."""

    @abstractmethod
    def _forgive(self, seconds: float) -> None:
        """Takes a pause of this process's own from the time that others were silent."""

    @abstractmethod
    def _turn(self, now: float) -> None:
        """What is to be done every interval."""

    @abstractmethod
    def _leave(self) -> None:
        """Says that this rank goes."""


_open: weakref.WeakSet[RankWatch] = weakref.WeakSet()


def _in_child() -> None:
    for watch in _open:
        watch.close_in_child()


os.register_at_fork(after_in_child=_in_child)
