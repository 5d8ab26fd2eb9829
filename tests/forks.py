"""Processes forked from one that has imported torch, Lightning and megatron already, which takes ten seconds.

The server is Python's own (`multiprocessing`, start method `forkserver`); it ends with the process that started it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = ["step37_lit.cli", "datamodules.packed", "datamodules.shards.index_build", "step37_lit.hub.exporting"]
PATIENCE = 300.0  # seconds, of a run of a tiny model on a busy machine

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the server takes it over, before it imports torch
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Done:
    """How a process ended: its exit code, negative for a signal, and what it wrote."""

    code: int
    out: str
    err: str


class Child:
    """A function in a process of its own, its output in `log.out` and `log.err`.

    Args:
        function: Of a module; what it returns is the exit code (None is 0).
        args: Its arguments.
        cwd: Where it runs.
        log: Files without their suffixes.
        environment: Variables that are set for it.
    """

    def __init__(
        self,
        function: Callable[..., int | None],
        args: tuple,
        cwd: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ):
        self.log = log
        given = (function, args, str(cwd), str(log), dict(environment or {}))
        self.process: BaseProcess = _CONTEXT.Process(target=_run, args=given, daemon=True)
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: int) -> None:
        """A signal, where it still runs."""
        if self.running and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.join()

    def wait(self, patience: float = PATIENCE) -> Done:
        """Its end; fails where it does not come."""
        self.process.join(patience)
        if self.running:
            self.kill()
            raise AssertionError(f"no end after {patience} s\n{self.done().out[-2000:]}\n{self.done().err[-2000:]}")
        return self.done()

    def done(self) -> Done:
        out, err = (self.log.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err"))
        code = self.process.exitcode
        assert code is not None
        return Done(code, out, err)


def call(function: Callable[..., int | None], *args: Any, cwd: Path, log: Path) -> Done:
    """Runs a function in a process of its own to its end."""
    return Child(function, args, cwd, log).wait()


def command(args: list[str]) -> int:
    """`python -m step37_lit ARGS` in this process."""
    from step37_lit import __main__

    sys.argv = ["python -m step37_lit", *args]
    return __main__.main()


def _run(function: Callable[..., int | None], args: tuple, cwd: str, log: str, environment: dict[str, str]) -> None:
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(Path(log).with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method("fork", force=True)  # as in a command's process, for loader workers
    os.environ.update(environment)
    os.chdir(cwd)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have loader workers
    import torch

    torch.set_num_threads(1)
    try:
        code = function(*args) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)  # as a command's process ends; nothing of the server's is cleaned up here
