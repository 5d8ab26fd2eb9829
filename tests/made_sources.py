"""Small sources of samples, and what is read from them, for the tests of sources."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from datamodules.shards.write_plan import Limit, plan_shards
from datamodules.shards.writer import members
from datamodules.sources.base import BadItem, Source
from datamodules.sources.detect import open_source

OUT = Path("/nowhere")
HEADER = "image,caption\n"
PICTURE, WORDS = {"type": "image"}, {"type": "text", "text": "Is it so?"}


def draw(path: Path, color: str = "red", format: str | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), color).save(path, format)
    return path.read_bytes()


def write(path: Path, content: str | bytes | dict | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, dict | list):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(source: Source) -> tuple[dict[str, dict[str, bytes]], list[str]]:
    """Members of every good sample by key, in order, and every bad one's line."""
    plan = plan_shards(source, Limit(shard_samples=100), "skip")
    samples, bad = {}, [str(bad) for bad in plan.skipped]
    for entry in plan.entries():
        try:
            samples[entry.key] = members(source, entry)
        except BadItem as error:
            bad.append(str(error))
    return samples, bad


def bad_lines(source: Source) -> list[str]:
    return [str(ref) for ref in _all(source) if isinstance(ref, BadItem)]


def _all(source: Source):
    for ref in source.refs():
        try:
            yield ref if isinstance(ref, BadItem) else source.item(ref)
        except BadItem as bad:
            yield bad


def opened(path: Path, format: str, root: Path | None = None) -> Source:
    return open_source(str(path), format, None if root is None else str(root), OUT)


def coco(tmp_path: Path, images: list, annotations: list) -> Path:
    return write(tmp_path / "captions_val.json", {"info": {}, "images": images, "annotations": annotations})


def turns(*parts: dict | str) -> list[dict]:
    return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "yes"}]


def jsonl(path: Path, *lines: dict | bytes) -> Path:
    return write(path, b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
