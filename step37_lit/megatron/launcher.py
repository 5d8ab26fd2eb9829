"""Starts the other ranks of this machine, and ends with the exit code that was asked for.

Lightning's own launcher has a thread that kills every process five seconds after one of them ended with an exit code,
its signal handlers broadcast in the middle of a step, and its processes outlive the one that started them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from step37_lit import signals
from step37_lit.exit_codes import RANK_LOST
from step37_lit.signals import Stop, Stopped

PARENT = "STEP37_LAUNCHER_PID"
PATIENCE = 60.0  # seconds that the other ranks have behind the end of this one
POLL_SECONDS, GRACE = 0.5, 5.0
PR_SET_PDEATHSIG = 1


class RankLauncher(_SubprocessScriptLauncher):
    """Runs a Trainer's function on all ranks; a signal ends it by agreement, and then the process with its exit code.

    Where torchrun or SLURM has started the ranks, or there is one, no process is started.
    """

    @property
    def is_interactive_compatible(self) -> bool:
        return self.num_processes == 1

    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """See Lightning's.

        Raises:
            Stopped: a signal has ended the function on all ranks.
        """
        assert trainer is not None
        trainer._signal_connector = _NoHandlers(trainer)
        trainer.strategy.stop = Stop.NONE  # type: ignore[attr-defined]
        with signals.listening():
            self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
            if self.cluster_environment.creates_processes_externally:
                end_with_parent()
            elif signals.requested():  # nobody else is there yet
                raise Stopped(signals.requested())
            elif self.num_processes > 1:
                os.environ[PARENT] = str(os.getpid())
                self._call_children_scripts()
                del os.environ[PARENT]
                atexit.register(_wait_for, self.procs)
                threading.Thread(target=self._observe, args=(trainer.strategy,), daemon=True).start()
            _set_num_threads_if_needed(num_processes=self.num_processes)
            result = function(*args, **kwargs)
            stop = trainer.strategy.stop  # type: ignore[attr-defined]
            if stop:
                raise Stopped(stop)
            return result

    def _observe(self, strategy: Any) -> None:
        """Until the ranks watch each other: this one would wait for one that has ended while it started."""
        ended: list[subprocess.Popen] = []
        while not ended:
            time.sleep(POLL_SECONDS)
            if strategy.watching:
                return
            ended = [process for process in self.procs if process.poll()]
        time.sleep(GRACE)  # this one may have the same error
        number = 1 + self.procs.index(ended[0])
        code = ended[0].returncode
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        text = f"error: local rank {number} (pid {ended[0].pid}) has ended with {how} before all ranks were there\n"
        os.write(2, text.encode())
        signals.end_process(code if code > 0 else RANK_LOST)


class _NoHandlers(_SignalConnector):
    """Lightning's would take SIGTERM, and SIGUSR1 under SLURM."""

    def register_signal_handlers(self) -> None:
        self.received_sigterm = False


def end_with_parent() -> None:
    """This process gets a signal when the one that started it ends: SIGKILL where that was the first rank, SIGTERM
    where it was torchrun, so that the ranks can still save."""
    if sys.platform != "linux":
        return
    first_rank = os.environ.get(PARENT)
    if first_rank is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    number = signal.SIGTERM if first_rank is None else signal.SIGKILL
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number))
    if first_rank is not None and os.getppid() != int(first_rank):  # it has ended already
        os.kill(os.getpid(), number)


def _wait_for(processes: list[subprocess.Popen]) -> None:
    """The first rank is the last one to end: the others end when it does."""
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            print(f"process {process.pid} has not ended in {PATIENCE:g} s and is killed", file=sys.stderr)
            process.kill()
