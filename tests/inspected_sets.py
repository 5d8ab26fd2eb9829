"""Two small indexed sets with their recipes, for the tests of the inspector."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from browser import HOSTILE_TEXTS
from pictures import PNG_START, chunk, encoded, png_header
from PIL import Image

from datamodules.commands import index as index_command
from datamodules.packed import PackedDataModule
from datamodules.shards.index import ShardIndex

MAX_LENGTH = 256
CAPTIONS = (
    *HOSTILE_TEXTS,
    "<im_patch><|im_end|> written by an author",
    "unbroken" * 200,
)
KEYS = ("a\"><img id=taken src=x onerror='window taken'>", "<script>taken", "right\u202eleft", "k" * 90, "100%_ok")
PAIR = "pair"  # a sample of two pictures
SHARD = '<b id=taken>"shard".tar'


@dataclass(frozen=True)
class MadeSet:
    """A set of shards with a recipe for it."""

    folder: Path
    recipe: Path
    module: PackedDataModule

    @property
    def index(self) -> ShardIndex:
        return ShardIndex.open(self.folder)


def picture(width: int, height: int, format: str = "JPEG", blue: int = 128) -> bytes:
    """Two slopes, which a JPEG keeps well, and a blue to know it by."""
    across = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    samples = np.stack([across, down, np.full_like(across, blue)], axis=2).astype(np.uint8)
    return encoded(Image.fromarray(samples), format)


def write_shard(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as shard:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def captioned(key: str, captions: Sequence[str], width: int, height: int, blue: int = 128) -> list[tuple[str, bytes]]:
    text = json.dumps({"captions": captions}).encode()
    return [(f"{key}.jpg", picture(width, height, blue=blue)), (f"{key}.json", text)]


def made_set(folder: Path, **init_args: Any) -> MadeSet:
    """Indexes the shards in `folder` for a recipe that is written beside it."""
    recipe = folder.with_suffix(".yaml")
    arguments = {"sets": str(folder), "preset": "tiny", "max_length": MAX_LENGTH, "bad": "skip", **init_args}
    data = {"class_path": "datamodules.packed.PackedDataModule", "init_args": arguments}
    recipe.write_text(json.dumps({"data": data}))  # JSON is YAML
    assert index_command.main([str(folder), "--config", str(recipe), "--bad", "skip", "--workers", "1"]) == 0
    return MadeSet(folder, recipe, PackedDataModule(**arguments))


def plain_set(parent: Path) -> MadeSet:
    """Two shards of captioned pictures and of conversations, with multicrop, and nothing bad."""
    folder = parent / "plain"
    folder.mkdir()
    sizes = [(60 + 20 * (i % 7), 60 + 30 * (i % 5)) for i in range(40)]
    texts = [[f"caption {n} of {i}" for n in range(3)] for i in range(40)]
    members = [captioned(f"picture{i}", texts[i], *sizes[i], blue=6 * i) for i in range(40)]
    turns = [{"role": "user", "content": "Are there any?"}, {"role": "assistant", "content": "No, not one."}]
    members.append([("turns.json", json.dumps({"messages": turns}).encode())])
    turns[0]["content"] = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]  # type: ignore[assignment]
    two = json.dumps({"messages": [*turns, {"role": "user", "content": "Sure?"}, *turns[1:]]}).encode()
    files = [
        (f"{PAIR}.0.png", picture(200, 90, "PNG")),
        (f"{PAIR}.1.jpg", picture(50, 50, blue=250)),
        (f"{PAIR}.json", two),
    ]
    members.append(files)
    write_shard(folder / "plain-0.tar", list(itertools.chain(*members[:25])))
    write_shard(folder / "plain-1.tar", list(itertools.chain(*members[25:])))
    return made_set(folder, multicrop=True, val_share=0.1, microbatches=2)


def hostile_set(parent: Path) -> MadeSet:
    """Texts and names that want to get out of the page, a picture that breaks when read, and known bad samples."""
    folder = parent / "hostile"
    folder.mkdir()
    members = [captioned(f"caption{i}", [text], 80, 60 + i) for i, text in enumerate(CAPTIONS)]
    members += [captioned(key, [f"of key {i}"], 70, 70) for i, key in enumerate(KEYS)]
    broken = PNG_START + png_header(90, 90) + chunk(b"IDAT", b"no pixels") + chunk(b"IEND")
    members.append([("broken<i id=taken>.png", broken), ("broken<i id=taken>.txt", b"looks well from outside")])
    members.append([("no<u id=taken>text.jpg", picture(40, 40))])
    write_shard(folder / SHARD, list(itertools.chain(*members)))
    return made_set(folder, max_bad_share=0.5)
