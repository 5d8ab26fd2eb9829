"""Encoded pictures -> RGB as a viewer shows them, or `ImageError`; never half a picture, never another format.

* EXIF orientation is applied.
* Transparency lies over white: most transparent pictures are drawings and text made for a white page, and black text
  would be lost on black.
* Gray, bilevel, palette and CMYK pictures (YCCK too; inverted, as Adobe writes them and viewers take them) become RGB.
  Colour profiles are not applied.
* 16-bit samples keep their high byte.
* Animations are refused: their captions may well be about what moves.

A decoder cannot see every damage: a flipped byte in the pixels of a JPEG or WebP often gives other pixels and no
error (PNG has checksums, and they are checked). Checksums of the shard are there for that.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from step37_lit.errors import require
from step37_lit.image_header import DEFAULT_MAX_PIXELS, ImageError, ImageHeader, read_header

__all__ = ["DEFAULT_MAX_PIXELS", "FORMATS", "SUFFIX_FORMATS", "ImageError", "ImageHeader", "open_image", "read_header"]

FORMATS = ("JPEG", "PNG", "WEBP")
SUFFIX_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}

# Classes by name, and not Image.open: that one asks every decoder it knows and takes JPEGs of several pictures apart.
_DECODERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
}
WHITE = (255, 255, 255)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """A whole picture, decoded.

    Args:
        data: The whole file.
        max_pixels: Largest width x height, checked in the header.

    Returns:
        Mode RGB, of the size that `read_header` gives, without metadata.

    Raises:
        ImageError: what `read_header` refuses, and what cannot be decoded to the end.
        ConfigError: some library has switched Pillow to hand out truncated pictures.
    """
    require(not ImageFile.LOAD_TRUNCATED_IMAGES, "PIL.ImageFile.LOAD_TRUNCATED_IMAGES", False, True)
    header = read_header(data, max_pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which is dropped
            rgb = _decoded(data, header)
    except ImageError:
        raise
    except Exception as error:  # on hostile bytes Pillow raises nearly everything there is
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"broken {header.format}: {reason}") from error
    if header.orientation != 1:
        rgb = rgb.transpose(_UPRIGHT[header.orientation])
    rgb.info = {}  # or whoever applies EXIF next would turn it again
    return rgb


def _decoded(data: bytes, header: ImageHeader) -> Image.Image:
    image = _DECODERS[header.format](io.BytesIO(data))
    # Where a file has two headers, the decoder may have taken the other one: asked before memory is.
    if image.size != header.stored_size:
        raise ImageError(f"broken {header.format}: headers of {header.stored_size} and of {image.size} pixels")
    image.load()
    return _rgb(image, data)


def _rgb(image: Image.Image, data: bytes) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("1", "L", "I;16", "RGB"):
        return _opaque_rgb(image, data)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    page = Image.new("RGB", image.size, WHITE)
    page.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return page


def _opaque_rgb(image: Image.Image, data: bytes) -> Image.Image:
    """RGB of modes without an alpha channel; in a PNG one colour may stand for full transparency."""
    key = image.info.pop("transparency", None)
    samples = np.asarray(image)
    if image.mode == "I;16":
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    rgb = image.convert("RGB")
    if key is not None:
        rgb.paste(WHITE, mask=Image.fromarray(_equals_key(samples, key, depth=data[24])))
    return rgb


def _equals_key(samples: np.ndarray, key: Any, depth: int) -> np.ndarray:
    """Where decoded samples [H, W] or [H, W, 3] have the colour that a PNG of `depth` bits calls transparent."""
    if samples.dtype == bool:
        return samples == bool(key)
    largest = 2**depth - 1
    colour = np.asarray(key) & largest
    if samples.dtype == np.uint8:  # Pillow has scaled the samples, not the key
        colour = colour >> 8 if depth == 16 else colour * 255 // largest
    equal = samples == colour
    return equal.all(axis=-1) if equal.ndim == 3 else equal
