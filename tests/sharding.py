"""A small source of pictures and the command that shards it, for the tests of writing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from datamodules.commands.shard import main
from tests.conftest import SEED

REPOSITORY = Path(__file__).parents[1]
PHOTOGRAPHS = Path(__file__).parents[2] / "shared" / "flickr8k-mini"
COMMAND = "import sys; from datamodules.commands.shard import main; sys.exit(main(sys.argv[1:]))"
NUMBER, PER_SHARD = 60, 4


def make_source(folder: Path, number: int = NUMBER, side: int = 240) -> Path:
    """Flickr8k's layout with pictures of noise and two captions each."""
    noise = np.random.default_rng(SEED)
    (folder / "images").mkdir(parents=True)
    lines = ["image,caption"]
    for i in range(number):
        pixels = noise.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03d}.jpg")
        lines += [f"{i:03d}.jpg,picture {i}", f'{i:03d}.jpg,"noise, again"']
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder


def shard(source: Path, out: Path, *options: str, workers: int = 1) -> int:
    return main([str(source), str(out), "--shard-samples", str(PER_SHARD), "--workers", str(workers), *options])


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of everything whose bytes are promised."""
    paths = [*out.glob("*.tar"), *out.glob("skipped.txt")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}


def read(out: Path) -> list[dict]:
    shards = sorted(str(path) for path in out.glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False, handler=webdataset.reraise_exception))
