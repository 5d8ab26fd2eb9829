"""Writes a planned source as webdataset shards by several processes, each shard at once or not at all.

The plan fixes which sample goes where, so the shards are the same whatever the number of processes, and a run that was
killed goes on where it stopped: `writing.json` holds, from the start to the end, the settings and a checksum of every
planned sample; a shard has its final name only when it is complete on disk.
"""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from webdataset import TarWriter

from datamodules.bad_samples import BadSamplePolicy
from datamodules.shards.index_file import WRITING_FILE
from datamodules.shards.worker_pool import progress_bar, results_in_order
from datamodules.shards.write_plan import Entry, Plan, checksum
from datamodules.sources.base import BadItem, Source
from step37_lit.errors import ConfigError, require
from step37_lit.images import SUFFIX_FORMATS, read_header

TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")
OWNER = "step37"  # of every member: the bytes must not depend on who writes, or when

Task = tuple[Sequence[Entry], Path]  # what goes into a shard, and its file


class SourceChanged(Exception):
    """A planned sample is no longer what it was."""


def members(source: Source, entry: Entry) -> dict[str, bytes]:
    """A planned sample's bytes by member suffix.

    Raises:
        BadItem: a picture cannot be read or is not what its suffix says.
        SourceChanged: the sample is not the planned one.
    """
    try:
        item = source.item(entry.ref)
    except BadItem as bad:
        raise SourceChanged(str(bad)) from bad
    if checksum(item) != entry.checksum:
        raise SourceChanged(f"{item.place}, key {item.key}")
    found = dict(item.texts)
    for suffix, image in item.image_members():
        try:
            data = image.read()
            actual = read_header(data).format
        except ValueError as error:
            raise item.bad(suffix, error) from error
        if actual != SUFFIX_FORMATS[image.suffix]:
            raise item.bad(suffix, f"expected {SUFFIX_FORMATS[image.suffix]} behind this suffix, found {actual}")
        found[suffix] = data
    return found


def write_shard(source: Source, policy: BadSamplePolicy, task: Task) -> list[BadItem]:
    """Writes one shard under a temporary name and renames it; returns the samples that were skipped.

    Raises:
        BadItem: under the policy `raise`.
        SourceChanged: while it was written.
        OSError: the file cannot be written.
    """
    entries, path = task
    skipped: list[BadItem] = []
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            with TarWriter(file, user=OWNER, group=OWNER, mode=0o444, mtime=0, compress=False, encoder=False) as tar:
                for entry in entries:
                    try:
                        tar.write({"__key__": entry.key, **members(source, entry)})
                    except BadItem as bad:
                        if policy == "raise":
                            raise
                        skipped.append(bad)
            _sync_and_rename(file, temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return skipped


def write_shards(
    source: Source, plan: Plan, out: Path, name: str, policy: BadSamplePolicy, workers: int, show_progress: bool
) -> list[BadItem]:
    """Writes the shards that are not there yet, `NAME-000000.tar` and so on; returns all samples that were skipped.

    Args:
        source: What `plan` was made of.
        plan: All shards; those that an earlier run completed are not written again.
        out: The folder, made ready by `begin`.
        name: Beginning of the shards' names.
        policy: What a bad sample does.
        workers: Processes that write; 1 writes in this one.
        show_progress: Draw a bar on stderr.

    Raises:
        BadItem: under the policy `raise`: the first in the order of the shards.
        ConfigError: the source changed, or a process was killed.
        OSError: a shard cannot be written.
    """
    tasks = [(entries, out / f"{name}-{i:06d}.tar") for i, entries in enumerate(plan.shards)]
    missing = [task for task in tasks if not task[1].exists()]
    try:
        skipped = {path: _skipped_before(source, entries, path, policy) for entries, path in tasks if path.exists()}
        write = functools.partial(write_shard, source, policy)
        with results_in_order(write, missing, workers) as results, progress_bar(show_progress, "samples") as progress:
            bar = progress.add_task("shard", total=sum(len(entries) for entries, _ in tasks))
            progress.advance(bar, sum(len(entries) for entries, path in tasks if path in skipped))
            for (entries, path), result in zip(missing, results, strict=True):
                skipped[path] = result
                progress.advance(bar, len(entries))
    except SourceChanged as error:
        raise ConfigError("SOURCE", "nothing changed while shards are written", str(error)) from error
    finally:
        for path in _stale(out):  # of a process that was killed, or ended by Ctrl-C
            path.unlink()
    return plan.skipped + [bad for _, path in tasks for bad in skipped[path]]


def begin(out: Path, settings: dict[str, Any], plan: Plan, resume: bool) -> None:
    """Makes a folder ready for the shards of a plan.

    Args:
        out: New or empty; with `resume` it may hold what a run with the same plan and settings left.
        settings: Everything but the source that decides the bytes, as JSON's types.
        plan: Its samples' checksums are kept.
        resume: Go on with what is there.

    Raises:
        ConfigError: the folder is not empty, or holds another plan's shards.
        OSError: it cannot be written.
    """
    content = {"settings": settings, "samples": "".join(f"{entry.checksum:08x}" for entry in plan.entries())}
    out.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in out.iterdir() if not (resume and TEMPORARY.search(path.name)))
    if WRITING_FILE in present and resume:
        _check_same(out / WRITING_FILE, content, plan)
    elif present:
        expected = f"no shards, or {WRITING_FILE} of a run to resume" if resume else "an empty folder, or --resume"
        raise ConfigError("OUT", expected, ", ".join(present[:3]) + ", ..." * (len(present) > 3), file=out)
    for path in _stale(out):
        path.unlink()
    if not present:
        write_file(out / WRITING_FILE, json.dumps(content))


