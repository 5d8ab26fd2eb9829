"""Pictures that must not be opened: other formats, cut off, damaged, and made to take memory or time."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import SEED
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from pictures import ENCODINGS, PNG_START, SMALL, blocks, chunk, encoded, noise, opened, png, png_header
from PIL import ImageFile

from step37_lit.errors import ConfigError
from step37_lit.images import ImageError, open_image, read_header

REPOSITORY = Path(__file__).parents[1]


OTHER_FORMATS = {
    "GIF": encoded(SMALL, "GIF"),
    "BMP": encoded(SMALL, "BMP"),
    "TIFF": encoded(SMALL, "TIFF"),
    "EPS": encoded(SMALL, "EPS"),
    "PPM": encoded(SMALL, "PPM"),
    "ICO": encoded(SMALL, "ICO"),
    "JPEG 2000": encoded(SMALL, "JPEG2000"),
    "AVIF": encoded(SMALL, "AVIF"),
    "PDF": encoded(SMALL, "PDF"),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_refused_by_name(name: str) -> None:
    for function in (read_header, open_image):
        with pytest.raises(ImageError, match=f"^format {name}.*, expected JPEG, PNG or WEBP$"):
            function(OTHER_FORMATS[name])


def test_no_decoder_of_another_format_is_even_imported(tmp_path: Path) -> None:
    for name, data in OTHER_FORMATS.items():
        (tmp_path / name).write_bytes(data)
    program = (
        "import pathlib, sys; from step37_lit.images import ImageError, open_image\n"
        "for file in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: open_image(file.read_bytes())\n"
        "    except ImageError: continue\n"
        "    raise SystemExit(f'{file.name} was opened')\n"
        "print(*sorted(name for name in sys.modules if name.startswith('PIL.') and name.endswith('ImagePlugin')))"
    )
    done = run(program, str(tmp_path))
    assert set(done.split()) <= {"PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.WebPImagePlugin"}


def run(program: str, *arguments: str) -> str:
    """Output of a Python program; its failure is one of the test."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"this is a caption, not a picture", "not a picture, begins with b'this is '"),
        (b"\xff\xd8\xff", "truncated JPEG"),
        (PNG_START, "broken PNG: it does not begin with IHDR"),
        (b"RIFF\x04\0\0\0WEBP", "broken WEBP: no header of a picture"),
        (b"RIFF\x40\0\0\0WEBP", "truncated WEBP: 12 of 72 bytes"),
        (PNG_START + png_header(0, 9) + chunk(b"IEND"), "PNG of 0 x 9 pixels"),
        (PNG_START + png_header(9, 9) + chunk(b"IEND"), "broken PNG"),
        (encoded(noise(70_000, 1), "PNG"), "70000 x 1 pixels, at most .* 65535 a side"),
    ],
)
def test_what_is_no_picture_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as error:
        open_image(data)
    assert "\n" not in str(error.value)


def test_the_pixel_limit_is_for_what_is_read_and_may_be_changed() -> None:
    data = encoded(SMALL, "PNG")
    assert open_image(data, max_pixels=960).size == (40, 24)
    for function in (read_header, open_image):
        with pytest.raises(ImageError, match="PNG of 40 x 24 pixels, at most 959"):
            function(data, max_pixels=959)


