"""Writing a checkpoint in the background: training goes on from copies, and the next save waits for the last one.

    save (all ranks, between two steps)      copy this rank's tensors, check the disk's space, start a thread
    thread of each rank, over a group of     write the tensors, hash the files; rank 0: manifest, rename, `latest`
      its own
    wait (all ranks)                         the next save, the end of training: raises what went wrong

The threads agree on every stage, so a failure on one rank is a failure on all, and nothing half-written gets a name.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from step37_lit.checkpoint import folder
from step37_lit.checkpoint.manifest import FileEntry, files_below, hash_files
from step37_lit.checkpoint.tensors import Part, Sharded, Tensors, write_tensors

PATIENCE = timedelta(hours=12)  # of a rank with a quick disk for one with a slow disk
NICENESS = 10  # of the thread
LAST_CHANCE = 60.0  # seconds that a run which failed gives a save that is under way


@dataclass(frozen=True)
class Job:
    """One save.

    Args:
        target: The checkpoint's folder.
        tensors: By folder in the checkpoint; copies, which nobody changes.
        files: Contents of the small files, by name; written by rank 0.
        described: Arguments of `folder.commit`.
        points: Whether `latest` is to name it.
    """

    target: Path
    tensors: Mapping[str, Tensors]
    files: Mapping[str, bytes]
    described: Mapping[str, Any]
    points: bool

    @property
    def num_bytes(self) -> int:
        """Of this rank."""
        parts = (part for tensors in self.tensors.values() for tensor in tensors.values() for part in tensor.parts)
        return sum(part.num_bytes for part in parts) + sum(map(len, self.files.values()))


class CheckpointSaver:
    """Saves one checkpoint at a time; every method must be called by all ranks."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._group: dist.ProcessGroup | None = None
        self._removals: list[Path] = []  # by rank 0, when the save that is under way has succeeded

    @property
    def failed(self) -> bool:
        """Whether a save has failed that nobody has waited for."""
        return self._error is not None

    def save(self, job: Job) -> None:
        """Starts a save. The tensors in `job` are copied here.

        Raises:
            ConfigError: the last save failed, or the disk has no room for this one.
        """
        self.wait()
        if self._group is None and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)  # used by the threads alone
        self._check_space(job)
        copies = {name: _copied(tensors) for name, tensors in job.tensors.items()}
        own = Job(job.target, copies, job.files, job.described, job.points)
        self._thread = threading.Thread(target=self._run, args=(own,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Until the save that is under way is done. Raises what it failed with."""
        if self._thread is None:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            return
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._removals.clear()  # what was to be replaced is all there is
            raise error
        self._remove()

    def remove(self, path: Path) -> None:
        """Removes a checkpoint, but not before the one that is being written is complete; rank 0 alone."""
        self._removals.append(path)
        if self._thread is None:
            self._remove()

    def _remove(self) -> None:
        while self._removals:
            path = self._removals.pop(0)
            if path.is_dir():
                folder.remove(path)

    # ---- in the thread ----

    def _run(self, job: Job) -> None:
        staged, first = folder.staged_path(job.target), _rank() == 0
        if sys.platform == "linux":  # where a thread has a priority of its own: training goes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            self._together(lambda: folder.start(job.target) if first else None)
            for name, tensors in job.tensors.items():
                write_tensors(staged / name, tensors, self._group)
            hashed = self._together(lambda: _finish_files(staged, job.files))
            self._together(lambda: _commit(job, hashed) if first else None)
        except Exception as error:
            if first:
                folder.abandon(job.target)
            failed = folder.write_error(error, job.target, job.num_bytes) if isinstance(error, OSError) else error
            self._error = failed

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """What `action` gives on each rank; the first error of any rank is raised on all."""
        outcome: tuple[Any, Exception | None]
        try:
            outcome = action(), None
        except Exception as error:
            outcome = None, error
        outcomes = [outcome]
        if self._group is not None:
            outcomes = [outcome] * dist.get_world_size(self._group)
            dist.all_gather_object(outcomes, outcome, group=self._group)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [value for value, _ in outcomes]

    def _check_space(self, job: Job) -> None:
        totals = self._together(lambda: job.num_bytes)

        def check() -> None:
            if _rank() == 0:
                job.target.parent.mkdir(parents=True, exist_ok=True)
                folder.check_space(job.target.parent, sum(totals))

        try:
            self._together(check)
        except OSError as error:
            raise folder.write_error(error, job.target) from error


def _finish_files(staged: Path, files: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Hashes this rank's files; rank 0 writes the small ones before."""
    first = _rank() == 0
    if first:
        for name, content in files.items():
            path = staged / name
            try:
                path.write_bytes(content)
            except OSError as error:
                error.filename = str(path)  # which a failed write does not know
                raise
    prefix = f"__{_rank()}_"
    names = files_below(staged)
    of_tensors = [name for name in names if Path(name).name.startswith(prefix)]
    common = [name for name in names if not Path(name).name.endswith(".distcp")] if first else []
    return hash_files(staged, [*of_tensors, *common], threads=1)  # the other cores are training's


def _commit(job: Job, hashed: list[dict[str, FileEntry]]) -> None:
    entries = {name: entry for each in hashed for name, entry in each.items()}
    folder.commit(job.target, hashed=entries, **job.described)
    if job.points:
        folder.point_to(job.target)


def _copied(tensors: Tensors) -> dict[str, Sharded]:
    """Copies on the CPU, so that the next step may change the originals."""

    def copy(part: Part) -> Part:
        assert isinstance(part.data, Tensor)
        data = part.data.detach()
        return Part.of(data.clone() if data.device.type == "cpu" else data.cpu(), part.offsets)

    return {name: Sharded(tensor.shape, tuple(map(copy, tensor.parts))) for name, tensor in tensors.items()}


def _rank() -> int:
    return dist.get_rank()
