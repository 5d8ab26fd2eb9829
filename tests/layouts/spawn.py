"""Starts real gloo processes for a layout and reads back what each rank saw."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("train_worker.py")


def run(command: list[str], timeout: float = 300.0) -> subprocess.CompletedProcess:
    """Runs a command in a process group of its own, so that a time-out leaves none of its ranks behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Files and not pipes: a rank that is left behind would keep a pipe open, and reading it would never end.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            _end(process)
        out.seek(0), err.seek(0)
        texts = out.read(), err.read()
    assert process.returncode != -signal.SIGKILL, f"no end after {timeout} s: {command}\n{texts[0]}\n{texts[1]}"
    return subprocess.CompletedProcess(command, process.returncode, *texts)


def _end(process: subprocess.Popen) -> None:
    """torchrun's ranks are in sessions of their own and only torchrun ends them, given the chance."""
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.returncode = -signal.SIGKILL


def train(
    folder: Path,
    devices: int,
    strategy: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    launcher: list[str] | None = None,
) -> list[dict[str, Any]]:
    """Trains on `devices` ranks and gives each rank's rows (loss, gradient norm, lr), metrics and step count.

    Args:
        launcher: Command in front of the worker, such as torchrun; None leaves starting the ranks to Lightning.
    """
    job = {"folder": str(folder), "devices": devices, "strategy": strategy or {}, "trainer": trainer or {}}
    job |= {"module": module or {}, "data": data or {}}
    done = run([*(launcher or [sys.executable]), str(WORKER), json.dumps(job)])
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]
