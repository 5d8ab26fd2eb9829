"""Token lengths of a set's samples for one fingerprint: text members only, read by the index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datamodules.bad_samples import BadSamplePolicy
from datamodules.conversations import Message, Texts, parse_text
from datamodules.shards.index import BuildCounts, Member, ShardIndex, set_fingerprint
from datamodules.shards.index_build import raise_first, replaced, split_rows
from datamodules.shards.index_file import LENGTHS, LENGTHS_TYPE, PROBLEM, write_index
from datamodules.shards.reader import ShardReader, difference
from datamodules.shards.storage import Storage
from datamodules.shards.worker_pool import progress_bar, results_in_order
from step37_lit.errors import ConfigError

CHUNK = 512  # samples of one job


class MeasuringProcessor(Protocol):
    """What lengths need of `Step37Processor`."""

    def fingerprint(self) -> str: ...

    def length(self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]) -> int: ...


class _Measured(NamedTuple):
    lengths: pa.Array
    problems: pa.Array
    bytes_read: int


def add_lengths(
    index: ShardIndex,
    processor: MeasuringProcessor,
    prompt: str,
    policy: BadSamplePolicy = "raise",
    workers: int = 1,
    show_progress: bool = False,
    remote_schemes: Iterable[str] = (),
) -> ShardIndex:
    """Adds the token lengths of every sample that has none yet for this processor and prompt, and writes the index.

    Args:
        index: Of shards that have not changed.
        processor: Tells the tokens of a conversation from its messages and its images' sizes.
        prompt: What a caption is the answer to.
        policy: What a text does that the processor refuses: stop, or stay in the index with the reason.
        workers: Processes that tokenise.
        show_progress: Draw a bar on stderr.
        remote_schemes: Schemes that the shards' URLs may have.

    Returns:
        The index as it is now, with `counts` of what was read.

    Raises:
        BadSample: under the policy `raise`, the first one that the processor refuses.
        ConfigError: it refuses every one.
    """
    storage, fingerprint = Storage(remote_schemes), set_fingerprint(processor, prompt)
    names = LENGTHS + fingerprint, PROBLEM + fingerprint
    lengths, problems = _columns(index, *names)
    missing = np.flatnonzero(pc.is_null(lengths))
    chunks = [missing[at : at + CHUNK].tolist() for at in range(0, len(missing), CHUNK)]
    measured: list[_Measured] = []
    with (
        results_in_order(_Measure(index, processor, prompt, storage), chunks, workers) as results,
        progress_bar(show_progress, "samples") as progress,
    ):
        bar = progress.add_task("lengths", total=len(missing))
        for result in results:
            measured.append(result)
            progress.advance(bar, len(result.lengths))
    table = index.table
    if measured:
        lengths = replaced(lengths, missing, pa.concat_arrays([part.lengths for part in measured]))
        problems = replaced(problems, missing, pa.concat_arrays([part.problems for part in measured]))
    for name, column in zip(names, (lengths, problems), strict=True):
        at = table.schema.get_field_index(name)
        table = table.append_column(name, column) if at < 0 else table.set_column(at, name, column)
    if policy == "raise":
        for entry, rows in zip(index.shards, split_rows(table, index.shards), strict=True):
            raise_first(entry, rows, names[1])
    _require_some(table, *names, index)
    if measured or fingerprint not in index.fingerprints:
        folder = index.folder if storage.is_remote(index.folder) else ""
        write_index(index.file, table, index.shards, folder, index.pattern)
    renewed = ShardIndex.open(index.file)
    renewed.counts = BuildCounts(
        texts_read=sum(index.problem(i) is None for i in missing.tolist()),
        bytes_read=sum(part.bytes_read for part in measured),
    )
    return renewed


class _Measure:
    """Lengths of some samples, in any process."""

    def __init__(self, index: ShardIndex, processor: MeasuringProcessor, prompt: str, storage: Storage):
        self.index, self.processor, self.prompt, self.storage = index, processor, prompt, storage

    def __call__(self, samples: Sequence[int]) -> _Measured:
        lengths: list[list[int]] = []
        problems: list[str | None] = []
        bytes_read = 0
        for i in samples:
            found, problem = [], None
            if self.index.problem(i) is None:
                text = self.index.members(i)[0]
                bytes_read += text.size
                try:
                    found = self._lengths(i, text)
                except (ValueError, OSError) as error:
                    problem = f"member {text.suffix}: {' '.join(str(error).split())}"
            lengths.append(found)
            problems.append(problem)
        return _Measured(pa.array(lengths, type=LENGTHS_TYPE), pa.array(problems, type=pa.large_string()), bytes_read)

    def _lengths(self, i: int, text: Member) -> list[int]:
        data = self.storage.read(self.index.shard_path(self.index.shard_of(i)), text.offset, text.size)
        changed = difference(data, text)
        if changed is not None:
            raise ValueError(changed)
        sizes = self.index.image_sizes(i)
        variants = parse_text(text.suffix, data).variants(self.prompt, len(sizes))
        return [self.processor.length(messages, sizes) for messages in variants]


def _columns(index: ShardIndex, *names: str) -> list[pa.ChunkedArray]:
    """Columns of the index; all null where they are not there yet."""
    kinds = (LENGTHS_TYPE, pa.large_string())
    return [
        index.table[name] if name in index.table.column_names else pa.chunked_array([pa.nulls(len(index), type=kind)])
        for name, kind in zip(names, kinds, strict=True)
    ]


def _require_some(table: pa.Table, lengths: str, problem: str, index: ShardIndex) -> None:
    if pc.any(pc.greater(pc.list_value_length(table[lengths]), 0)).as_py():
        return
    reasons = [reason for name in (problem, "problem") for reason in table[name].drop_null()[:1].to_pylist()]
    raise ConfigError("shards", "a sample that can be used", f"none of {len(index)} ({reasons[0]})", file=index.file)


def read_texts(index: ShardIndex, remote_schemes: Iterable[str] = ()) -> Iterator[Texts]:
    """What the text members of the usable samples say, in order."""
    reader = ShardReader(index, remote_schemes)
    for i in range(len(index)):
        if index.problem(i) is None:
            sample = reader.read(i, images=False)
            yield parse_text(sample.text_suffix, sample.text)
