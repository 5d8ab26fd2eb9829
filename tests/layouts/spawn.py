"""Starts real gloo processes for a layout and reads back what each rank saw."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("train_worker.py")


def run(command: list[str], timeout: float = 240.0) -> subprocess.CompletedProcess:
    """Runs a command in a process group of its own, so that a time-out leaves none of its ranks behind."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout} s: {command}\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


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
