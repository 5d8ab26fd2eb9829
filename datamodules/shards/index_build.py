"""Builds the index of a set of shards, and refreshes it: only shards that have changed are read."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.bad_samples import BadSample, BadSamplePolicy
from datamodules.shards.index import BuildCounts, ShardIndex
from datamodules.shards.index_file import INDEX_FILE, LENGTHS, ShardEntry, write_index
from datamodules.shards.rows import scan_shard
from datamodules.shards.storage import PathLike, Storage, expand_shards
from datamodules.shards.worker_pool import progress_bar, results_in_order
from step37_lit.errors import ConfigError, require

IN_ANOTHER_SHARD = "the key is also in shard "


class _Set(NamedTuple):
    """Where a set is."""

    paths: list[str]
    file: Path
    folder: str  # URL prefix; empty for local shards
    pattern: str

    @property
    def names(self) -> list[str]:
        return [os.path.basename(path) for path in self.paths]


class _Look(NamedTuple):
    """A shard that was looked at; without a table nothing in it has changed."""

    entry: ShardEntry
    table: pa.Table | None
    bytes_read: int


def build_index(
    shards: PathLike | Sequence[PathLike],
    policy: BadSamplePolicy = "raise",
    workers: int = 1,
    show_progress: bool = False,
    index_file: PathLike | None = None,
    remote_schemes: Iterable[str] = (),
) -> ShardIndex:
    """Writes the index of a set, or brings the one that is there up to date.

    Token lengths of shards that have not changed stay. The result does not depend on `workers`.

    Args:
        shards: See `expand_shards`; all in one folder.
        policy: `raise` stops at the first bad shard or sample and writes nothing; `skip` keeps them with the reasons.
        workers: Processes that read shards.
        show_progress: Draw a bar on stderr.
        index_file: Where the index goes; by default beside the shards. Remote shards need one.
        remote_schemes: Schemes that URLs may have.

    Returns:
        The index, with `counts` of what was read.

    Raises:
        BadSample: under the policy `raise`: the first one in the order of the shards; keys that two shards have last.
        ConfigError: nothing to index, or it cannot be read or written.
    """
    storage = Storage(remote_schemes)
    where = _locate(shards, storage, index_file)
    old = ShardIndex.open(where.file) if where.file.exists() else None
    known = (
        {} if old is None else dict(zip((e.name for e in old.shards), split_rows(old.table, old.shards), strict=True))
    )
    entry_of = {} if old is None else {entry.name: entry for entry in old.shards}
    jobs = [(path, name, entry_of.get(name)) for path, name in zip(where.paths, where.names, strict=True)]
    looks: list[_Look] = []
    tables: list[pa.Table] = []
    with (
        results_in_order(functools.partial(_look_at, storage), jobs, workers) as results,
        progress_bar(show_progress, "shards") as progress,
    ):
        for look in progress.track(results, total=len(jobs), description="index"):
            looks.append(look)
            tables.append(_without_mark(known[look.entry.name]) if look.table is None else look.table)
            if policy == "raise":
                raise_first(look.entry, tables[-1])
    entries = tuple(look.entry for look in looks)
    table = _assembled(tables, entries)
    if policy == "raise":
        for entry, rows in zip(entries, split_rows(table, entries), strict=True):
            raise_first(entry, rows)
    if old is None or entries != old.shards or any(look.table is not None for look in looks):
        write_index(where.file, table, entries, where.folder, where.pattern)
    index = ShardIndex.open(where.file)
    index.counts = _counts(looks)
    return index


def _locate(shards: PathLike | Sequence[PathLike], storage: Storage, index_file: PathLike | None) -> _Set:
    paths = expand_shards(shards, storage.remote_schemes)
    remote = any(storage.is_remote(path) for path in paths)
    folders = {path.rpartition("/")[0] + "/" if remote else os.path.dirname(os.path.abspath(path)) for path in paths}
    require(len(folders) == 1, "shards", "all shards of a set in one folder", sorted(folders))
    folder = folders.pop()
    if remote:
        require(index_file is not None, "--index", "a local file for the index of remote shards", None)
    file = Path(folder) / INDEX_FILE if index_file is None else Path(index_file)
    if not remote:
        beside = file.resolve().parent == Path(folder).resolve()
        require(beside, "--index", f"a file in the shards' folder {folder}", os.fspath(file))
    pattern = _pattern(os.fspath(shards)) if isinstance(shards, str | os.PathLike) and not remote else ""
    return _Set(paths, file, folder if remote else "", pattern)


def _pattern(path: str) -> str:
    """What a new shard of the set would be called; empty where a file or a range says what there is."""
    if os.path.isdir(path):
        return "*.tar"
    return "" if os.path.exists(path) or "{" in path else os.path.basename(path)


def _look_at(storage: Storage, job: tuple[str, str, ShardEntry | None]) -> _Look:
    """Reads a shard unless it is as it was."""
    path, name, old = job
    try:
        state, compared = storage.state(path), 0
        if old is not None and state.size == old.size:
            if state.mtime_ns == old.mtime_ns:
                return _Look(old, None, 0)
            compared = state.size
            if storage.sha256(path) == old.sha256:
                return _Look(replace(old, mtime_ns=state.mtime_ns), None, compared)
        entry, table = scan_shard(path, name, storage)
        return _Look(entry, table, compared + entry.size)
    except OSError as error:
        raise ConfigError("shard", "a file that can be read", str(error), file=path) from error


def raise_first(entry: ShardEntry, table: pa.Table, column: str = "problem") -> None:
    """Raises `BadSample` for the first bad sample of a shard's rows, or for the shard itself."""
    bad = np.flatnonzero(pc.is_valid(table[column]))
    if len(bad):
        row = int(bad[0])
        raise BadSample(entry.name, table["key"][row].as_py(), "", table[column][row].as_py())
    if entry.problem is not None:
        raise BadSample(entry.name, "", "", entry.problem)


