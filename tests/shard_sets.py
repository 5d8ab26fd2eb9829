"""Small sets of shards for tests: rendered shapes with captions and conversations, indexed with token lengths."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from datamodules.shards.index import ShardIndex
from datamodules.shards.index_build import build_index
from datamodules.shards.lengths import add_lengths
from step37_lit.config import Step37Config
from step37_lit.processor import DEFAULT_PROMPT, Step37Processor
from step37_lit.tokenizer import Step37Tokenizer

WORDS = ("a", "red", "green", "small", "large", "dog", "cat", "house", "tree", "on", "under", "near", "the", "grass")


def picture(seed: int, width: int = 90, height: int = 70) -> bytes:
    """A JPEG that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def sample(number: int) -> dict[str, Any]:
    """By turns one caption, three captions, a text file and a conversation about two pictures."""
    random = np.random.default_rng([7, number])

    def words(low: int, high: int) -> str:
        return " ".join(random.choice(WORDS, size=random.integers(low, high)))

    key = f"sample{number:05d}"
    kind = number % 4
    if kind == 0:
        return {"__key__": key, "jpg": picture(number), "json": json.dumps({"captions": [words(3, 30)]}).encode()}
    if kind == 1:
        captions = [words(3, 20) for _ in range(3)]
        return {"__key__": key, "jpg": picture(number), "json": json.dumps({"captions": captions}).encode()}
    if kind == 2:
        return {"__key__": key, "jpg": picture(number, 60, 140), "txt": words(2, 40).encode()}
    question = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": words(2, 6)}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": words(2, 9)}] * 1
    turns += [{"role": "user", "content": words(2, 5)}, {"role": "assistant", "content": words(2, 9)}]
    images = {"0.jpg": picture(number), "1.jpg": picture(number + 10_000)}
    return {"__key__": key, **images, "json": json.dumps({"messages": turns}).encode()}


def write_shards(folder: Path, numbers: range, per_shard: int = 16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "part-%04d.tar")
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for number in numbers:
            writer.write(sample(number))


def tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    Step37Tokenizer.train([" ".join(WORDS), DEFAULT_PROMPT, "user\nassistant\n"] * 20, 400).save(path)
    return path


def index(folder: Path, tokenizer: Path, policy: str = "raise", multicrop: bool = False) -> None:
    """Indexes the shards in `folder` with token lengths for the tiny preset."""
    config = Step37Config.preset("tiny")
    processor = Step37Processor(Step37Tokenizer.from_file(tokenizer), config, multicrop=multicrop)
    add_lengths(build_index(folder, policy), processor, DEFAULT_PROMPT, policy)


def damage(folder: Path, number: int) -> str:
    """Flips a byte of a sample's first picture behind the index's back; gives its key."""
    shards = ShardIndex.open(folder)
    member = shards.members(number)[1]
    path = folder / shards.shards[shards.shard_of(number)].name
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(member.offset + member.size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return shards.key(number)
