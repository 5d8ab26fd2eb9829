"""Pictures from outside: every colour mode and orientation as a viewer shows it."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from conftest import SEED
from pictures import ENCODINGS, blocks, chunk, encoded, noise, opened, png, tiff
from PIL import Image

from step37_lit.images import FORMATS, SUFFIX_FORMATS, read_header

RANDOM = np.random.default_rng(SEED)


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """[..., 3] and alpha [...], 0..255, over white paper."""
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def values(*shape: int, largest: int = 255) -> np.ndarray:
    return RANDOM.integers(0, largest + 1, shape)


def gray(samples: np.ndarray) -> np.ndarray:
    return np.repeat(samples[..., None], 3, axis=-1)


def flat_jpeg(mode: str, colour: tuple[int, ...]) -> bytes:
    return encoded(Image.new(mode, (16, 16), colour), "JPEG", quality=100)


def png_modes() -> dict[str, tuple[bytes, np.ndarray]]:
    """For each kind of PNG its bytes and what a viewer shows."""
    g1, g2, g4, g8, g16 = (values(9, 13, largest=2**depth - 1) for depth in (1, 2, 4, 8, 16))
    rgb, rgba, la = values(9, 13, 3), values(9, 13, 4), values(9, 13, 2)
    rgb16, rgba16, la16 = (values(9, 13, channels, largest=65535) for channels in (3, 4, 2))
    palette, alphas = values(16, 3), values(16)
    plte = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
    soft, hard = chunk(b"tRNS", bytes(alphas.tolist())), chunk(b"tRNS", b"\xff\xff\xff\0")
    one_gone = np.where(np.arange(16) == 3, 0, 255)
    key8, key2, key16 = int(g8[2, 3]), 2, int(g16[4, 4])

    def keyed(key: int) -> bytes:
        return chunk(b"tRNS", struct.pack(">H", key))

    def without(samples: np.ndarray, key: int, shown: np.ndarray) -> np.ndarray:
        return over_white(gray(shown), np.where(samples == key, 0, 255))

    def colour_key(samples: np.ndarray) -> bytes:
        return chunk(b"tRNS", struct.pack(">HHH", *samples[5, 5].tolist()))

    def without_colour(shown: np.ndarray) -> np.ndarray:
        return over_white(shown, np.where((shown == shown[5, 5]).all(-1), 0, 255))

    return {
        "1 bit": (png(g1, 1, 0), gray(g1 * 255)),
        "1 bit, black transparent": (png(g1, 1, 0, keyed(0)), gray(0 * g1 + 255)),
        "2 bit": (png(g2, 2, 0), gray(g2 * 85)),
        "2 bit, one level transparent": (png(g2, 2, 0, keyed(key2)), without(g2, key2, g2 * 85)),
        "4 bit": (png(g4, 4, 0), gray(g4 * 17)),
        "gray": (png(g8, 8, 0), gray(g8)),
        "gray, one level transparent": (png(g8, 8, 0, keyed(key8)), without(g8, key8, g8)),
        "16 bit gray": (png(g16, 16, 0), gray(g16 >> 8)),
        "16 bit gray, one level transparent": (png(g16, 16, 0, keyed(key16)), without(g16, key16, g16 >> 8)),
        "RGB": (png(rgb, 8, 2), rgb),
        "RGB, one colour transparent": (png(rgb, 8, 2, colour_key(rgb)), without_colour(rgb)),
        "16 bit RGB": (png(rgb16, 16, 2), rgb16 >> 8),
        "16 bit RGB, one colour transparent": (png(rgb16, 16, 2, colour_key(rgb16)), without_colour(rgb16 >> 8)),
        "palette": (png(g4, 4, 3, plte), palette[g4]),
        "palette, soft": (png(g4, 4, 3, plte + soft), over_white(palette[g4], alphas[g4])),
        "palette, one entry transparent": (png(g4, 4, 3, plte + hard), over_white(palette[g4], one_gone[g4])),
        "gray and alpha": (png(la, 8, 4), over_white(gray(la[..., 0]), la[..., 1])),
        "16 bit gray and alpha": (png(la16, 16, 4), over_white(gray(la16[..., 0] >> 8), la16[..., 1] >> 8)),
        "RGBA": (png(rgba, 8, 6), over_white(rgba[..., :3], rgba[..., 3])),
        "16 bit RGBA": (png(rgba16, 16, 6), over_white(rgba16[..., :3] >> 8, rgba16[..., 3] >> 8)),
    }


PNG_MODES = png_modes()


@pytest.mark.parametrize("kind", PNG_MODES)
def test_every_kind_of_png_is_shown_as_a_viewer_does(kind: str) -> None:
    data, expected = PNG_MODES[kind]
    assert np.abs(opened(data) - expected).max() <= 0.5 + 1e-9  # rounding of the mixture


def ycck_jpeg(y: int, cb: int, cr: int, k: int) -> bytes:
    """Pillow writes CMYK inverted and cannot write YCCK: four bands and the mark of Adobe's that says what they are."""
    data = bytearray(flat_jpeg("CMYK", (255 - y, 255 - cb, 255 - cr, 255 - k)))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def shown_ycck(y: int, cb: int, cr: int, k: int) -> tuple[float, ...]:
    """YCbCr -> RGB by JFIF; Adobe's inverted CMY is 255 less that, and its inverted K multiplies it."""
    red, green, blue = (
        y + 1.402 * (cr - 128),
        y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
        y + 1.772 * (cb - 128),
    )
    return tuple((255 - min(max(level, 0), 255)) * k / 255 for level in (red, green, blue))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (flat_jpeg("L", (77,)), (77, 77, 77)),
        (flat_jpeg("RGB", (200, 30, 60)), (200, 30, 60)),
        (flat_jpeg("CMYK", (200, 30, 60, 40)), (55 * 215 / 255, 225 * 215 / 255, 195 * 215 / 255)),
        (ycck_jpeg(120, 90, 170, 200), shown_ycck(120, 90, 170, 200)),
    ],
    ids=["gray", "RGB", "CMYK", "YCCK"],
)
def test_every_kind_of_jpeg_is_shown_as_a_viewer_does(data: bytes, expected: tuple[float, ...]) -> None:
    assert np.abs(opened(data) - expected).max() <= 2  # JPEG's own rounding