def _check_same(file: Path, content: dict[str, Any], plan: Plan) -> None:
    try:
        old = json.loads(file.read_text(encoding="utf-8"))
        settings, samples = dict(old["settings"]), str(old["samples"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError("--resume", "what a run of this command wrote", type(error).__name__, file=file) from error
    for name in settings | content["settings"]:
        before, now = settings.get(name), content["settings"].get(name)
        require(before == now, f"--resume: {name}", f"{before!r} (the run that is resumed)", now)
    for i, entry in enumerate(plan.entries()):
        if samples[8 * i : 8 * i + 8] != f"{entry.checksum:08x}":
            changed = f"a change, first seen at sample {i + 1} (key {entry.key})"
            raise ConfigError("--resume: SOURCE", "the samples of the run that is resumed", changed)
    planned, now = len(samples) // 8, len(content["samples"]) // 8
    require(planned == now, "--resume: SOURCE", f"{planned} samples (the run that is resumed)", now)


def _skipped_before(source: Source, entries: Sequence[Entry], path: Path, policy: BadSamplePolicy) -> list[BadItem]:
    """What an earlier run left out of a complete shard, found anew so that it is reported once more."""
    try:
        with tarfile.open(path, "r:") as tar:
            present = {name.partition(".")[0] for name in tar.getnames()}
    except (tarfile.TarError, OSError) as error:
        raise ConfigError("--resume", "a shard of the run that is resumed", str(error), file=path) from error
    skipped = []
    for entry in entries:
        if entry.key in present:
            continue
        try:
            members(source, entry)
        except BadItem as bad:
            if policy == "raise":
                raise
            skipped.append(bad)
        else:
            raise ConfigError("--resume", f"a complete shard with key {entry.key}", "a damaged one", file=path)
    return skipped


def write_file(path: Path, text: str) -> None:
    """Writes a text file at once or not at all."""
    temporary = _temporary(path)
    with temporary.open("xb") as file:
        file.write(text.encode())
        _sync_and_rename(file, temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def _stale(out: Path) -> list[Path]:
    return [path for path in out.iterdir() if TEMPORARY.search(path.name)]


def _sync_and_rename(file: Any, temporary: Path, path: Path) -> None:
    """The content is on disk before the name, and the name before this returns."""
    file.flush()
    os.fsync(file.fileno())
    temporary.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
