"""Where shards are: local files by `pread`; http(s), s3 and gs through fsspec and only where they are allowed.

A path is looked at before anything is opened: `pipe:` and every other scheme that is not on the list is refused; what
reads such paths elsewhere would run a shell, or unpack one file system within another.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import braceexpand
import fsspec

from step37_lit.errors import ConfigError, require

REMOTE_SCHEMES = ("http", "https", "s3", "gs")
MAX_SHARDS = 100_000  # more than this come from a slip in a brace range
OPEN_FILES = 256  # descriptors that are kept; sets may have more shards than a process may open files
STREAM_BLOCK = 4 << 20  # bytes of one request where a remote shard is read from front to back

PathLike = str | os.PathLike[str]
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_GLOB = re.compile(r"[*?\[]")
_Result = TypeVar("_Result")


class FileState(NamedTuple):
    """Size in bytes and time of the last change in nanoseconds; 0 for remote files, which keep no comparable time."""

    size: int
    mtime_ns: int


class Storage:
    """Reads shards; local ones always, remote ones of the schemes that are named.

    Safe behind `fork` and picklable: local reads name their position and share none, remote connections belong to the
    process that opened them.

    Args:
        remote_schemes: Any of `http`, `https`, `s3`, `gs`.

    Raises:
        ConfigError: another scheme is named; every method: a path has a scheme that is not allowed.
        OSError: every method: the file cannot be read.
    """

    def __init__(self, remote_schemes: Iterable[str] = ()):
        self.remote_schemes = tuple(remote_schemes)
        for scheme in self.remote_schemes:
            require(scheme in REMOTE_SCHEMES, "remote_schemes", f"any of {', '.join(REMOTE_SCHEMES)}", scheme)
        self._open_files: dict[str, _LocalFile] = {}  # the oldest first

    def __reduce__(self) -> tuple[type[Storage], tuple[tuple[str, ...]]]:
        return Storage, (self.remote_schemes,)

    def is_remote(self, path: str) -> bool:
        """Whether the path has an allowed scheme. Raises `ConfigError` for one that is not allowed."""
        match = _SCHEME.match(path)
        if match is None:
            return False
        scheme = match[1].lower()
        known = scheme in REMOTE_SCHEMES and path[match.end() :].startswith("//") and "::" not in path
        require(known, "shards", f"local paths or URLs of {', '.join(REMOTE_SCHEMES)}", path)
        require(scheme in self.remote_schemes, "shards", f"local paths (remote_schemes does not name {scheme})", path)
        return True

    def state(self, path: str) -> FileState:
        """Size and time of a shard."""
        if self.is_remote(path):
            size = _remotely(path, lambda files: files.info(path)["size"])
            if size is None:
                raise OSError(f"{path}: the server does not say its size")
            return FileState(size, 0)
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for a writer
            raise OSError(f"{path}: not a regular file")
        return FileState(found.st_size, found.st_mtime_ns)

    def open(self, path: str) -> BinaryIO:
        """A stream from front to back; `read(n)` may return fewer than n bytes before the end."""
        if self.is_remote(path):
            settings = {"block_size": STREAM_BLOCK, "cache_type": "readahead"}
            return _remotely(path, lambda files: files.open(path, "rb", **settings))
        self.state(path)
        return open(path, "rb")

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on: one `pread`, or one range request. Fewer where the file ends before."""
        opened = self._open_files.get(path)
        if opened is None:
            if self.is_remote(path):
                if size == 0:
                    return b""
                return _remotely(path, lambda files: files.cat_file(path, start=offset, end=offset + size))
            opened = self._open_local(path)
        return os.pread(opened.descriptor, size, offset)

    def sha256(self, path: str) -> str:
        """SHA-256 of the whole file, in hexadecimal digits."""
        digest = hashlib.sha256()
        with self.open(path) as stream:
            while chunk := stream.read(STREAM_BLOCK):
                digest.update(chunk)
        return digest.hexdigest()

    def _open_local(self, path: str) -> _LocalFile:
        self.state(path)
        if len(self._open_files) == OPEN_FILES:
            del self._open_files[next(iter(self._open_files))]
        opened = self._open_files[path] = _LocalFile(path)
        return opened


class _LocalFile:
    """A descriptor that closes with its last user, which may be a thread in the middle of a read."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _remotely(path: str, call: Callable[[Any], _Result]) -> _Result:
    """Calls with the file system of a remote path; fsspec keeps one for each process."""
    scheme = path.partition(":")[0].lower()
    try:
        return call(fsspec.filesystem(scheme))
    except FileNotFoundError:
        raise
    except ImportError as error:
        raise ConfigError("remote_schemes", f"the package that fsspec needs for {scheme}", str(error)) from error
    except Exception as error:  # each back end has exceptions of its own, with no common base
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def expand_shards(paths: PathLike | Sequence[PathLike], remote_schemes: Iterable[str] = ()) -> list[str]:
    """The shards that are meant, in order.

    Args:
        paths: One or several of: a folder (its `*.tar` by name), a tar, a glob, a range as webdataset has it
            (`train-{000..123}.tar`), or a URL with or without a range.
        remote_schemes: Schemes that URLs may have.

    Raises:
        ConfigError: a scheme that is not allowed, nothing there, something else than files, or a shard named twice.
    """
    storage = Storage(remote_schemes)
    listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    shards = [shard for path in listed for shard in _expand(os.fspath(path), storage)]
    require(len(shards) > 0, "shards", "at least one path", listed)
    for shard, found in itertools.groupby(sorted(shards)):
        require(len(list(found)) == 1, "shards", "each shard once", shard)
    return shards


def folder_shards(folder: PathLike, pattern: str = "*.tar") -> list[str]:
    """Paths of a folder's shards by name; hidden files, such as half-written ones, are no shards."""
    return sorted(glob.glob(os.path.join(glob.escape(os.fspath(folder)), pattern)))


def _expand(path: str, storage: Storage) -> list[str]:
    if storage.is_remote(path):
        return _ranges(path)
    if os.path.isdir(path):
        found = folder_shards(path)
        if not found:
            raise ConfigError("shards", "at least one *.tar", "none", file=path)
    elif os.path.exists(path):
        found = [path]
    else:
        found = [name for one in _ranges(path) for name in (sorted(glob.glob(one)) if _GLOB.search(one) else [one])]
        if not found:
            raise ConfigError("shards", "files of this pattern", "none", file=path)
    for name in found:
        if not Path(name).is_file():
            raise ConfigError("shards", "a file", "something else" if os.path.lexists(name) else "nothing", file=name)
    return found


def _ranges(path: str) -> list[str]:
    """`a-{00..11}.tar` as a list."""
    if "{" not in path:
        return [path]
    try:
        expanded = list(itertools.islice(braceexpand.braceexpand(path), MAX_SHARDS + 1))
    except ValueError as error:
        raise ConfigError("shards", "a range such as {000..123}", path) from error
    require(len(expanded) <= MAX_SHARDS, "shards", f"at most {MAX_SHARDS} of a range", path)
    return expanded
