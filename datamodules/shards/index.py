"""`ShardIndex`: the samples of a set by number, from the index beside its shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from datamodules.shards.index_file import INDEX_FILE, LENGTHS, PROBLEM, described_set, open_table
from datamodules.shards.storage import PathLike, Storage, folder_shards
from step37_lit.errors import ConfigError


class Member(NamedTuple):
    """Where a member's bytes are in its shard, and their CRC-32."""

    suffix: str
    offset: int
    size: int
    crc32: int


class Lengths(NamedTuple):
    """Tokens of the variants of every sample: those of sample i are `values[offsets[i]:offsets[i + 1]]`.

    Both are views of the file. A sample that cannot be used has none.
    """

    offsets: np.ndarray  # [n + 1] int64
    values: np.ndarray  # [variants] int32


class Fingerprinted(Protocol):
    """What a fingerprint needs of a processor."""

    def fingerprint(self) -> str: ...


def set_fingerprint(processor: Fingerprinted, prompt: str) -> str:
    """16 hexadecimal digits for what token lengths depend on: the processor and the prompt of captions."""
    return hashlib.sha256(f"{processor.fingerprint()}\0{prompt}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BuildCounts:
    """What a build did.

    Args:
        shards_read: Shards read from front to back.
        shards_compared: Shards whose time had changed and whose SHA-256 had not.
        shards_kept: Shards of which nothing was read.
        texts_read: Samples whose text was read for token lengths.
        bytes_read: Of all of these.
    """

    shards_read: int = 0
    shards_compared: int = 0
    shards_kept: int = 0
    texts_read: int = 0
    bytes_read: int = 0


class ShardIndex:
    """An index, opened by memory map: nothing is read before it is asked for.

    Pickling hands on the file's name; another process opens it again and refuses one that has been rewritten since.

    Attributes:
        file: The index.
        folder: Folder or URL prefix of the shards.
        pattern: Glob of the shards in `folder`; empty where they were listed one by one.
        shards: The shards in order.
        shard_numbers: [n] int32, the shard of each sample; a view of the file.
        fingerprints: Those that there are token lengths for, complete or not.
        counts: What was read to make it, in the process that did.
    """

    counts = BuildCounts()

    def __init__(self, file: Path):
        self.file = file
        self._table, self._state = open_table(file), _state_of(file)
        self.shards, folder, self.pattern = described_set(self._table, file)
        self.folder: str = folder or os.fspath(file.parent)
        self.shard_numbers: np.ndarray = self._column("shard").to_numpy()
        self.fingerprints = tuple(
            name.removeprefix(LENGTHS) for name in self._table.schema.names if name.startswith(LENGTHS)
        )
        members, sizes = self._column("members"), self._column("image_sizes")
        self._shard_of = _numbers(self._column("shard"))
        self._member_borders, self._size_borders = _numbers(members.offsets), _numbers(sizes.offsets)
        self._suffixes = _Strings(members.values.field("suffix"))
        self._offsets, self._sizes, self._crcs = (
            _numbers(members.values.field(name)) for name in ("offset", "size", "crc32")
        )
        self._widths, self._heights = (_numbers(sizes.values.field(name)) for name in ("width", "height"))
        self._keys, self._problems = _Strings(self._column("key")), _Strings(self._column("problem"))

    @classmethod
    def open(cls, path: PathLike) -> ShardIndex:
        """Opens the index of a folder, or an index file.

        Raises:
            ConfigError: there is none, or it is not an index of this version.
        """
        file = Path(path) / INDEX_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError("index", f"a file; `{command(os.fspath(path))}` writes it", "none", file=file)
        return cls(file)

    def __reduce__(self) -> tuple[Any, tuple[Path, tuple[int, int]]]:
        return _reopen, (self.file, self._state)

    def __len__(self) -> int:
        return self._table.num_rows

    @property
    def table(self) -> pa.Table:
        """All columns; one chunk each, views of the file."""
        return self._table

    def key(self, i: int) -> str:
        return self._keys[i]

    def keys(self) -> Iterator[str]:
        """The keys in the order of the samples."""
        return (self._keys[i] for i in range(len(self)))

    def shard_of(self, i: int) -> int:
        """Number of the shard in `shards`."""
        return self._shard_of[i]

    def shard_path(self, number: int) -> str:
        """Path or URL of a shard."""
        return _joined(self.folder, self.shards[number].name)

    def members(self, i: int) -> tuple[Member, ...]:
        """The text member, then the images in order."""
        suffixes, offsets, sizes, crcs = self._suffixes, self._offsets, self._sizes, self._crcs
        rows = range(self._member_borders[i], self._member_borders[i + 1])
        return tuple([Member(suffixes[m], offsets[m], sizes[m], crcs[m]) for m in rows])

    def image_sizes(self, i: int) -> tuple[tuple[int, int], ...]:
        """Width and height of each image."""
        rows = range(self._size_borders[i], self._size_borders[i + 1])
        return tuple([(self._widths[m], self._heights[m]) for m in rows])

    def problem(self, i: int) -> str | None:
        """Why the sample cannot be used whatever the fingerprint, or None."""
        return self._problems[i] or None

    def problems(self, fingerprint: str | None = None) -> Iterator[tuple[int, str]]:
        """Samples that cannot be used and why; with a fingerprint, also those that only it cannot use."""
        columns = [self._problems]
        if fingerprint is not None:
            self.lengths(fingerprint)
            columns.append(_Strings(self._column(PROBLEM + fingerprint)))
        for i in sorted({i for column in columns for i in column.filled().tolist()}):
            yield i, next(filter(None, (column[i] for column in columns)))

    def lengths(self, fingerprint: str) -> Lengths:
        """Token lengths for a fingerprint (see `set_fingerprint`).

        Raises:
            ConfigError: there are none, or not for every sample; the message has the command that adds them.
        """
        adds = f"`{command(os.fspath(self.file if self.file.name != INDEX_FILE else self.file.parent))}` adds them"
        if fingerprint not in self.fingerprints:
            needed = (
                f"fingerprint {fingerprint} of tokenizer, chat template, model's image tokens, multicrop and prompt"
            )
            found = ", ".join(self.fingerprints) or "none"
            raise ConfigError("token lengths", f"those for {needed}; {adds}", found, file=self.file)
        column = self._column(LENGTHS + fingerprint)
        if column.null_count:
            known = f"{len(self) - column.null_count} of {len(self)} samples"
            raise ConfigError(f"token lengths for fingerprint {fingerprint}", f"all; {adds}", known, file=self.file)
        return Lengths(column.offsets.to_numpy(), column.values.to_numpy())

    def check_fresh(self, storage: Storage) -> None:
        """Compares the index with its shards.

        Size and time are looked at; the content (SHA-256) is read only where the time differs, as in a copy.

        Raises:
            ConfigError: a shard is missing, has changed, or is new in the folder; the message names it.
        """
        again = f"; `{command(self.folder)}` reads it again"
        for number, entry in enumerate(self.shards):
            path = self.shard_path(number)
            try:
                size, mtime_ns = storage.state(path)
            except FileNotFoundError:
                raise ConfigError("shard", f"a file of {entry.size} bytes{again}", "none", file=path) from None
            if size != entry.size:
                raise ConfigError("size of the shard", f"{entry.size} bytes as indexed{again}", size, file=path)
            if mtime_ns != entry.mtime_ns and (found := storage.sha256(path)) != entry.sha256:
                raise ConfigError("SHA-256 of the shard", f"{entry.sha256} as indexed{again}", found, file=path)
        if self.pattern:
            names = {entry.name for entry in self.shards}
            for path in folder_shards(self.folder, self.pattern):
                if os.path.basename(path) not in names:
                    raise ConfigError("shard", f"one of the {len(names)} in the index{again}", "a new one", file=path)

    def _column(self, name: str) -> Any:
        return self._table.column(name).chunk(0)


class _Strings:
    """A column of strings by number, from views of its buffers; null reads as empty."""

    def __init__(self, column: pa.LargeStringArray):
        offsets, data = column.buffers()[1:]
        self._borders = np.frombuffer(offsets, dtype=np.int64, count=len(column) + 1).data
        self._data = memoryview(b"" if data is None else data)

    def __getitem__(self, i: int) -> str:
        return str(self._data[self._borders[i] : self._borders[i + 1]], "utf-8")

    def filled(self) -> np.ndarray:
        """Numbers of the strings that are not empty."""
        return np.flatnonzero(np.diff(np.asarray(self._borders)))


def _numbers(column: pa.Array) -> memoryview:
    """A view of a column; an item of it is a plain int, at a third of the time that numpy takes."""
    return column.to_numpy().data


def command(shards: str) -> str:
    """The command that writes or completes the index of shards, for messages."""
    return f"python -m step37_lit index {shards}"


def _joined(folder: str, name: str) -> str:
    return folder + name if folder.endswith("/") else os.path.join(folder, name)


def _state_of(file: Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _reopen(file: Path, state: tuple[int, int]) -> ShardIndex:
    index = ShardIndex.open(file)
    if index._state != state:
        raise ConfigError("index", "the file that the run started with", "a newer one", file=file)
    return index