def test_animations_are_refused() -> None:
    frames = [noise(8, 8, seed) for seed in range(3)]
    for name in ("PNG", "WEBP"):
        data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
        for function in (read_header, open_image):
            with pytest.raises(ImageError, match=f"animated {name}, expected a still picture"):
                function(data)
    # without the announcement, Pillow would take the frame's corner for the picture
    stray = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 1, 0, 0))
    with pytest.raises(ImageError, match="animated PNG"):
        open_image(png(blocks(), 8, 2, before=stray))


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG that claims to be larger."""
    data = bytearray(ENCODINGS["JPEG"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_header(side: int) -> bytes:
    size = struct.pack("<I", side - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, 0) + size + size + ENCODINGS["lossy WebP"][12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def hostile() -> dict[str, bytes]:
    """A few kilobytes each."""
    zeros = zlib.compress(bytes(200 * 2**20), 9)  # 200 MiB
    text = chunk(b"zTXt", b"Comment\0\0" + zeros)
    profile = chunk(b"iCCP", b"profile\0\0" + zeros)
    scan = ENCODINGS["progressive JPEG"]
    first = scan.index(b"\xff\xda")
    second = scan.index(b"\xff\xda", first + 2)
    pixels = chunk(b"IDAT", zlib.compress(bytes(4000)))
    two = PNG_START + png_header(9, 9) + png_header(50_000, 50_000) + pixels + chunk(b"IEND")
    return {
        "PNG of 50,000 x 50,000": PNG_START + png_header(50_000, 50_000) + pixels + chunk(b"IEND"),
        "PNG of two sizes": two,
        "JPEG of 65,500 x 65,500": jpeg_header(65_500, 65_500),
        "WebP of 16,384 x 16,384": webp_header(16_384),
        "JPEG of 20,001 scans": scan[:second] + scan[first:second] * 20_000 + scan[second:],
        "PNG with 200 MiB of text": png(blocks(), 8, 2, before=text),
        "PNG with 200 MiB of text at its end": png(blocks(), 8, 2, after=text),
        "PNG with a profile of 200 MiB": png(blocks(), 8, 2, before=profile),
    }


def test_bombs_take_neither_memory_nor_time(tmp_path: Path) -> None:
    """In a process that may grow by 48 MiB and has 20 seconds for all of them."""
    bombs = hostile()
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    program = (
        "import pathlib, resource, sys\n"
        "from step37_lit.images import ImageError, open_image\n"
        "held = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 48 * 2**20,) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "for file in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    try: print(file.name, open_image(file.read_bytes()).size, sep='|')\n"
        "    except ImageError as error: print(file.name, error, sep='|')\n"
    )
    said = dict(line.split("|") for line in run(program, str(tmp_path)).splitlines())
    assert set(said) == set(bombs)
    assert "50000 x 50000 pixels, at most" in said["PNG of 50,000 x 50,000"]
    assert "headers of (9, 9) and of (50000, 50000)" in said["PNG of two sizes"]
    assert "65500 x 65500 pixels, at most" in said["JPEG of 65,500 x 65,500"]
    assert "16384 x 16384 pixels, at most" in said["WebP of 16,384 x 16,384"]
    assert "scans, at most 100" in said["JPEG of 20,001 scans"]
    for name in ("PNG with 200 MiB of text", "PNG with 200 MiB of text at its end", "PNG with a profile of 200 MiB"):
        assert "broken PNG: Decompressed data too large" in said[name]


@pytest.mark.parametrize("kind", ENCODINGS)
def test_every_cut_is_seen_in_the_header_or_by_the_decoder(kind: str) -> None:
    data = ENCODINGS[kind]
    for length in range(len(data)):
        with pytest.raises(ImageError) as error:
            open_image(data[:length])
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
        if length >= 16:
            with pytest.raises(ImageError, match="truncated"):
                read_header(data[:length])


@pytest.mark.parametrize("kind", ENCODINGS)
def test_what_cameras_put_behind_a_picture_is_left_alone(kind: str) -> None:
    assert (opened(ENCODINGS[kind] + b"\0trailer\xff" * 20) == opened(ENCODINGS[kind])).all()


def test_any_wrong_byte_in_the_pixels_of_a_png_is_seen() -> None:
    data = ENCODINGS["PNG"]
    start = data.index(b"IDAT")
    for at in range(start - 4, data.index(b"IEND") - 4):
        broken = bytearray(data)
        broken[at] ^= 0x10
        with pytest.raises(ImageError):
            read_header(bytes(broken))


def survives(data: bytes) -> None:
    """A whole picture of the size that the header promises, or `ImageError`; no warning, nothing else."""
    try:
        opened(data)
    except ImageError as error:
        assert str(error).isprintable()


@seed(SEED)
@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(sorted(ENCODINGS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
)
def test_random_bytes_in_a_picture(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(ENCODINGS[kind])
    for place, value in changes:
        data[int(place * len(data))] = value
    survives(bytes(data))


@seed(SEED)
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"pHYs", b"fdAT"]
    ),
    st.binary(max_size=40),
    st.booleans(),
)
def test_random_chunks_with_right_checksums_in_a_png(kind: bytes, content: bytes, first: bool) -> None:
    """Behind the checksum, where the decoder has to look after itself."""
    part = chunk(kind, content)
    indices, colours = np.arange(117).reshape(9, 13) % 16, chunk(b"PLTE", bytes(range(48)))
    survives(png(indices, 4, 3, before=colours + part * first, after=part * (not first)))
    if kind in (b"IHDR", b"IDAT"):
        survives(PNG_START + (part if kind == b"IHDR" else png_header(9, 9) + part) + chunk(b"IEND"))


@seed(SEED)
@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"\xff\xd8\xff", PNG_START, b"RIFF\x50\0\0\0WEBP", b""]), st.binary(max_size=100))
def test_random_bytes_behind_a_beginning(start: bytes, rest: bytes) -> None:
    survives(start + rest)


def test_a_library_that_asks_pillow_for_halves_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ConfigError, match="LOAD_TRUNCATED_IMAGES: expected False, found True"):
        open_image(ENCODINGS["PNG"])
