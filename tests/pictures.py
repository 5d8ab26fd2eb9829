"""Encoded pictures for tests, written by hand where Pillow cannot write them (or should not be its own judge)."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
from PIL import Image

from step37_lit.images import open_image, read_header

PNG_START = b"\x89PNG\r\n\x1a\n"


def encoded(image: Image.Image, name: str, **options: Any) -> bytes:
    """A picture as Pillow writes it."""
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def blocks(side: int = 16) -> np.ndarray:
    """uint8 [2 side, 3 side, 3]: six colours that tell all eight orientations apart."""
    colours = np.array(
        [[(250, 10, 20), (20, 240, 30), (30, 40, 230)], [(0, 0, 0), (255, 255, 255), (128, 128, 128)]], dtype=np.uint8
    )
    return colours.repeat(side, 0).repeat(side, 1)


def noise(width: int, height: int, seed: int = 5) -> Image.Image:
    """A picture without two equal pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def png(samples: np.ndarray, depth: int, colour: int, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of raw samples [H, W] or [H, W, channels].

    Args:
        samples: Values of `depth` bits.
        depth: 1, 2, 4, 8 or 16.
        colour: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA.
        before: Chunks before the pixels.
        after: Chunks behind them.
    """
    height, width = samples.shape[:2]
    flat = samples.reshape(height, -1)
    if depth < 8:
        bits = flat[..., None] >> np.arange(depth - 1, -1, -1) & 1
        rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    else:
        rows = np.frombuffer(flat.astype(">u2" if depth == 16 else "u1").tobytes(), np.uint8).reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    pixels = chunk(b"IDAT", zlib.compress(raw))
    return PNG_START + png_header(width, height, depth, colour) + before + pixels + after + chunk(b"IEND")


def tiff(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """An EXIF block with another tag and then the orientation."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(order + "HHII", 0x0100, 4, 1, 7) + struct.pack(
        order + "HHIHH", 0x0112, kind, 1, orientation, 0
    )
    return start + struct.pack(order + "IH", 8, 2) + entries + struct.pack(order + "I", 0)


def opened(data: bytes) -> np.ndarray:
    """Pixels of a picture, with the promises that hold for every picture checked."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, header = open_image(data), read_header(data)
    assert image.mode == "RGB" and image.size == (header.width, header.height) and not image.info
    return np.asarray(image).astype(int)


SMALL = noise(40, 24)
ENCODINGS = {
    "JPEG": encoded(SMALL, "JPEG"),
    "progressive JPEG": encoded(SMALL, "JPEG", progressive=True),
    "PNG": encoded(SMALL, "PNG"),
    "palette PNG": encoded(SMALL.quantize(16), "PNG", transparency=3),
    "lossy WebP": encoded(SMALL, "WEBP"),
    "lossless WebP": encoded(SMALL.convert("RGBA"), "WEBP", lossless=True, exif=tiff(6)),
}
