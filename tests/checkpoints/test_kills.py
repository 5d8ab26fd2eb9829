"""kill -9 while checkpoints are written in the background, and a disk that is full or read-only.

`make test-slow ARGS="tests/checkpoints/test_kills.py -s"` kills 50 times; the default run twice.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from step37_lit.checkpoint.folder import latest_name, list_checkpoints
from step37_lit.checkpoint.manifest import verify

WORKER = Path(__file__).with_name("save_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SEED = int(os.environ.get("STEP37_TEST_SEED", "20261124"))


def kill_in_a_save(run: Path, draw: random.Random) -> bool:
    """Starts training in `run`, kills it behind a random step; whether a half-written checkpoint was left."""
    log = run.with_suffix(".log")
    with log.open("w") as output:
        command = [sys.executable, str(WORKER), str(run)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    wanted = f"step {draw.randint(3, 8)}\n"
    try:
        while wanted not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return bool(list((run / "checkpoints").glob(".*.part")))


def check_kills(root: Path, times: int) -> int:
    draw, caught = random.Random(SEED), 0
    for number in range(times):
        run = root / f"run{number}"
        run.mkdir()
        caught += kill_in_a_save(run, draw)
        parent = run / "checkpoints"
        whole = list_checkpoints(parent)
        good = [each for each in whole if each.manifest is not None]
        assert good, "no checkpoint behind three steps"
        for each in good:
            verify(each.path)  # every one that has its name is whole
        name = latest_name(parent)
        assert name in {each.path.name for each in good}
    print(f"seed {SEED}: {times} of {times} kills left good checkpoints; {caught} of them in the middle of a save")
    return caught


def test_a_kill_in_a_save_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    check_kills(tmp_path, 2)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    assert check_kills(tmp_path, 50) >= 10


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The limit is on the size of a file, so that only the tensors' files reach it; in the child alone."""
    limit = 200_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, str(WORKER), str(tmp_path), "6"]
    done = subprocess.run(command, env=ENVIRONMENT, preexec_fn=limited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "File too large" in lines[0]
    assert f"{tmp_path}/checkpoints/.step_000001.part/model/__0_0.distcp" in lines[0]
    # The step after the save has begun it says so: at most one more was trained.
    assert "step 3" not in done.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []
