"""The strict pass over a tar: what `tarfile` sees, in three formats, and everything it passes over in silence."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.shards import tar_scan
from datamodules.shards.tar_scan import TarDamage, TarMember, TarScan
from tests import tars

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
THREE = [("a.jpg", b"1" * 700), ("b.jpg", b"2" * 512), ("c.jpg", b"3" * 100)]


def scan(content: bytes) -> tuple[list[TarMember], list[TarDamage]]:
    scanned = TarScan(io.BytesIO(content).read)
    events = list(scanned)
    assert scanned.size == len(content)  # every byte was read, whatever is in it
    assert scanned.sha256 == hashlib.sha256(content).hexdigest()
    return [e for e in events if isinstance(e, TarMember)], [e for e in events if isinstance(e, TarDamage)]


def names(content: bytes) -> list[str]:
    return [member.name for member in scan(content)[0]]


long_names = st.text(st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
paths = st.lists(long_names.filter(lambda part: part not in (".", "..")), min_size=1, max_size=8).map("/".join)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=40, deadline=None)
@given(members=st.lists(st.tuples(paths, st.binary(max_size=1500)), max_size=5))
def test_members_are_those_of_tarfile(format: str, members: list[tuple[str, bytes]]) -> None:
    if format == "ustar":  # holds names of 100 bytes, or 255 with a slash in the right place
        members = [(name, data) for name, data in members if len(name.encode()) <= 100]
    content = tars.tar(members, FORMATS[format])
    found, damages = scan(content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive.getmembers()]
    assert [(m.name, m.offset, m.size) for m in found] == expected and len(expected) == len(members)
    assert [(m.data, m.crc32) for m in found] == [(data, zlib.crc32(data)) for _, data in members]
    assert damages == [] and all(m.problem is None for m in found)


@pytest.mark.parametrize("format", ["gnu", "pax"])
@pytest.mark.parametrize("length", [99, 100, 101, 255, 256, 3000])
def test_long_names(format: str, length: int) -> None:
    name = "é" + "x" * (length - 6) + ".jpg"
    assert names(tars.tar([(name, b"1"), ("b.jpg", b"2")], FORMATS[format])) == [name, "b.jpg"]


def test_ustar_prefix() -> None:
    name = "/".join(["d" * 50] * 4) + "/a.jpg"
    assert names(tars.tar([(name, b"1")], tarfile.USTAR_FORMAT)) == [name]


def test_a_size_in_base_256_and_one_in_a_pax_header() -> None:
    base_256 = tars.header(b"a.jpg", 0, size_field=b"\x80" + (600).to_bytes(11, "big")) + tars.padded(b"1" * 600)
    in_pax = tars.member(b"PaxHeaders/b", tars.pax_record(b"size", b"600"), b"x")
    in_pax += tars.header(b"b.jpg", 0) + tars.padded(b"2" * 600)
    found, damages = scan(base_256 + in_pax + bytes(1024))
    assert [(m.name, m.data) for m in found] == [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)] and damages == []
    negative = tars.header(b"a.jpg", 0, size_field=b"\xff" * 12) + bytes(1024)
    assert scan(tars.member(b"z.jpg", b"1") + negative)[1][0].reason.startswith("a damaged header")


def test_directories_are_passed_over_and_other_kinds_are_refused() -> None:
    content = tars.tar(
        [
            (tars.special("d", tarfile.DIRTYPE), b""),
            (tars.special("s.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
            (tars.special("h.jpg", tarfile.LNKTYPE, "a.jpg"), b""),
            (tars.special("c.jpg", tarfile.CHRTYPE), b""),
            (tars.special("b.jpg", tarfile.BLKTYPE), b""),
            (tars.special("f.jpg", tarfile.FIFOTYPE), b""),
        ]
    )[: 6 * tars.BLOCK]
    content += tars.member(b"q.jpg", b"123", b"Q") + tars.member(b"a.jpg", b"1") + bytes(1024)
    found, damages = scan(content)
    assert damages == []
    assert [(m.name, m.problem) for m in found] == [
        ("s.jpg", "a symbolic link, expected a regular file"),
        ("h.jpg", "a hard link, expected a regular file"),
        ("c.jpg", "a character device, expected a regular file"),
        ("b.jpg", "a block device, expected a regular file"),
        ("f.jpg", "a named pipe, expected a regular file"),
        ("q.jpg", "tar type b'Q', expected a regular file"),
        ("a.jpg", None),
    ]


@pytest.mark.parametrize(
    ("name", "shown", "problem"),
    [
        (b"/etc/a.jpg", "/etc/a.jpg", "an absolute name"),
        (b"x/../../a.jpg", "x/../../a.jpg", "a name with .."),
        (b"..", "..", "a name with .."),
        (b"a\0b.jpg", "a\0b.jpg", "NUL in the name"),
        (b"\xff.jpg", "\\xff.jpg", "a name that is not UTF-8"),
        (b"", "", "no name"),
        (b"x..y/a...jpg", "x..y/a...jpg", None),
    ],
)
def test_names(name: bytes, shown: str, problem: str | None) -> None:
    for content in (tars.member(name, b"1"), in_pax(name), in_gnu(name)):
        found, damages = scan(content + bytes(1024))
        assert [(m.name, m.problem) for m in found] == [(shown, problem)] and damages == []


def in_pax(name: bytes) -> bytes:
    return tars.member(b"PaxHeaders/a", tars.pax_record(b"path", name), b"x") + tars.member(b"short.jpg", b"1")


def in_gnu(name: bytes) -> bytes:
    return tars.member(b"././@LongLink", name + b"\0", b"L") + tars.member(b"short.jpg", b"1")


def test_extended_headers_that_are_too_long_or_broken() -> None:
    def problem(content: bytes) -> str | None:
        found, damages = scan(content + tars.member(b"a.jpg", b"1") + bytes(1024))
        assert [m.name for m in found] == ["a.jpg"] and damages == []
        return found[0].problem

    for kind in (b"x", b"L"):
        long = tars.header(b"x", 2 << 20, kind) + bytes(2 << 20)
        assert problem(long) == "an extended header of 2097152 bytes, at most 1048576"
    for broken in (b"9999 path=a\n", b"path=a\n", b"0 \n", b"12 path=a.jpg", b"7 path\n", b"-5 a=b\n"):
        assert problem(tars.member(b"x", broken, b"x")) == "a damaged extended header"
    assert problem(tars.member(b"x", tars.pax_record(b"size", b"-1"), b"x")) == "a damaged extended header"
    assert problem(tars.member(b"x", tars.pax_record(b"GNU.sparse.major", b"1"), b"x")) == "a sparse file"
    found, damages = scan(in_gnu(b"x" * 5000) + bytes(1024))
    assert [(m.name, m.problem) for m in found] == [("x" * 100 + "...", "a name of 5000 bytes, at most 4096")]
    assert damages == []
    glob = tars.member(b"g", tars.pax_record(b"path", b"x.jpg"), b"g")
    found, damages = scan(tars.member(b"a.jpg", b"1") + glob + tars.member(b"b.jpg", b"1") + bytes(1024))
    assert [m.name for m in found] == ["a.jpg", "b.jpg"]
    assert [d.reason for d in damages] == ["a global header with a name or size at byte 1024"]


def test_a_chain_of_extended_headers_is_no_recursion() -> None:
    chain = tars.member(b"x", tars.pax_record(b"path", b"deep.jpg"), b"x") * 10_000
    assert names(chain + tars.member(b"a.jpg", b"1") + bytes(1024)) == ["deep.jpg"]


def test_a_large_member_is_checked_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_scan, "MAX_MEMBER_BYTES", 1000)
    data = bytes(range(256)) * 10_000
    found, damages = scan(tars.tar([("a.jpg", data), ("b.jpg", b"2")]))
    assert [(m.name, m.size, m.data) for m in found] == [("a.jpg", len(data), None), ("b.jpg", 1, b"2")]
    assert found[0].crc32 == zlib.crc32(data) and damages == []


def test_a_wrong_checksum_in_the_middle() -> None:
    content = bytearray(tars.tar(THREE))
    at = tars.member_header(bytes(content), "b.jpg")
    content[at + 5] ^= 1
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        assert archive.getnames() == ["a.jpg"]  # what everybody else sees, without a word
    found, damages = scan(bytes(content))
    assert [m.name for m in found] == ["a.jpg", "c.jpg"]
    assert damages == [TarDamage(at, f"a damaged header (wrong checksum) at byte {at}; {2 * tars.BLOCK} bytes skipped")]


def test_joined_archives_and_data_behind_the_end() -> None:
    first, second = tars.tar(THREE[:1]), tars.tar(THREE[1:])
    found, damages = scan(first + second)
    assert [m.name for m in found] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [d.reason for d in damages] == [f"another archive behind the end of the archive at byte {len(first)}"]
    found, damages = scan(first + b"x" * 700)
    assert [m.name for m in found] == ["a.jpg"]
    assert [d.reason for d in damages] == [
        f"data behind the end of the archive at byte {len(first)}; 700 bytes skipped"
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file (0 bytes)"),
        (b"PK\3\4" + b"x" * 5000, "not a tar: no header at its beginning"),
        (b"x" * 100, "not a tar: no header at its beginning"),
        (tars.member(b"a.jpg", b"1"), "cut off at byte 1024: no end-of-archive marker"),
        (
            tars.member(b"a.jpg", b"1") + b"b.jpg",
            "cut off within a header at byte 1024; 5 bytes skipped",
        ),
    ],
)
def test_damages_of_a_whole_file(content: bytes, reason: str) -> None:
    assert [damage.reason for damage in scan(content)[1]] == [reason]


def test_an_archive_without_members_is_whole() -> None:
    assert scan(tars.tar([])) == ([], [])


@pytest.mark.parametrize("format", FORMATS)
def test_a_cut_at_any_byte_is_seen(format: str) -> None:
    content = tars.tar([*THREE, ("d" * 150 + "/" + "e" * 90, b"4" * 600)], FORMATS[format])
    end = tars.end_of_members(content)
    for cut in range(end):
        found, damages = scan(content[:cut])
        assert damages, cut
        for member in found:
            whole = member.offset + member.size <= cut and member.size == len(member.data or b"")
            assert whole and (member.problem is None or "cut off" in member.problem)
    for cut in (end + 1, end + 512, end + 1024):
        assert scan(content[:cut])[1] == []  # the marker is cut, the members are all there


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(list(FORMATS)),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_changed_bytes_neither_crash_nor_invent(format: str, changes: list[tuple[int, int]]) -> None:
    original = tars.tar([*THREE, ("d" * 90 + ".jpg", b"4" * 600)], FORMATS[format])
    content = bytearray(original)
    for at, flip in changes:
        content[at % len(content)] ^= flip
    for member in scan(bytes(content))[0]:
        assert member.data == bytes(content[member.offset : member.offset + member.size])
        assert member.crc32 == zlib.crc32(member.data)


def test_a_stream_may_give_less_than_it_is_asked_for() -> None:
    content = tars.tar(THREE)
    stream = io.BytesIO(content)
    assert list(TarScan(lambda size: stream.read(min(size, 7)))) == list(TarScan(io.BytesIO(content).read))
