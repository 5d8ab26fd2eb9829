"""Which sample of a source goes into which shard, decided before a byte is written."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from datamodules.bad_samples import BadSamplePolicy
from datamodules.sources.base import BadItem, Item, Ref, Source
from step37_lit.errors import ConfigError, require

BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Limit:
    """How much goes into a shard: bytes of the tar file or samples, exactly one of them."""

    shard_size: int | None = None
    shard_samples: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.shard_size, self.shard_samples) if value is not None]
        require(len(given) == 1, "--shard-size, --shard-samples", "exactly one of them", given)
        require(given[0] > 0, "--shard-size, --shard-samples", "a positive number", given[0])

    def full(self, size: int, samples: int) -> bool:
        """Whether a tar file with members of `size` bytes in all, of `samples` samples, is over the limit."""
        if self.shard_size is not None:
            return -(-(size + 2 * BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE > self.shard_size
        return self.shard_samples is not None and samples > self.shard_samples


@dataclass(frozen=True, slots=True)
class Entry:
    """A planned sample: its ref in the source, key, bytes in a tar, and a checksum that changes with the sample."""

    ref: Ref
    key: str
    size: int
    checksum: int


@dataclass
class Plan:
    """Which samples go into which shard, and the bad ones that go into none."""

    shards: list[list[Entry]] = field(default_factory=list)
    skipped: list[BadItem] = field(default_factory=list)

    def entries(self) -> Iterator[Entry]:
        for shard in self.shards:
            yield from shard


def plan_shards(source: Source, limit: Limit, policy: BadSamplePolicy) -> Plan:
    """Reads the source but not its pictures.

    Raises:
        BadItem: the first bad sample, under the policy `raise`.
        ConfigError: the source is none of its kind, two samples have one key, or there are none.
    """
    plan = Plan()
    places: dict[str, str] = {}
    size = 0
    for entry, place in _entries(source, plan.skipped, policy):
        if entry.key in places:
            both = f"{places[entry.key]} and {place}"
            raise ConfigError(f"key {entry.key}", "one sample (a key has _ for dots, slashes and spaces)", both)
        places[entry.key] = place
        size += entry.size
        if not plan.shards or limit.full(size, len(plan.shards[-1]) + 1):
            plan.shards.append([])
            size = entry.size
        plan.shards[-1].append(entry)
    require(bool(plan.shards), "SOURCE", "samples", f"none, and {len(plan.skipped)} bad ones")
    return plan


def _entries(source: Source, skipped: list[BadItem], policy: BadSamplePolicy) -> Iterator[tuple[Entry, str]]:
    for ref in source.refs():
        try:
            if isinstance(ref, BadItem):
                raise ref
            item = source.item(ref)
        except BadItem as bad:
            if policy == "raise":
                raise
            skipped.append(bad)
        else:
            yield Entry(ref, item.key, _tar_size(item), checksum(item)), item.place


def _tar_size(item: Item) -> int:
    sizes = [len(text) for text in item.texts.values()] + [image.size for image in item.images]
    return sum(BLOCK + -(-size // BLOCK) * BLOCK for size in sizes)


def checksum(item: Item) -> int:
    """CRC32 of everything that the source says about an item without reading its pictures."""
    stamps = [(suffix, *image.stamp) for suffix, image in item.image_members()]
    return zlib.crc32(repr((item.key, sorted(item.texts.items()), stamps)).encode())