def test_webp_with_and_without_transparency() -> None:
    rgba = values(9, 13, 4).astype(np.uint8)
    for channels in (3, 4):
        data = encoded(Image.fromarray(rgba[..., :channels]), "WEBP", lossless=True, exact=True)
        alpha = rgba[..., 3] if channels == 4 else np.full((9, 13), 255)
        assert np.abs(opened(data) - over_white(rgba[..., :3], alpha)).max() <= 0.5 + 1e-9


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_orientation_is_applied(orientation: int, order: str) -> None:
    stored = blocks()
    picture, exif = Image.fromarray(stored), tiff(orientation, order)
    files = [
        encoded(picture, "JPEG", quality=100, subsampling=0, exif=b"Exif\0\0" + exif),
        png(stored, 8, 2, before=chunk(b"eXIf", exif)),
        png(stored, 8, 2, after=chunk(b"eXIf", exif)),
        encoded(picture, "WEBP", lossless=True, exif=exif),
        encoded(picture, "WEBP", lossless=True, exif=b"Exif\0\0" + exif),
    ]
    expected = TURNED[orientation](stored).astype(int)
    for data in files:
        assert read_header(data).orientation == orientation
        shown = opened(data)
        assert shown.shape == expected.shape and np.abs(shown - expected).max() <= 3  # JPEG's rounding


@pytest.mark.parametrize(
    "exif",
    [tiff(0), tiff(9), tiff(6, kind=4), b"", b"II", tiff(6)[:20], b"II*\0" + struct.pack("<I", 2**32 - 1), b"XX" * 9],
    ids=["0", "9", "no short", "empty", "two bytes", "cut", "far", "no order"],
)
def test_unreadable_exif_leaves_a_picture_as_it_is(exif: bytes) -> None:
    assert (opened(png(blocks(), 8, 2, before=chunk(b"eXIf", exif))) == blocks()).all()
    jpeg = encoded(Image.fromarray(blocks()), "JPEG", exif=b"Exif\0\0" + exif)
    assert opened(jpeg).shape == blocks().shape


def test_a_jpeg_of_several_pictures_is_its_first() -> None:
    data = encoded(Image.fromarray(blocks()), "MPO", save_all=True, append_images=[noise(48, 32)], quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "MPO"
    assert np.abs(opened(data) - blocks()).mean() < 10


def test_formats_are_told_by_content_and_suffixes_name_them() -> None:
    assert set(SUFFIX_FORMATS.values()) == set(FORMATS) == {read_header(data).format for data in ENCODINGS.values()}
