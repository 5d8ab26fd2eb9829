"""Small file systems that a test fills up, or cannot write to; only root may mount them."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at `folder`, which is made; `options` as mount knows them, such as `size=1m`."""
    folder.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _run("umount", "--lazy", str(folder))


def make_read_only(folder: Path, read_only: bool = True) -> None:
    """Of a tmpfs. root writes into a folder whatever its permissions are, but not here."""
    _run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(folder))


@contextlib.contextmanager
def fill(folder: Path, leaving: int = 0) -> Iterator[None]:
    """Fills the disk that a folder is on but for `leaving` bytes."""
    filler = folder / ".filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(65536)):
                pass
        file.truncate(max(0, file.tell() - leaving))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only_view(folder: Path) -> Iterator[None]:
    """Whoever opens a file in it meanwhile cannot write; files that are open already can be written."""
    _run("mount", "--bind", str(folder), str(folder))
    _run("mount", "-o", "remount,bind,ro", str(folder))
    try:
        yield
    finally:
        _run("umount", "--lazy", str(folder))


@functools.cache
def refusal() -> str | None:
    """Why nothing can be mounted here; None where it can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    with tempfile.TemporaryDirectory() as name:
        try:
            with tmpfs(Path(name, "tried"), "size=64k"):
                return None
        except subprocess.CalledProcessError as error:
            return f"mounting is not allowed here: {error.stderr.strip()}"


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
