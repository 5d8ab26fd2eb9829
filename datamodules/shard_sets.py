"""A set of shards as training uses it: its index, what of it can be planned, and its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.bad_samples import BadRecord, BadSample
from datamodules.conversations import parse_text
from datamodules.epoch_plan import PlannedSet
from datamodules.shards.index import Lengths, ShardIndex, set_fingerprint
from datamodules.shards.index_file import refuse_unfinished
from datamodules.shards.reader import ShardReader
from datamodules.shards.storage import Storage
from step37_lit.batch import Sample
from step37_lit.errors import ConfigError, require
from step37_lit.images import ImageError, open_image
from step37_lit.processor import Step37Processor

TooLong = Literal["raise", "drop", "truncate"]
Split = Literal["train", "val"]


@dataclass(frozen=True)
class Reading:
    """How samples are made of what is in the shards.

    Args:
        processor: Turns messages and pictures into tokens and pixels.
        prompt: Question that goes with a caption.
        max_length: Tokens of a pack.
        too_long: What happens to a text that is longer: refuse the set, leave the text out, or cut off its end.
        max_pixels: Largest picture, width x height.
        remote_schemes: URL schemes that may be read besides local files.
    """

    processor: Step37Processor
    prompt: str
    max_length: int
    too_long: TooLong
    max_pixels: int
    remote_schemes: tuple[str, ...] = ()


class ShardSet:
    """Samples of one indexed set of shards.

    Args:
        path: Folder of the shards and their index.
        name: Short name; sample keys begin with it.
        reading: How samples are made.
        weight: See `PlannedSet`.

    Raises:
        ConfigError: no index, one that does not belong to the shards, or without token lengths for this processor.
    """

    def __init__(self, path: str, name: str, reading: Reading, weight: float | None = None):
        self.path, self.name, self.reading, self.weight = path, name, reading, weight
        refuse_unfinished(path)
        self.index = ShardIndex.open(path)
        self.index.check_fresh(Storage(reading.remote_schemes))
        self.fingerprint = set_fingerprint(reading.processor, reading.prompt)
        self.lengths: Lengths = self.index.lengths(self.fingerprint)
        self._reader = ShardReader(self.index, reading.remote_schemes)

    def digest(self) -> str:
        """Changes when a sample or its length could: 16 hex digits."""
        parts = [self.name, self.fingerprint, repr(self.weight), self.reading.too_long]
        parts += [f"{shard.name} {shard.sha256}" for shard in self.index.shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def known_bad(self) -> Iterator[BadRecord]:
        """What indexing found: damaged shards, then samples."""
        for entry in self.index.shards:
            if entry.problem is not None:
                yield BadRecord(self.name, entry.name, "", "", entry.problem)
        for i, problem in self.index.problems(self.fingerprint):
            shard = self.index.shards[self.index.shard_of(i)].name
            yield BadRecord(self.name, shard, self.index.key(i), "", problem)

    def planned(self, split: Split, val_share: float) -> PlannedSet:
        """The usable texts of the split's samples.

        Args:
            split: Which part of the set.
            val_share: Share of the samples that are for validation, chosen by their keys.

        Raises:
            ConfigError: a text longer than a pack, unless `too_long` says what to do with it.
        """
        counts = np.diff(self.lengths.offsets)
        used = counts > 0  # a sample with a problem has no lengths
        if val_share > 0:
            for_validation = self._for_validation(val_share)
            used &= for_validation if split == "val" else ~for_validation
        samples = np.flatnonzero(used)
        counts = counts[samples]
        ends = np.cumsum(counts)
        variants = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
        lengths = self.lengths.values[np.repeat(self.lengths.offsets[samples], counts) + variants]
        return self._without_long(samples, counts, variants, lengths)

    def _without_long(
        self, samples: np.ndarray, counts: np.ndarray, variants: np.ndarray, lengths: np.ndarray
    ) -> PlannedSet:
        limit = self.reading.max_length
        too_long = lengths > limit
        rows = np.repeat(np.arange(len(samples)), counts)
        if too_long.any() and self.reading.too_long == "raise":
            first = int(np.flatnonzero(too_long)[0])
            key = self.index.key(int(samples[rows[first]]))
            expected = f"texts of at most {limit} tokens (data.max_length), or data.too_long: drop or truncate"
            found = f"{int(too_long.sum())} longer ones, the first: key {key}, {int(lengths[first])} tokens"
            raise ConfigError(f"data.sets: {self.name}", expected, found)
        if self.reading.too_long == "truncate":
            lengths = np.minimum(lengths, limit)
        elif too_long.any():
            counts = np.bincount(rows[~too_long], minlength=len(samples))
            variants, lengths = variants[~too_long], lengths[~too_long]
            samples, counts = samples[counts > 0], counts[counts > 0]
        borders = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        columns = (samples.astype(np.int32), borders, variants.astype(np.int16), lengths.astype(np.int32))
        return PlannedSet(self.name, *columns, self.weight)

    def _for_validation(self, share: float) -> np.ndarray:
        limit = int(share * 2**64)
        keys = (self.index.key(i).encode() for i in range(len(self.index)))
        hashes = (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in keys)
        return np.fromiter((h < limit for h in hashes), dtype=bool, count=len(self.index))

    def key(self, i: int, variant: int) -> str:
        """Name of a text of a sample: `set/KEY`, with `#variant` where the sample has several."""
        several = self.lengths.offsets[i + 1] - self.lengths.offsets[i] > 1
        return f"{self.name}/{self.index.key(i)}" + f"#{variant}" * bool(several)

    def sample(self, i: int, variant: int) -> Sample:
        """Reads, decodes and tokenises one text of a sample.

        Raises:
            BadSample: it cannot be read, or is not what a model can learn from.
            RuntimeError: its length is not the index's, which means that the plan is wrong.
        """
        reading = self.reading
        content = self._reader.read(i)
        shard = self.index.shards[self.index.shard_of(i)].name
        images = []
        for suffix, data in content.images:
            try:
                images.append(open_image(data, reading.max_pixels))
            except ImageError as error:
                raise BadSample(shard, content.key, suffix, str(error)) from error
        try:
            texts = parse_text(content.text_suffix, content.text).variants(reading.prompt, len(images))
            sample = reading.processor(texts[variant], images, key=self.key(i, variant))
        except ValueError as error:
            raise BadSample(shard, content.key, content.text_suffix, str(error)) from error
        self._check_length(i, variant, len(sample))
        if len(sample) <= reading.max_length:
            return sample
        try:
            return sample.truncated(reading.max_length, reading.processor.config.tokens)
        except ConfigError as error:
            raise BadSample(shard, content.key, content.text_suffix, str(error)) from error

    def _check_length(self, i: int, variant: int, found: int) -> None:
        planned = int(self.lengths.values[self.lengths.offsets[i] + variant])
        if found != planned:
            raise RuntimeError(f"sample {self.key(i, variant)} has {found} tokens, the index says {planned}")


def set_names(paths: Sequence[str], given: Sequence[str | None]) -> list[str]:
    """The given names, or the folders' (or index files') own.

    Raises:
        ConfigError: two sets of one name.
    """
    names = [name or _short_name(Path(path).resolve()) for path, name in zip(paths, given, strict=True)]
    require(len(set(names)) == len(names), "data.sets: name", "another one for each set", names)
    return names


def _short_name(path: Path) -> str:
    return path.stem if path.is_file() else path.name
