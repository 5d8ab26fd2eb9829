"""Pictures and tars for the tests of shards, made byte by byte where no writer would."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BLOCK = 512
Members = Iterable[tuple[str | tarfile.TarInfo, bytes]]


def picture(seed: int = 0, format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A file of noise in a few kilobytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def text(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def sample(key: str, seed: int = 0, caption: str = "a red ring") -> list[tuple[str, bytes]]:
    """Members of a good sample."""
    return [(f"{key}.jpg", picture(seed)), (f"{key}.json", text(captions=[caption, f"{caption} again"]))]


def tar(members: Members, format: int = tarfile.GNU_FORMAT) -> bytes:
    """The bytes of a tar; a `TarInfo` is written as it is."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members:
            info = name
            if isinstance(info, str):
                info = tarfile.TarInfo(info)
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    """A link, a device or a pipe."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header(name: bytes, size: int, kind: bytes = b"0", size_field: bytes | None = None) -> bytes:
    """A USTAR header with any bytes as its name."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:124] = b"0000644\0" + b"0000000\0" * 2
    block[124:136] = b"%011o\0" % size if size_field is None else size_field
    block[136:148] = b"%011o\0" % 0
    block[148:157] = b" " * 8 + kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    """Header and data of a member."""
    return header(name, len(data), kind) + padded(data)


def pax_record(name: bytes, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (name, value)
    size = len(rest) + len(str(len(rest)))
    size = len(rest) + len(str(size))
    return str(size).encode() + rest


def member_header(archive: bytes, name: str) -> int:
    """Where the header of a member is."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        return opened.getmember(name).offset_data - BLOCK


def end_of_members(archive: bytes) -> int:
    """Where the end-of-archive marker begins."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        last = opened.getmembers()[-1]
    return last.offset_data + last.size + -last.size % BLOCK


def write(path: Path, content: bytes | Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else tar(content))
    return path
