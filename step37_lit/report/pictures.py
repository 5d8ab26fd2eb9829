"""Small pictures of the validation split: written once by who captions them, shown in the report's gallery."""

from __future__ import annotations

import base64
import hashlib
import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from step37_lit.text_file import written_whole

FOLDER = Path("captions") / "pictures"
SIDE = 160  # pixels at most
QUALITY = 85
JPEG_START = b"\xff\xd8\xff"


def picture_path(run: Path, key: str, number: int = 0) -> Path:
    """Where a sample's picture lies; a key can be any text, so the name is its hash.

    Args:
        run: The run's folder.
        key: The sample's key.
        number: Of the picture in the sample.
    """
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return run / FOLDER / f"{digest}-{number}.jpg"


def save_picture(run: Path, key: str, pixels: np.ndarray, number: int = 0) -> None:
    """Writes a small JPEG, unless it is there already; the file is whole or absent.

    Args:
        run: The run's folder.
        key: The sample's key.
        pixels: [H, W, 3] uint8.
        number: Of the picture in the sample.
    """
    path = picture_path(run, key, number)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    with written_whole(path) as staged:
        picture.save(staged, "JPEG", quality=QUALITY)


def picture_uris(run: Path, key: str) -> tuple[str, ...]:
    """A sample's pictures as `data:` URIs; none where none were written."""
    paths = itertools.takewhile(Path.is_file, (picture_path(run, key, number) for number in itertools.count()))
    data = [path.read_bytes() for path in paths]
    return tuple(f"data:image/jpeg;base64,{base64.b64encode(d).decode()}" for d in data if d.startswith(JPEG_START))
