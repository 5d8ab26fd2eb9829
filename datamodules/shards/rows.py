"""The rows of the index that one shard gives: members grouped to samples, each looked at as it passes by."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pyarrow as pa

from datamodules.conversations import MAX_TEXT_BYTES, TEXT_SUFFIXES, choose_text
from datamodules.shards.index import Member
from datamodules.shards.index_file import SCHEMA, ShardEntry
from datamodules.shards.storage import FileState, Storage
from datamodules.shards.tar_scan import MAX_MEMBER_BYTES, TarMember, TarScan
from step37_lit.images import SUFFIX_FORMATS, ImageError, read_header
from step37_lit.processor import DEFAULT_PROMPT

IMAGE_SUFFIX = re.compile(rf"(?:([0-9]{{1,9}})\.)?({'|'.join(SUFFIX_FORMATS)})")


@dataclass
class _Sample:
    """Members of one key that follow each other."""

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    texts: dict[str, bytes] = field(default_factory=dict)
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)  # suffixes that are neither text nor image
    problem: str | None = None

    def refuse(self, problem: str) -> None:
        """The first reason is kept."""
        self.problem = self.problem or problem


@dataclass
class _Row:
    key: str
    members: list[Member]
    image_sizes: list[tuple[int, int]]
    problem: str | None
    suffixes: frozenset[str]


def scan_shard(path: str, name: str, storage: Storage) -> tuple[ShardEntry, pa.Table]:
    """Reads a shard once, from front to back.

    Args:
        path: Where it is.
        name: Its name in the index.
        storage: Reads it.

    Returns:
        The shard's entry, and its samples in the columns of the index (the shard's number is 0).

    Raises:
        OSError: it cannot be read.
    """
    state = storage.state(path)
    rows = _ShardRows()
    with storage.open(path) as stream:
        scan = TarScan(stream.read)
        for event in scan:
            if isinstance(event, TarMember):
                rows.add(event)
            else:
                rows.damage(event.reason)
    rows.finish()
    return rows.entry(name, scan, state), rows.table()


class _ShardRows:
    def __init__(self) -> None:
        self._rows: list[_Row] = []
        self._row_of: dict[str, int] = {}
        self._sample: _Sample | None = None
        self._damages: list[str] = []
        self._after_damage = False
        self._ignored = 0

    def add(self, member: TarMember) -> None:
        """Takes the next member."""
        key, suffix = split_name(member.name)
        if not key and member.problem is None:
            self._ignored += 1
            return
        key = key or member.name
        if self._sample is None or self._sample.key != key or suffix in self._sample.members:
            self.finish()
            self._sample = _Sample(key)
            if self._after_damage:
                self._sample.refuse("the first one behind a damage: members may be missing")
        self._after_damage = False
        self._look_at(self._sample, suffix, member)

    def damage(self, reason: str) -> None:
        """Takes a damage: the samples on both sides of it may have lost members."""
        self._damages.append(reason)
        self._after_damage = True
        if self._sample is not None:
            self._sample.refuse("the last one before a damage: members may be missing")
        self.finish()

    def finish(self) -> None:
        """Ends the current sample."""
        sample, self._sample = self._sample, None
        if sample is None or not (sample.members or sample.problem):
            return
        suffixes = frozenset(sample.members)
        earlier = self._rows[self._row_of[sample.key]] if sample.key in self._row_of else None
        if earlier is not None and suffixes and not suffixes & earlier.suffixes:
            earlier.problem = "its members are not next to each other: other keys are between them"
            return
        if earlier is not None:
            sample.refuse("the key is there twice in this shard")
        self._row_of.setdefault(sample.key, len(self._rows))
        members, sizes = _checked(sample)
        self._rows.append(_Row(sample.key, members, sizes, sample.problem, suffixes))

    def entry(self, name: str, scan: TarScan, state: FileState) -> ShardEntry:
        problem = None
        if self._damages:
            more = len(self._damages) - 1
            problem = self._damages[0] + (f" (and {more} more such places)" if more else "")
        return ShardEntry(name, scan.size, scan.sha256, state.mtime_ns, len(self._rows), self._ignored, problem)

    def table(self) -> pa.Table:
        rows = self._rows
        sizes = [[{"width": width, "height": height} for width, height in row.image_sizes] for row in rows]
        columns = [
            [row.key for row in rows],
            [0] * len(rows),
            [[member._asdict() for member in row.members] for row in rows],
            sizes,
            [row.problem for row in rows],
        ]
        arrays = [pa.array(column, type=kind) for column, kind in zip(columns, SCHEMA.types, strict=True)]
        return pa.Table.from_arrays(arrays, schema=SCHEMA)

    def _look_at(self, sample: _Sample, suffix: str, member: TarMember) -> None:
        prefix = f"member {suffix}: " if suffix else ""
        if member.problem is not None:
            sample.refuse(prefix + member.problem)
            return
        image = IMAGE_SUFFIX.fullmatch(suffix)
        if suffix not in TEXT_SUFFIXES and image is None:
            sample.others.add(suffix)
            self._ignored += 1
            return
        sample.members[suffix] = Member(suffix, member.offset, member.size, member.crc32)
        if image is None:
            if member.size > MAX_TEXT_BYTES or member.data is None:
                sample.refuse(f"{prefix}text of {member.size} bytes, at most {MAX_TEXT_BYTES}")
            else:
                sample.texts[suffix] = member.data
        elif member.data is None:
            sample.refuse(f"{prefix}{member.size} bytes, at most {MAX_MEMBER_BYTES}")
        else:
            try:
                sample.image_sizes[suffix] = image_size(image[2], member.data)
            except ImageError as error:
                sample.refuse(f"{prefix}{error}")


def _checked(sample: _Sample) -> tuple[list[Member], list[tuple[int, int]]]:
    """Members in the order of the index and sizes of the images; notes what is wrong with the sample."""
    names = [suffix for suffix in sample.members if suffix not in TEXT_SUFFIXES]
    try:
        names = order_images(names)
        if sample.problem is None:
            text, texts = choose_text(sample.texts)
            texts.variants(DEFAULT_PROMPT, len(names))
            members = [sample.members[suffix] for suffix in (text, *names)]
            return members, [sample.image_sizes[suffix] for suffix in names]
    except ValueError as error:
        others = f" (members of other kinds: {', '.join(sorted(sample.others)[:5])})" if sample.others else ""
        sample.refuse(f"{error}{others}")
    return list(sample.members.values()), []


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member, as webdataset has them: the path up to the first dot of the base name, and what is
    behind it in lower case; an empty key where there is none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return (folder + slash + stem, suffix.lower()) if stem and dot else ("", "")


def order_images(suffixes: list[str]) -> list[str]:
    """Image suffixes in the order of their numbers, from 0 or 1 on; a single one needs none.

    Raises:
        ValueError: several without numbers, a number twice, or a gap.
    """
    numbered = sorted((int(suffix.partition(".")[0]), suffix) for suffix in suffixes if suffix[0].isdigit())
    if len(suffixes) == 1 and not numbered:
        return suffixes
    numbers = [number for number, _ in numbered]
    if len(numbered) < len(suffixes) or numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
        raise ValueError(f"images need numbers without a gap (0.jpg, 1.jpg, ...), found {', '.join(sorted(suffixes))}")
    return [suffix for _, suffix in numbered]


def image_size(suffix: str, data: bytes) -> tuple[int, int]:
    """Width and height from an image's header, EXIF orientation applied.

    Raises:
        ImageError: it is not what the suffix says, or not allowed.
    """
    header = read_header(data)
    if header.format != SUFFIX_FORMATS[suffix]:
        raise ImageError(f"the format is {header.format}, the suffix says {SUFFIX_FORMATS[suffix]}")
    return header.width, header.height
