"""Signals as requests, in processes that import nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step37_lit import signals
from step37_lit.signals import Stop

ROOT = Path(__file__).parents[1]
# The main thread is in a lock's C code, as it would be in a collective: no handler of Python's would run there.
BLOCKED = """
import ctypes, os
from step37_lit import signals
signals.listen()
print("ready", flush=True)
semaphore = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)
libc.sem_init(semaphore, 0, 0)
while True:
    libc.sem_wait(semaphore)  # ends with each signal, and is in C again before Python has seen it
"""


def process(code: str) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOCAL_RANK": "0"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **streams)  # type: ignore[call-overload]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 75)])
def test_the_second_signal_ends_a_process_whose_main_thread_is_blocked(name: str, code: int) -> None:
    with process(BLOCKED) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            child.send_signal(signal.Signals[name])
            assert child.stderr is not None
            told = child.stderr.readline()
            assert told.startswith(f"{name}: the run ends behind this step") and child.poll() is None
            deadline = time.monotonic() + 60
            while child.poll() is None and time.monotonic() < deadline:
                child.send_signal(signal.Signals[name])
                time.sleep(0.1)
        finally:
            child.kill()
        assert child.wait() == code


def test_one_request_may_come_twice_and_the_largest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal signals a process and its group; SIGTERM may follow SIGUSR1 when SLURM's time is over."""
    now = [100.0]
    ended: list[int] = []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals, "end_process", ended.append)
    with signals.listening():
        listener = signals._listener
        assert listener is not None and signals.requested() == Stop.NONE
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            listener._note(number)
        assert signals.requested() == Stop.TERMINATE and ended == []
        now[0] += 2 * signals.SAME_REQUEST
        listener._note(signal.SIGINT)
        assert signals.requested() == Stop.TERMINATE and ended == []
        listener._note(signal.SIGUSR1)
        assert ended == [75]
    assert signals.requested() == Stop.NONE


def test_handlers_are_put_back_and_those_of_others_left_alone() -> None:
    def own(number: int, frame: object) -> None:
        seen.append(number)

    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, own)
    try:
        with signals.listening():
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, own)
            os.kill(os.getpid(), signal.SIGUSR1)
            with signals.listening():  # the one within adds nothing, and ends nothing
                pass
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        assert seen == [signal.SIGUSR1] and signals.requested() == Stop.NONE
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL and signal.getsignal(signal.SIGUSR1) == own
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGUSR1, before)


def _look(queue: multiprocessing.Queue) -> None:
    queue.put((signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, os.getpgid(0) == os.getpid(), signals.requested()))


def test_a_forked_process_is_not_asked() -> None:
    """A loader's process is out of the process group that a terminal or SLURM signals, and can be terminated."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with signals.listening():
        child = context.Process(target=_look, args=(queue,))
        child.start()
        assert queue.get(timeout=60) == (True, True, Stop.NONE)
        child.join(60)
    assert child.exitcode == 0
