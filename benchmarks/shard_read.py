"""Samples per second of random reads by the index against a webdataset pipeline, and what a large index costs.

    python benchmarks/shard_read.py [--samples 4000] [--rounds 9] [--shards FOLDER] [--indexed 1000000]

Both sides run in one process and take turns over the same shards in the page cache: `ShardReader.read` of every sample
in a random order, with its CRC-32, and `webdataset.WebDataset` from the first to the last sample. Neither decodes. The
median of the rounds' ratios counts. The shards hold pictures of photographs' size (24 kB) unless --shards names others.

Then an index of a million samples is opened and an epoch of it is planned: seconds, and growth of the resident memory.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import webdataset
from PIL import Image
from zlib_ng.zlib_ng import crc32

from datamodules.epoch_plan import Planner
from datamodules.shard_sets import Reading, ShardSet
from datamodules.shards.index import ShardIndex, set_fingerprint
from datamodules.shards.index_build import build_index
from datamodules.shards.index_file import INDEX_FILE, LENGTHS, LENGTHS_TYPE, PROBLEM, SCHEMA, ShardEntry, write_index
from datamodules.shards.reader import ShardReader
from step37_lit import Step37Config
from step37_lit.images import DEFAULT_MAX_PIXELS
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

PICTURES = 64  # different ones
SHARDS = 100  # of the large index
CAPTIONS = 5  # of each of its samples
MAX_LENGTH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--indexed", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.indexed:
            measure_large_index(Path(folder) / "large", options.indexed)
        shards = options.shards
        if shards is None:
            shards = Path(folder) / "shards"
            write_shards(shards, options.samples)
        compare_reading(shards, options.rounds)


def compare_reading(shards: Path, rounds: int) -> None:
    start = time.perf_counter()
    index = build_index(shards)
    seconds = time.perf_counter() - start
    read = index.counts.bytes_read
    if read:
        print(f"indexing, one process: {len(index) / seconds:,.0f} samples/s, {read / seconds / 1e6:,.0f} MB/s")
    reader, random = ShardReader(index), np.random.default_rng(0)
    by_index(reader, np.arange(len(index)))  # fills the page cache
    paths = [index.shard_path(number) for number in range(len(index.shards))]
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(by_index(reader, random.permutation(len(index))))
        theirs.append(by_webdataset(paths, len(index)))
    ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
    size = sum(entry.size for entry in index.shards) / len(index)
    print(f"{len(index)} samples of {size / 1e3:.0f} kB in {len(paths)} shards, {rounds} rounds")
    print(f"CRC-32 by {crc32.__module__}")
    print(f"random reads by the index, CRC-32 checked {statistics.median(ours):10,.0f} samples/s (median)")
    print(f"webdataset, sequential                    {statistics.median(theirs):10,.0f} samples/s (median)")
    print(f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}; target >= 8)")


def by_index(reader: ShardReader, order: np.ndarray) -> float:
    numbers, total = order.tolist(), 0
    start = time.perf_counter()
    for i in numbers:
        sample = reader.read(i)
        total += len(sample.text) + len(sample.images[0][1])
    seconds = time.perf_counter() - start
    assert total > 0
    return len(order) / seconds


def by_webdataset(paths: list[str], expected: int) -> float:
    found = total = 0
    start = time.perf_counter()
    for sample in webdataset.WebDataset(paths, shardshuffle=False):
        found += 1
        total += len(sample["json"]) + len(sample["jpg"])
    seconds = time.perf_counter() - start
    assert found == expected and total > 0
    return found / seconds


def write_shards(folder: Path, samples: int) -> None:
    folder.mkdir()
    random = np.random.default_rng(0)
    pictures = []
    for _ in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=60)
        pictures.append(file.getvalue())
    captions = ["A dog runs over the grass behind a red ball ."] * CAPTIONS
    with webdataset.ShardWriter(str(folder / "train-%03d.tar"), maxcount=1000, verbose=0) as writer:
        for i in range(samples):
            text = json.dumps({"captions": captions}).encode()
            writer.write({"__key__": f"{i:08d}", "jpg": pictures[i % PICTURES], "json": text})


def measure_large_index(folder: Path, samples: int) -> None:
    folder.mkdir()
    tokenizer = Step37Tokenizer.train(["a dog runs over the grass"], vocab_size=300)
    reading = Reading(
        processor=Step37Processor(tokenizer, Step37Config.preset("tiny")),
        prompt=DEFAULT_PROMPT,
        max_length=MAX_LENGTH,
        too_long="raise",
        max_pixels=DEFAULT_MAX_PIXELS,
    )
    # In a process of its own, so that memory it has freed does not hide what planning needs.
    fingerprint = set_fingerprint(reading.processor, reading.prompt)
    writing = multiprocessing.Process(target=write_large_index, args=(folder, samples, fingerprint))
    writing.start()
    writing.join()
    before = resident_megabytes()
    start = time.perf_counter()
    index = ShardIndex.open(folder)
    seconds = time.perf_counter() - start
    size = (folder / INDEX_FILE).stat().st_size
    print(f"index of {len(index):,} samples with {CAPTIONS} captions each: {size / 1e6:.0f} MB on disk")
    print(f"opened in {seconds * 1e3:.1f} ms (target < 1 s), {resident_megabytes() - before:+.0f} MB resident")
    start = time.perf_counter()
    shards = ShardSet(os.fspath(folder), "large", reading)
    planner = Planner([shards.planned("train", 0.0)], 0, MAX_LENGTH, 64, 1)
    for epoch in range(8):
        packs = planner.plan(epoch).num_packs
        seconds, start = time.perf_counter() - start, time.perf_counter()
        megabytes = resident_megabytes() - before
        print(f"epoch {epoch} of {packs:,} packs planned in {seconds:.1f} s, {megabytes:+.0f} MB (target <= 300 MB)")


def write_large_index(folder: Path, samples: int, fingerprint: str) -> None:
    """An index as `samples` pictures with captions would give, beside shards of the right size without content."""
    random = np.random.default_rng(0)
    each = samples // SHARDS
    entries = []
    for number in range(SHARDS):
        path = folder / f"train-{number:06d}.tar"
        with path.open("wb") as file:
            file.truncate(each * 24_000)
        entries.append(ShardEntry(path.name, each * 24_000, "0" * 64, path.stat().st_mtime_ns, each))
    total = each * SHARDS
    twice = pa.array(np.arange(total + 1) * 2)
    members = pa.StructArray.from_arrays(
        [
            pa.array(["json", "jpg"] * total, type=pa.large_string()),
            pa.array(np.repeat(np.arange(total) % each, 2) * 24_000),
            pa.array(np.full(2 * total, 12_000)),
            pa.array(random.integers(0, 2**32, 2 * total, dtype=np.uint32)),
        ],
        names=["suffix", "offset", "size", "crc32"],
    )
    sizes = pa.StructArray.from_arrays(
        [pa.array(np.full(total, 500, dtype=np.int32)), pa.array(np.full(total, 375, dtype=np.int32))],
        names=["width", "height"],
    )
    lengths = pa.array(random.integers(40, 400, CAPTIONS * total, dtype=np.int32))
    columns = [
        pa.array([f"{i:012d}" for i in range(total)], type=pa.large_string()),
        pa.array(np.repeat(np.arange(SHARDS, dtype=np.int32), each)),
        pa.LargeListArray.from_arrays(twice, members),
        pa.LargeListArray.from_arrays(pa.array(np.arange(total + 1)), sizes),
        pa.nulls(total, pa.large_string()),
        pa.LargeListArray.from_arrays(pa.array(np.arange(total + 1) * CAPTIONS), lengths),
        pa.nulls(total, pa.large_string()),
    ]
    kinds = [*SCHEMA, pa.field(LENGTHS + fingerprint, LENGTHS_TYPE), pa.field(PROBLEM + fingerprint, pa.large_string())]
    table = pa.Table.from_arrays(columns, schema=pa.schema(kinds))
    write_index(folder / INDEX_FILE, table, entries, pattern="*.tar")


def resident_megabytes() -> float:
    """Of this process, the pages of mapped files that it has touched included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
