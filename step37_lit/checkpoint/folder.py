"""A folder of checkpoints: staging and the atomic rename, the `latest` pointer, listing, pruning.

checkpoints/step_000200/     complete: has a manifest
checkpoints/.step_000300.part   being written, or what a killed save left: removed by the next save
checkpoints/.step_000200.old    the former folder of that name, for the moment between two renames
checkpoints/latest           name of the newest one
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from step37_lit.checkpoint.manifest import MANIFEST, FileEntry, Manifest, files_below, hash_files, read_manifest
from step37_lit.errors import ConfigError

LATEST = "latest"
STAGED, REPLACED = ".part", ".old"
PACKAGES = ("torch", "megatron-core", "lightning")


@dataclass(frozen=True)
class Found:
    """A folder among checkpoints.

    Args:
        path: The folder.
        manifest: None where it is half-written or its manifest cannot be used.
        problem: What is wrong with the manifest, as one line.
    """

    path: Path
    manifest: Manifest | None
    problem: str | None = None


def staged_path(target: Path) -> Path:
    """Where a checkpoint is written before it gets its name: beside it, so on the same file system."""
    return target.with_name(f".{target.name}{STAGED}")


def start(target: Path) -> Path:
    """Makes the empty folder that a checkpoint is written into, and clears up behind killed saves."""
    staged = staged_path(target)
    recover(target.parent)
    staged.mkdir(parents=True)
    return staged


def abandon(target: Path) -> None:
    """Removes what `start` made, as far as it can be removed."""
    shutil.rmtree(staged_path(target), ignore_errors=True)


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """An empty folder to write a checkpoint into; `commit` gives it its name, and an error removes it.

    Raises:
        ConfigError: the file system cannot be written to; names the file where the error does.
    """
    try:
        yield start(target)
    except OSError as error:
        abandon(target)
        raise write_error(error, target) from error
    except BaseException:
        abandon(target)
        raise


def write_error(error: OSError, target: Path, num_bytes: int | None = None) -> ConfigError:
    """What a failed write is for the user; `num_bytes` is what the whole checkpoint needs on this rank."""
    file = error.filename if error.filename is not None else target
    needed = "" if num_bytes is None else f" (a checkpoint needs {num_bytes} bytes here)"
    return ConfigError("checkpoint", f"a file that can be written{needed}", error.strerror or str(error), file)


def commit(
    target: Path,
    kind: str,
    step: int,
    epoch: int = 0,
    layout: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    hashed: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Writes the manifest of a staged checkpoint, syncs it to the disk and gives it its name.

    Args:
        target: The checkpoint's folder; an older one of this name is replaced.
        kind, step, epoch, layout, dtype: See `Manifest`.
        hashed: What is known of the files; None hashes all of them here.
    """
    staged = staged_path(target)
    if hashed is None:
        hashed = hash_files(staged, files_below(staged))
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    files = dict(sorted(hashed.items()))
    manifest = Manifest(kind, step, epoch, dict(layout or {}), dtype, packages, time.time(), files)
    for name in files:
        sync(staged / name)
    write_synced(staged / MANIFEST, manifest.to_json())
    for folder in {staged, *((staged / name).parent for name in files)}:
        sync(folder)
    replaced = target.with_name(f".{target.name}{REPLACED}")
    if target.exists():
        target.rename(replaced)
    staged.rename(target)
    sync(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    return manifest


def point_to(target: Path) -> None:
    """Makes `target` the one that `latest` names."""
    pointer = target.parent / LATEST
    staged = pointer.with_name(f".{LATEST}{STAGED}")
    write_synced(staged, f"{target.name}\n")
    staged.replace(pointer)
    sync(target.parent)


def recover(parent: Path) -> None:
    """Clears up behind a killed save: names that were lost between two renames come back, the rest goes."""
    if not parent.is_dir():
        return
    for replaced in parent.glob(f".*{REPLACED}"):
        target = replaced.with_name(replaced.name[1 : -len(REPLACED)])
        if target.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(target)
    for staged in parent.glob(f".*{STAGED}"):
        shutil.rmtree(staged) if staged.is_dir() else staged.unlink()


def list_checkpoints(parent: Path) -> list[Found]:
    """Checkpoints in a folder: the one that `latest` names first, then the newest first, broken ones last."""
    if not parent.is_dir():
        return []
    found = [_look_at(path) for path in sorted(parent.iterdir()) if _may_be_one(path)]
    latest = latest_name(parent)

    def order(each: Found) -> tuple[bool, bool, float]:
        created = each.manifest.created if each.manifest is not None else 0.0
        return (each.manifest is None, each.path.name != latest, -created)

    return sorted(found, key=order)


def latest_name(parent: Path) -> str | None:
    """What the pointer says; None where there is none."""
    pointer = parent / LATEST
    return pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else None


def _may_be_one(path: Path) -> bool:
    return path.is_dir() and ((path / MANIFEST).exists() or (path / "model").is_dir() or path.name.endswith(STAGED))


def _look_at(path: Path) -> Found:
    if path.name.endswith(STAGED):
        return Found(path, None, "half-written: the next save removes it")
    try:
        return Found(path, read_manifest(path))
    except ConfigError as error:
        return Found(path, None, str(error))


def prune(parent: Path, keep_last: int, keep_every: int | None = None, keep: Sequence[str] = ()) -> list[Path]:
    """Removes checkpoints of training that are neither among the newest, nor kept by step or name.

    Args:
        parent: The folder of checkpoints.
        keep_last: How many of the newest stay, at least 1.
        keep_every: Those whose step is a multiple of it stay.
        keep: Names that stay.

    Returns:
        The folders that were removed.
    """
    found = [(each.path, each.manifest) for each in list_checkpoints(parent)]
    whole = [(path, manifest) for path, manifest in found if manifest is not None and manifest.kind == "training"]
    removed = []
    for path, manifest in whole[keep_last:]:
        of_step = keep_every is not None and manifest.step % keep_every == 0
        if not of_step and path.name not in keep:
            remove(path)
            removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Removes a checkpoint; killed in between it leaves no half of one under its name."""
    doomed = path.with_name(f".{path.name}.removed{STAGED}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def check_space(parent: Path, num_bytes: int) -> None:
    """Raises `ConfigError` unless the file system has room for `num_bytes` more."""
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ConfigError("checkpoint", f"{num_bytes} bytes free on the disk", free, parent)


def write_synced(path: Path, text: str) -> None:
    """A text file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)  # which the system call does not know
        raise
    finally:
        os.close(descriptor)
