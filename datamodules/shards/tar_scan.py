"""One strict pass over a tar: every member with its place and CRC-32, and every damage.

`tarfile` ends without a word at a header whose checksum is wrong, at a missing end-of-archive marker and behind the
first of two joined archives; it follows chains of extended headers as deep as they go. Here each of these is an event,
and what lies behind a damage is found again by its header. Formats: USTAR, GNU (long names, base-256 sizes), PAX.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32

BLOCK = 512
CHUNK = 1 << 20
MAX_MEMBER_BYTES = 128 << 20  # of members whose bytes are handed on
MAX_EXTENDED_BYTES = 1 << 20  # of a PAX header or a long name
MAX_NAME_BYTES = 4096
ZEROS = bytes(BLOCK)

REGULAR = (b"0", b"\0", b"7")
DIRECTORY = b"5"
LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL = b"L", b"K", b"x", b"g"
WITHOUT_DATA = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
}


class TarMember(NamedTuple):
    """A member other than a directory.

    Attributes:
        name: As written; bytes that are no UTF-8 are escaped, and names over `MAX_NAME_BYTES` shortened.
        offset: Of the data in the file.
        size: Of the data.
        crc32: Of the data.
        data: The bytes; None where there are more than `MAX_MEMBER_BYTES`.
        problem: Why it must not be used, or None.
    """

    name: str
    offset: int
    size: int
    crc32: int
    data: bytes | None
    problem: str | None


class TarDamage(NamedTuple):
    """Where the archive itself is broken; the members before and behind may have lost others beside them."""

    offset: int
    reason: str


class TarScan:
    """Iterates over a tar: `TarMember` and `TarDamage` in the order of the file.

    Args:
        read: `read(n)` gives up to n bytes, and none at the end of the file.

    Attributes:
        size: Bytes of the file; whole once the iterator has ended.
    """

    def __init__(self, read: Callable[[int], bytes]):
        self._read_some, self.size, self._digest = read, 0, hashlib.sha256()
        self._pending = _Pending()

    @property
    def sha256(self) -> str:
        """Of the bytes read so far, in hexadecimal digits."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[TarMember | TarDamage]:
        ended = False  # a block of zeros was read
        while block := self._read(BLOCK):
            start = self.size - len(block)
            if not block.strip(b"\0"):
                ended = True
                continue
            header = _parse_header(block)
            if header is None and start == 0:
                self._skip(None)
                yield TarDamage(0, "not a tar: no header at its beginning")
                return
            if header is None:
                reason = "data behind the end of the archive" if ended else _header_damage(block)
                header = self._find_header()
                skipped = self.size - start - (BLOCK if header else 0)
                yield TarDamage(start, f"{reason} at byte {start}; {skipped} bytes skipped")
                self._pending = _Pending()
            elif ended:
                yield TarDamage(start, f"another archive behind the end of the archive at byte {start}")
            if header is None:
                return
            ended = False
            yield from self._content(header)
        if self.size == 0:
            yield TarDamage(0, "an empty file (0 bytes)")
        elif not ended:
            yield TarDamage(self.size, f"cut off at byte {self.size}: no end-of-archive marker")

    def _content(self, header: _Header) -> Iterator[TarMember | TarDamage]:
        """What a header stands for; extended headers are kept for the member that follows."""
        pending = self._pending
        if header.kind in (LONG_NAME, LONG_LINK, PAX, PAX_GLOBAL):
            start = self.size - BLOCK
            data = self._read_padded(header.size) if header.size <= MAX_EXTENDED_BYTES else None
            if data is None:
                self._skip(header.size + -header.size % BLOCK)
                pending.problem = f"an extended header of {header.size} bytes, at most {MAX_EXTENDED_BYTES}"
            elif header.kind == PAX_GLOBAL:
                if {"path", "size"} & set(_parse_pax(data) or ()):
                    yield TarDamage(start, f"a global header with a name or size at byte {start}")
            else:
                pending.take(header.kind, data)
            return
        self._pending = _Pending()
        name = pending.name if pending.name is not None else header.name
        size = pending.size if pending.size is not None else header.size
        if header.kind == DIRECTORY or (header.kind == b"\0" and name.endswith(b"/")):
            return
        text, problem = _readable_name(name)
        problem = pending.problem or problem
        if header.kind in WITHOUT_DATA:
            yield TarMember(text, self.size, 0, 0, b"", f"{WITHOUT_DATA[header.kind]}, expected a regular file")
            return
        if header.kind not in REGULAR:
            problem = problem or f"tar type {header.kind!r}, expected a regular file"
        yield self._member(text, size, problem)

    def _member(self, name: str, size: int, problem: str | None) -> TarMember:
        offset, data = self.size, None
        if size <= MAX_MEMBER_BYTES:
            data = self._read(size)
            crc = crc32(data)
        else:
            crc = self._skip(size)
        found = self.size - offset
        if found < size:
            problem = problem or f"cut off: {found} of {size} bytes"
        self._read(-size % BLOCK)
        return TarMember(name, offset, found, crc, data, problem)

    def _find_header(self) -> _Header | None:
        """Reads on until a block is a header; None at the end of the file."""
        while block := self._read(BLOCK):
            if block[257:262] == b"ustar" and (header := _parse_header(block)) is not None:
                return header
        return None

    def _read(self, size: int) -> bytes:
        """`size` bytes, or all that are left."""
        pieces = []
        while size > 0 and (piece := self._read_some(size)):
            self._digest.update(piece)
            self.size += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_padded(self, size: int) -> bytes:
        return self._read(size + -size % BLOCK)[:size]

    def _skip(self, size: int | None) -> int:
        """CRC-32 of `size` bytes (None: of all that are left), which are not kept."""
        crc, end = 0, None if size is None else self.size + size
        while chunk := self._read(CHUNK if end is None else min(CHUNK, end - self.size)):
            crc = crc32(chunk, crc)
        return crc


