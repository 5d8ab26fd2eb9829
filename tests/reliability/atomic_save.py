"""kill -9 within a save, with `$TMPDIR` on another file system: what is complete loads, and stays as it was."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from step37_lit import resume
from step37_lit.checkpoint.folder import latest_name, list_checkpoints
from step37_lit.checkpoint.manifest import MANIFEST, verify
from step37_lit.megatron.checkpointing import read_training_state
from tests.checkpoints.save_worker import save_without_end
from tests.forks import PATIENCE, Child
from tests.reliability.figure import Figure
from tests.reliability.moments import SAVING
from tests.reliability.mounts import tmpfs
from tests.reliability.runs import digests

LONGEST = 0.03  # seconds of a save of the tests' model


def measure(full: bool, seed: int, folder: Path) -> Figure:
    times, draw = 50 if full else 2, random.Random(seed)
    good = tried = 0
    problems: list[str] = []
    with other_file_system(folder / "tmp") as temporary:
        while tried < times:
            run = folder / f"run{tried + len(problems)}"
            run.mkdir()
            before = kill_in_a_save(run, temporary, draw)
            if not list((run / "checkpoints").glob(SAVING)):
                problems.append("late")  # the save was complete when the kill came: not counted
                continue
            tried += 1
            wrong = look_at(run, before)
            good += not wrong
            if wrong:
                print(f"{run}: {wrong}")
        left = sorted(path.name for path in temporary.iterdir())
    where = "a tmpfs" if os.geteuid() == 0 else "/dev/shm"
    detail = f"each left a half-written folder beside whole ones ({len(problems)} more kills came behind a save); "
    return Figure(good - len(left), tried, detail + f"$TMPDIR on {where}, left there: {left or 'nothing'}")


@contextlib.contextmanager
def other_file_system(folder: Path) -> Iterator[Path]:
    """An empty folder on another file system."""
    if os.geteuid() == 0:
        with tmpfs(folder, "size=8m"):
            yield folder
    else:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
            yield Path(name)


def kill_in_a_save(run: Path, temporary: Path, draw: random.Random) -> dict[Path, str]:
    """Manifests of the checkpoints that were complete before the save that was hit began."""
    child = Child(save_without_end, (str(run),), run, run / "worker", {"TMPDIR": str(temporary)})
    parent, wanted, deadline = run / "checkpoints", draw.randint(3, 6), time.monotonic() + PATIENCE
    try:
        while True:
            assert child.running and time.monotonic() < deadline, child.log.with_suffix(".err").read_text()
            staged = list(parent.glob(SAVING))
            whole = list(parent.glob("step_*"))
            if staged and len(whole) >= 2 and int(staged[0].name[6:12]) >= wanted:
                before = {path: (path / MANIFEST).read_text() for path in whole}
                break
            time.sleep(0.0005)
        time.sleep(draw.random() * LONGEST)
    finally:
        child.kill()
    return before


def look_at(run: Path, before: dict[Path, str]) -> list[str]:
    """What is wrong behind a kill; the newest one is read as a resumed run reads it."""
    parent = run / "checkpoints"
    good = [each for each in list_checkpoints(parent) if each.manifest is not None]
    manifests = {each.path: (each.path / MANIFEST).read_text() for each in good}
    wrong = [f"{path.name} is another one" for path, manifest in before.items() if manifests.get(path) != manifest]
    for each in good:
        verify(each.path)
    if latest_name(parent) not in {each.path.name for each in good}:
        wrong.append("latest names none that is whole")
    newest = resume.choose("must", run).path
    assert newest is not None
    if len(digests(newest)) < 20 or read_training_state(newest)["global_step"] != int(newest.name[5:]):
        wrong.append(f"{newest.name} does not load")
    return wrong
