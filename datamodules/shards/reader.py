"""Reading samples by their number in an index: one `pread` for each member, checked against its CRC-32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

from datamodules.bad_samples import BadSample
from datamodules.shards.index import Member, ShardIndex
from datamodules.shards.storage import Storage


class SampleBytes(NamedTuple):
    """A sample as it lies in its shard.

    Args:
        key: The sample's key.
        text_suffix: `json` or `txt`.
        text: Bytes of the text member.
        images: Suffix and bytes of each image, in order; empty where they were not asked for.
    """

    key: str
    text_suffix: str
    text: bytes
    images: tuple[tuple[str, bytes], ...]


class ShardReader:
    """Random access to the samples of an index; picklable, and safe behind `fork`.

    Args:
        index: What to read by.
        remote_schemes: Schemes that the shards' URLs may have; local files always may be read.
    """

    def __init__(self, index: ShardIndex, remote_schemes: Iterable[str] = ()):
        self.index, self._storage = index, Storage(remote_schemes)
        self._paths = [index.shard_path(number) for number in range(len(index.shards))]
        self._sizes = [entry.size for entry in index.shards]

    def read(self, i: int, images: bool = True) -> SampleBytes:
        """Sample i of the index.

        Args:
            i: Number of the sample.
            images: Whether to read the images, too.

        Raises:
            BadSample: the sample has a problem, or its bytes are missing or not those that were indexed.
        """
        index, shard = self.index, self.index.shard_of(i)
        problem = index.problem(i)
        if problem is not None:
            raise BadSample(index.shards[shard].name, index.key(i), "", problem)
        text, *pictures = index.members(i)
        return SampleBytes(
            key=index.key(i),
            text_suffix=text.suffix,
            text=self._read_member(i, shard, text),
            images=tuple([(m.suffix, self._read_member(i, shard, m)) for m in pictures]) if images else (),
        )

    def _read_member(self, i: int, shard: int, member: Member) -> bytes:
        # The index is a file like any other: a size that it invents must not ask for that much memory.
        if member.offset < 0 or not 0 <= member.size <= self._sizes[shard] - member.offset:
            raise self._bad(i, shard, member, "a place outside of the shard in the index")
        try:
            data = self._storage.read(self._paths[shard], member.offset, member.size)
        except OSError as error:
            raise self._bad(i, shard, member, f"cannot be read: {error}") from error
        reason = difference(data, member)
        if reason is not None:
            raise self._bad(i, shard, member, reason)
        return data

    def _bad(self, i: int, shard: int, member: Member, reason: str) -> BadSample:
        return BadSample(self.index.shards[shard].name, self.index.key(i), member.suffix, reason)


def difference(data: bytes, member: Member) -> str | None:
    """How the bytes of a member differ from what was indexed, or None."""
    if len(data) != member.size:
        return f"{len(data)} bytes read, {member.size} indexed"
    found = crc32(data)
    return None if found == member.crc32 else f"CRC-32 {found:08x}, {member.crc32:08x} when it was indexed"