@dataclass
class _Pending:
    """What extended headers say about the next member."""

    name: bytes | None = None
    size: int | None = None
    problem: str | None = None

    def take(self, kind: bytes, data: bytes) -> None:
        if kind == LONG_NAME:
            self.name = data.rstrip(b"\0")
        if kind != PAX:
            return
        records = _parse_pax(data)
        if records is None:
            self.problem = "a damaged extended header"
            return
        self.name = records.get("path", self.name)
        if any(name.startswith("GNU.sparse.") for name in records):
            self.problem = "a sparse file"
        if "size" in records:
            if records["size"].isdigit() and len(records["size"]) < 20:
                self.size = int(records["size"])
            else:
                self.problem = "a damaged extended header"


class _Header(NamedTuple):
    name: bytes
    size: int
    kind: bytes


def _parse_header(block: bytes) -> _Header | None:
    """The fields of a header, or None where the block is none."""
    if len(block) < BLOCK:
        return None
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if size is None or checksum is None:
        return None
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if checksum != unsigned:
        # Some old writers summed signed characters.
        high = sum(byte > 127 for byte in block) - sum(byte > 127 for byte in block[148:156])
        if checksum != unsigned - 256 * high:
            return None
    name = block[:100].rstrip(b"\0")
    prefix = block[345:500].rstrip(b"\0") if block[257:263] == b"ustar\0" else b""
    return _Header(prefix + b"/" + name if prefix else name, size, block[156:157])


def _header_damage(block: bytes) -> str:
    return "cut off within a header" if len(block) < BLOCK else "a damaged header (wrong checksum)"


def _number(field: bytes) -> int | None:
    """An octal or base-256 number of 0 or more, or None."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        return None
    return int(digits, 8) if digits else 0


def _parse_pax(data: bytes) -> dict[str, bytes] | None:
    """Records `LENGTH KEY=VALUE\\n`, or None where they are damaged."""
    records = {}
    at = 0
    while at < len(data):
        digits, space, _ = data[at : at + 12].partition(b" ")
        if not space or not digits.isdigit():
            return None
        record = data[at : at + int(digits)]
        name, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != int(digits) or not record.endswith(b"\n") or not equals:
            return None
        records[name.decode("utf-8", "backslashreplace")] = value
        at += len(record)
    return records


def _readable_name(name: bytes) -> tuple[str, str | None]:
    """A member's name as text, and why it must not be used."""
    text = name[:MAX_NAME_BYTES].decode("utf-8", "backslashreplace")
    if len(name) > MAX_NAME_BYTES:
        return f"{text[:100]}...", f"a name of {len(name)} bytes, at most {MAX_NAME_BYTES}"
    if b"\0" in name:
        return text, "NUL in the name"
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return text, "a name that is not UTF-8"
    if not name:
        return text, "no name"
    if os.path.isabs(text):
        return text, "an absolute name"
    if ".." in text.split("/"):
        return text, "a name with .."
    return text, None
