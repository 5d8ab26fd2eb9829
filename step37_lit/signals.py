"""SIGINT, SIGTERM and SIGUSR1 as requests to end: what asks is noted here, the ranks agree on it between two steps.

Nothing happens within a signal's handler. Python writes the number of each signal into a pipe, which a thread reads, so
a request is noted also while the main thread waits in a collective. The same signal a second time ends the process at
once, wherever it is.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from enum import IntEnum
from types import FrameType
from typing import Any

from step37_lit.exit_codes import INTERRUPTED, REQUEUE, TERMINATED, USER_ERROR

# A terminal, `timeout` or a launcher may send one request to a process and to its group.
SAME_REQUEST = 1.0  # seconds


class Stop(IntEnum):
    """Why a run ends before its end. Where ranks have different reasons, the largest one counts for all."""

    NONE = 0
    SAVE_FAILED = 1
    REQUEUE = 2
    INTERRUPT = 3
    TERMINATE = 4

    @property
    def exit_code(self) -> int:
        return (0, USER_ERROR, REQUEUE, INTERRUPTED, TERMINATED)[self]


REQUESTS = {signal.SIGUSR1: Stop.REQUEUE, signal.SIGINT: Stop.INTERRUPT, signal.SIGTERM: Stop.TERMINATE}


class Stopped(SystemExit):
    """A signal has ended the run on all ranks alike. Uncaught, it ends a script with the signal's exit code."""

    def __init__(self, stop: Stop):
        super().__init__(stop.exit_code)
        self.stop = stop


class _Listener:
    """Takes the signals of `REQUESTS` from where it is made until `close`."""

    def __init__(self) -> None:
        self.stop = Stop.NONE
        self.over = False  # all has been agreed on: more signals change nothing
        self._first: dict[signal.Signals, float] = {}  # when each signal came
        self._handlers: dict[signal.Signals, Any] = {}  # that were there before
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in REQUESTS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._handlers[number] = signal.signal(number, _taken_by_the_thread)
        threading.Thread(target=self._read, args=(reader,), name="signals", daemon=True).start()

    def _read(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in self._handlers and not self.over:
                    self._note(signal.Signals(number))
        os.close(reader)

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number not in self._first:
            self._first[number] = now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                text = (
                    f"{number.name}: the run ends behind this step or batch, a second {number.name} ends it at once\n"
                )
                os.write(2, text.encode())
        elif now - self._first[number] > SAME_REQUEST:
            end_process(REQUESTS[number].exit_code)
        self.stop = max(self.stop, REQUESTS[number])

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup_fd)
        os.close(self._writer)  # the thread ends with it
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


_listener: _Listener | None = None


def listen() -> bool:
    """Notes signals from now on, until the process ends.

    Handlers of the program's own are left alone. Outside of the main thread, where Python knows no handlers, nothing is
    done.

    Returns:
        Whether this call has begun it.
    """
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        return False
    _listener = _Listener()
    atexit.register(_ignore)
    return True


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """`listen` for the length of a block; adds nothing where that has begun before."""
    begun = listen()
    try:
        yield
    finally:
        if begun:
            _close()


def requested() -> Stop:
    """What signals to this process have asked for so far."""
    return _listener.stop if _listener is not None else Stop.NONE


def over() -> None:
    """The run has ended as it was asked to: further signals do not cut off what is left to write."""
    if _listener is not None:
        _listener.over = True


def _taken_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Has to be there, so that Python takes the signal at all."""


def _ignore() -> None:
    """While Python shuts down, which restores the handlers, a signal must not change the exit code any more."""
    if _listener is not None:
        for number in REQUESTS:
            signal.signal(number, signal.SIG_IGN)


def _close() -> None:
    global _listener
    assert _listener is not None
    atexit.unregister(_ignore)
    _listener.close()
    _listener = None


def _in_child() -> None:
    """A process that was forked, such as a loader's, is not asked: signals to the process group of a terminal or a job
    must not end it while a step still needs it."""
    if _listener is not None:
        _close()
        os.setpgid(0, 0)


os.register_at_fork(after_in_child=_in_child)


def end_process(exit_code: int) -> None:
    """Ends this process and its loaders' at once, from any thread; nothing is cleaned up."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(exit_code)