def split_rows(table: pa.Table, entries: Sequence[ShardEntry]) -> list[pa.Table]:
    """The rows of each shard."""
    ends = np.cumsum([entry.num_samples for entry in entries]).tolist()
    return [table.slice(end - entry.num_samples, entry.num_samples) for end, entry in zip(ends, entries, strict=True)]


def replaced(column: pa.ChunkedArray, rows: np.ndarray, values: pa.Array) -> pa.Array:
    """A column with `values` in `rows`."""
    picks = np.arange(len(column))
    picks[rows] = len(column) + np.arange(len(rows))
    return pa.concat_arrays([*column.chunks, values]).take(pa.array(picks))


def _assembled(tables: Sequence[pa.Table], entries: Sequence[ShardEntry]) -> pa.Table:
    """All rows, with their shards' numbers; keys of two shards are marked, and what has a problem has no lengths."""
    table = pa.concat_tables(tables, promote_options="default")
    if table.num_rows == 0:
        problems = [f"{entry.name}: {entry.problem}" for entry in entries if entry.problem is not None]
        found = f"none in {len(entries)} shards" + (f" ({problems[0]})" if problems else "")
        raise ConfigError("shards", "at least one sample", found)
    numbers = np.repeat(np.arange(len(entries), dtype=np.int32), [entry.num_samples for entry in entries])
    table = _with_column(table, "shard", pa.array(numbers))
    table = _with_column(table, "problem", _marked(table, numbers, entries))
    has_problem = np.asarray(pc.is_valid(table["problem"]))
    for name in table.column_names:
        if name.startswith(LENGTHS):
            rows = np.flatnonzero(has_problem)
            empty = pa.array([[]] * len(rows), type=table.schema.field(name).type)
            table = _with_column(table, name, replaced(table[name], rows, empty))
    return table


def _marked(table: pa.Table, numbers: np.ndarray, entries: Sequence[ShardEntry]) -> pa.Array:
    """The column of problems, with a mark for each key that an earlier shard has, too."""
    codes = pa.concat_arrays(table["key"].chunks).dictionary_encode().indices.to_numpy()
    first_rows = np.unique(codes, return_index=True)[1]  # by code
    usable = np.asarray(pc.is_null(table["problem"]))
    again = np.flatnonzero((first_rows[codes] != np.arange(len(codes))) & usable)
    marks = [IN_ANOTHER_SHARD + entries[numbers[row]].name for row in first_rows[codes[again]]]
    return replaced(table["problem"], again, pa.array(marks, type=pa.large_string()))


def _without_mark(rows: pa.Table) -> pa.Table:
    """Rows of an earlier build: another shard of then may be gone now, so lengths are not known either."""
    marked = pc.fill_null(pc.starts_with(rows["problem"], IN_ANOTHER_SHARD), False)
    if not pc.any(marked).as_py():
        return rows
    at = np.flatnonzero(marked)
    for name in rows.column_names:
        if name == "problem" or name.startswith(LENGTHS):
            nothing = pa.nulls(len(at), type=rows.schema.field(name).type)
            rows = _with_column(rows, name, replaced(rows[name], at, nothing))
    return rows


def _with_column(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, column)


def _counts(looks: Sequence[_Look]) -> BuildCounts:
    kept = [look for look in looks if look.table is None]
    return BuildCounts(
        shards_read=len(looks) - len(kept),
        shards_compared=sum(look.bytes_read > 0 for look in kept),
        shards_kept=sum(look.bytes_read == 0 for look in kept),
        bytes_read=sum(look.bytes_read for look in looks),
    )
