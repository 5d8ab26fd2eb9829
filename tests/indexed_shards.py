"""Sets of small shards for the tests of indexing and reading."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample
from datamodules.shards.index import ShardIndex
from datamodules.shards.reader import ShardReader
from step37_lit.config import Step37Config
from step37_lit.processor import Step37Processor
from step37_lit.tokenizer import Step37Tokenizer
from tests import tars
from tests.tars import sample, text

REPOSITORY = Path(__file__).parents[1]
TEXTS = ["a red ring", "a dog runs", "Describe the picture.", "What is it?"] * 3
CHAT = text(
    messages=[
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
        {"role": "assistant", "content": "a dog runs"},
    ],
    id=7,
)


def small_processor() -> Step37Processor:
    return Step37Processor(Step37Tokenizer.train(TEXTS, vocab_size=300), Step37Config.preset("tiny"))


def write_set(folder: Path, shards: int = 3, samples: int = 4) -> Path:
    """Shards `s-0.tar`, ... with keys `0-0`, `0-1`, ...; captions differ in length."""
    for shard in range(shards):
        members = [m for i in range(samples) for m in sample(f"{shard}-{i}", 10 * shard + i, "a dog " * (i + 1))]
        tars.write(folder / f"s-{shard}.tar", members)
    return folder


def keep_time(path: Path, content: bytes) -> None:
    """Other content under the old time."""
    before = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def check_reading(index: ShardIndex) -> None:
    """Good samples can be read, bad ones say why not."""
    reader = ShardReader(index)
    for i in range(len(index)):
        problem = index.problem(i)
        if problem is None:
            assert len(reader.read(i).images) == len(index.image_sizes(i))
        else:
            with pytest.raises(BadSample) as caught:
                reader.read(i)
            assert caught.value.reason == problem and caught.value.key == index.key(i)
