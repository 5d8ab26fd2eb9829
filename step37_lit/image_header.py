"""What an encoded picture says about itself: format, size and orientation, read without decoding anything.

The walkers below look at markers, chunks and lengths only. They refuse what is cut off, what is animated and what is
too large before a decoder sees a byte of it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

DEFAULT_MAX_PIXELS = 2**26  # 8192 x 8192; 192 MiB as RGB
MAX_SIDE = 65_535  # JPEG's own limit
MAX_JPEG_SCANS = 100  # encoders write 20 at most; each one costs a pass over all pixels

# How files of other kinds begin, so that the reason can name them.
OTHER_FORMATS = {
    b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%!PS": "EPS", b"%PDF": "PDF", b"<svg": "SVG",
    b"<?xml": "SVG or other XML", b"8BPS": "PSD", b"\0\0\1\0": "ICO", b"\0\0\0\x0cjP  ": "JPEG 2000",
    **{b"P%d" % kind: "PPM" for kind in range(1, 8)},
}  # fmt: skip


class ImageError(ValueError):
    """A picture that cannot be used; the message is the reason in one line."""


@dataclass(frozen=True)
class ImageHeader:
    """
    Args:
        format: `JPEG`, `PNG` or `WEBP`, by content.
        width: Pixels, as the picture is shown (after EXIF orientation).
        height: Pixels, as the picture is shown.
        orientation: EXIF orientation, 1 to 8; 1 where there is none or where it cannot be read, as viewers do.
    """

    format: str
    width: int
    height: int
    orientation: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the encoded picture, before orientation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageHeader:
    """Format, size and orientation of a JPEG, PNG or WebP file.

    Args:
        data: The whole file.
        max_pixels: Largest width x height.

    Raises:
        ImageError: another format, cut off, animated, a checksum that is wrong (PNG), too many pixels or scans.
    """
    name = _format_of(data)
    try:
        width, height, orientation = _WALKERS[name](data)
    except (struct.error, IndexError) as error:
        raise ImageError(f"truncated {name}: the file ends within its header") from error
    if min(width, height) < 1:
        raise ImageError(f"{name} of {width} x {height} pixels")
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise ImageError(f"{name} of {width} x {height} pixels, at most {max_pixels} and {MAX_SIDE} a side are allowed")
    if orientation >= 5:
        width, height = height, width
    return ImageHeader(name, width, height, orientation)


def _format_of(data: bytes) -> str:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if not data:
        raise ImageError("an empty file, expected JPEG, PNG or WEBP")
    if data[4:8] == b"ftyp":
        raise ImageError("format AVIF, HEIC or video, expected JPEG, PNG or WEBP")
    for start, name in OTHER_FORMATS.items():
        if data.startswith(start):
            raise ImageError(f"format {name}, expected JPEG, PNG or WEBP")
    raise ImageError(f"not a picture, begins with {data[:8]!r}, expected JPEG, PNG or WEBP")


def _walk_jpeg(data: bytes) -> tuple[int, int, int]:
    """(width, height, orientation); the segments before the first scan, and whether the last one ends."""
    size, orientation, at = None, 1, 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0:
            raise ImageError("truncated JPEG: the file ends before its first scan")
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:  # without a length
            at += 2
        elif marker == 0xD9:
            raise ImageError("truncated JPEG: its end stands before its first scan")
        elif marker == 0xDA:
            break
        else:
            (length,) = struct.unpack_from(">H", data, at + 2)
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
                size = struct.unpack_from(">HH", data, at + 5)
            elif marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0" and orientation == 1:
                orientation = _orientation(data[at + 10 : at + 2 + length])
            at += 2 + length
    if size is None:
        raise ImageError("broken JPEG: a scan without a frame header")
    if data.rfind(b"\xff\xd9", at) < 0:
        raise ImageError("truncated JPEG: no end of image")
    # Within a scan a zero follows every 0xFF, so that these two bytes are a marker.
    scans = data.count(b"\xff\xda", at)
    if scans > MAX_JPEG_SCANS:
        raise ImageError(f"JPEG of {scans} scans, at most {MAX_JPEG_SCANS} are allowed")
    return size[1], size[0], orientation


def _walk_png(data: bytes) -> tuple[int, int, int]:
    """(width, height, orientation); all chunks, since EXIF may stand behind the pixels."""
    if data[12:16] != b"IHDR":
        raise ImageError("broken PNG: it does not begin with IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    view, orientation, at, kind = memoryview(data), 1, 8, b""
    while kind != b"IEND":
        if at == len(data):
            raise ImageError("truncated PNG: no IEND")
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise ImageError(f"truncated PNG: the file ends within {kind!r}")
        if kind in (b"acTL", b"fcTL", b"fdAT"):
            raise ImageError("animated PNG, expected a still picture")
        # Decoders stop at the last row and never look at the checksum of the pixels.
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise ImageError(f"broken PNG: the checksum of {kind!r} is wrong")
        if kind == b"eXIf":
            orientation = _orientation(data[at + 8 : end - 4])
        at = end
    return width, height, orientation


def _walk_webp(data: bytes) -> tuple[int, int, int]:
    """(width, height, orientation); all chunks, since EXIF stands behind the pixels."""
    (length,) = struct.unpack_from("<I", data, 4)
    end = 8 + length
    if end > len(data):
        raise ImageError(f"truncated WEBP: {len(data)} of {end} bytes")
    size = _webp_size(data)
    orientation, at = 1, 12
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind in (b"ANIM", b"ANMF"):
            raise ImageError("animated WEBP, expected a still picture")
        if kind == b"EXIF":
            orientation = _orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    return *size, orientation


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":  # lossy: start code, then 14 bits each
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and data[20] == 0x2F:  # lossless: signature, then 14 bits each, less one
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":  # extended: 24 bits each, less one
        if data[20] & 0x02:
            raise ImageError("animated WEBP, expected a still picture")
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    raise ImageError(f"broken WEBP: no header of a picture in its first chunk {kind!r}")


def _orientation(tiff: bytes) -> int:
    """Orientation in an EXIF block (TIFF); 1 where it is absent or unreadable."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


_WALKERS = {"JPEG": _walk_jpeg, "PNG": _walk_png, "WEBP": _walk_webp}
