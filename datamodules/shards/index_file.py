"""The index of a set of shards: one Arrow file beside them, opened by memory map.

    key           the sample's key
    shard         number of its shard
    members       its text member, then its images in order: suffix, offset, size, crc32
    image_sizes   width and height of each image, EXIF orientation applied
    problem       why the sample cannot be used, or null
    lengths_F     tokens of each variant for fingerprint F; null where not known yet, empty for a sample with a problem
    problem_F     why the sample cannot be used with fingerprint F, or null

A row is a sample. The shards themselves are in the metadata of the schema, as JSON under `step37_shards`. Any Arrow
reader opens the file: `pandas.read_feather("index.arrow")`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from datamodules.shards.storage import REMOTE_SCHEMES, PathLike
from step37_lit.errors import ConfigError

INDEX_FILE = "index.arrow"
WRITING_FILE = "writing.json"  # beside shards that are not all written yet
FORMAT_VERSION = 1
METADATA = b"step37_shards"
LENGTHS, PROBLEM = "lengths_", "problem_"  # and a fingerprint

MEMBERS = pa.large_list(
    pa.struct([("suffix", pa.large_string()), ("offset", pa.int64()), ("size", pa.int64()), ("crc32", pa.uint32())])
)
IMAGE_SIZES = pa.large_list(pa.struct([("width", pa.int32()), ("height", pa.int32())]))
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("shard", pa.int32()),
        ("members", MEMBERS),
        ("image_sizes", IMAGE_SIZES),
        ("problem", pa.large_string()),
    ]
)
LENGTHS_TYPE = pa.large_list(pa.int32())


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was indexed.

    Args:
        name: File name, without a folder.
        size: Bytes.
        sha256: SHA-256 of the file in hexadecimal digits.
        mtime_ns: Time of the last change in nanoseconds; 0 for a remote shard.
        num_samples: Rows of the index that belong to it.
        ignored: Members of other kinds than text and images.
        problem: What is wrong with the shard as a whole (cut off, a damaged header), or None.
    """

    name: str
    size: int
    sha256: str
    mtime_ns: int
    num_samples: int
    ignored: int = 0
    problem: str | None = None


def write_index(
    file: PathLike, table: pa.Table, shards: Sequence[ShardEntry], folder: str = "", pattern: str = ""
) -> None:
    """Writes an index; the file is whole or absent.

    Args:
        file: Where to.
        table: Columns as described above, in the order of the shards.
        shards: The shards.
        folder: URL prefix of the shards; empty where they lie beside the index.
        pattern: Glob of the shards in their folder; empty where they were listed one by one.
    """
    file = Path(file)
    described = {"version": FORMAT_VERSION, "folder": folder, "pattern": pattern, "shards": [asdict(s) for s in shards]}
    table = table.combine_chunks().replace_schema_metadata({METADATA: json.dumps(described)})
    batches = table.to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
    assert len(batches) == 1, "views of the columns need them in one piece"
    staged = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with staged.open("wb") as sink:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_batch(batches[0])
            sink.flush()
            os.fsync(sink.fileno())
        staged.replace(file)
    finally:
        staged.unlink(missing_ok=True)


def open_table(file: Path) -> pa.Table:
    """The columns of an index, by memory map. Raises `ConfigError` where it is none of this version."""
    try:
        source = pa.memory_map(os.fspath(file))
        reader = pa.ipc.open_file(source)
        table = pa.Table.from_batches([reader.get_batch(i) for i in range(reader.num_record_batches)], reader.schema)
        table.validate()  # that the buffers are as long as the columns say
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError("index", "an Arrow file", str(error).splitlines()[0], file=file) from error
    expected = dict(zip(SCHEMA.names, SCHEMA.types, strict=True))
    for name in table.schema.names:
        if name.startswith(LENGTHS):
            expected |= {name: LENGTHS_TYPE, PROBLEM + name.removeprefix(LENGTHS): pa.large_string()}
    found = dict(zip(table.schema.names, table.schema.types, strict=True))
    _check(found == expected, f"the columns {expected}", found, file)
    return table


def described_set(table: pa.Table, file: Path) -> tuple[tuple[ShardEntry, ...], str, str]:
    """What the metadata says: the shards, their folder (empty: that of the index) and their pattern.

    Raises:
        ConfigError: another version, or names that lead elsewhere: an index may come from others, like the shards.
    """
    try:
        described = json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
        version, folder, pattern = (described[name] for name in ("version", "folder", "pattern"))
        entries = tuple(ShardEntry(**entry) for entry in described["shards"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError("index", f"the metadata of version {FORMAT_VERSION}", repr(error), file=file) from error
    _check(version == FORMAT_VERSION, f"version {FORMAT_VERSION}", version, file)
    _check(folder == "" or folder.partition("://")[0] in REMOTE_SCHEMES, "shards beside it or at a URL", folder, file)
    for entry in entries:
        named = os.path.basename(entry.name) == entry.name not in ("", ".", "..")
        _check(named, "names of shards without a folder", entry.name, file)
    rows = sum(entry.num_samples for entry in entries)
    _check(rows == table.num_rows, f"{rows} samples, as its shards have", table.num_rows, file)
    return entries, folder, pattern


def _check(condition: bool, expected: object, found: object, file: Path) -> None:
    if not condition:
        raise ConfigError("index", expected, found, file=file)


def refuse_unfinished(folder: PathLike) -> None:
    """Raises `ConfigError` where the writing of a folder's shards was stopped: samples would be missing silently."""
    file = Path(folder) / WRITING_FILE
    if file.exists():
        advice = "shards that are all written (`python -m step37_lit shard SOURCE OUT --resume` goes on)"
        raise ConfigError("shards", advice, WRITING_FILE, file=Path(folder))
