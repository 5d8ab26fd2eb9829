"""Jobs spread over processes, their results in the order of the jobs, and a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from step37_lit.errors import ConfigError

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


@contextmanager
def results_in_order(
    function: Callable[[_Job], _Result], jobs: Sequence[_Job], workers: int
) -> Iterator[Iterator[_Result]]:
    """The results of `function` for each job, in order. Leaves no process behind.

    Args:
        function: Handed on by `fork`, so it need not be picklable; it must only read.
        jobs: Picklable, like the results.
        workers: Processes; 1 works in this one.

    Raises:
        ConfigError: a worker was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield map(function, jobs)
        return
    context = multiprocessing.get_context("fork")
    try:
        # All processes start with the first job, before the thread of a progress bar does.
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(function,)) as pool:
            futures = deque(pool.submit(_work, job) for job in jobs)
            try:
                yield (futures.popleft().result() for _ in jobs)
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise ConfigError("--workers", "processes that live to the end", "one that was killed (memory?)") from error


def progress_bar(show: bool, unit: str) -> Progress:
    """A bar on stderr that counts `unit`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not show)


_function: Callable[[Any], Any]  # of a worker


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a worker only reads: Ctrl-C ends it without an account of where
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = function


def _work(job: Any) -> Any:
    return _function(job)


def _end_with_parent() -> None:
    """A parent that was killed cannot tell its workers, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
