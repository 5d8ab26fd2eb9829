"""Where a hub folder is written before it gets its name, so that it is there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from step37_lit.checkpoint.folder import sync
from step37_lit.checkpoint.manifest import hash_file
from step37_lit.errors import ConfigError

RECORD = ".export.json"  # what is finished, and of what


class ExportStaging:
    """A folder beside `target`, on the same file system; a context manager.

    Where an export of the same identity was cut off before, the files that it had finished are kept if they are whole.
    An error removes what is not finished, and everything where nothing is.

    Args:
        target: The folder's final path.
        identity: Plain values: what is exported, and how.

    Raises:
        ConfigError: in place of any OSError inside; names the file.
    """

    def __init__(self, target: Path, identity: dict[str, Any]):
        self.target = target
        self.path = target.with_name(f".{target.name}.export")
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._finished: dict[str, str] = {}

    def __enter__(self) -> Self:
        try:
            self._finished = self._whole_files()
            if not self._finished:
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir(parents=True)
            self._remove_unfinished()
        except OSError as error:
            raise self._failed(error) from error
        return self

    def kept(self) -> tuple[str, ...]:
        """Names of the files that are finished."""
        return tuple(self._finished)

    def finished(self, name: str, sha256: str) -> None:
        """A file is whole and on the disk, and has this hash."""
        self._finished[name] = sha256
        record = {"identity": self._identity, "files": self._finished}
        staged = self.path / f"{RECORD}.part"
        _write_synced(staged, json.dumps(record).encode())
        staged.replace(self.path / RECORD)

    def write(self, name: str, content: bytes) -> None:
        """A small file, at once."""
        _write_synced(self.path / name, content)

    def commit(self) -> None:
        """Everything is on the disk under the final name."""
        (self.path / RECORD).unlink()
        sync(self.path)
        self.path.rename(self.target)
        sync(self.target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if self._finished:
            self._remove_unfinished()
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._failed(error) from error

    def _whole_files(self) -> dict[str, str]:
        """Files of a former export of this identity, with their hashes."""
        record = self.path / RECORD
        if not record.is_file():
            return {}
        try:
            found = json.loads(record.read_bytes())
            files = dict(found["files"]) if found["identity"] == self._identity else {}
        except (ValueError, KeyError, TypeError):
            return {}
        names = [spec[0] for spec in self._identity["shards"]]
        there = [name for name in names if name in files and (self.path / name).is_file()]
        return {name: files[name] for name in there if hash_file(self.path / name).sha256 == files[name]}

    def _remove_unfinished(self) -> None:
        for path in self.path.iterdir():
            if path.name not in self._finished and path.name != RECORD:
                path.unlink()

    def _failed(self, error: OSError) -> ConfigError:
        kept = f" ({len(self._finished)} finished files are kept in {self.path})" if self._finished else ""
        return ConfigError(
            "--output", f"a folder that can be written{kept}", error.strerror, error.filename or self.path
        )


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
