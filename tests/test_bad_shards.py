"""Damaged shards and places through `build_index`: each is named, the rest is indexed, nothing is lost or run."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample
from datamodules.shards.index_build import build_index
from step37_lit.errors import ConfigError
from tests import tars
from tests.indexed_shards import check_reading
from tests.tars import picture, sample, text

JPEG, PNG = picture(5), picture(5, "PNG")
OK = text(caption="a dog")


def three() -> bytes:
    return tars.tar([*sample("a", 1), *sample("b", 2), *sample("c", 3)])


def with_wrong_checksum(name: str) -> bytes:
    content = bytearray(three())
    content[tars.member_header(three(), name) + 120] ^= 1
    return bytes(content)


BEFORE = "the last one before a damage: members may be missing"
BEHIND = "the first one behind a damage: members may be missing"

# Name: bytes of the shard, what its line says, and key -> problem of its samples.
SHARDS: dict[str, tuple[Callable[[], bytes], str, dict[str, str | None]]] = {
    "zero bytes": (lambda: b"", "an empty file (0 bytes)", {}),
    "no tar": (lambda: b"\x1f\x8b\x08" + bytes(range(256)) * 40, "not a tar: no header at its beginning", {}),
    "cut in data": (
        lambda: three()[: tars.member_header(three(), "c.jpg") + tars.BLOCK + 100],
        "cut off at byte {size}: no end-of-archive marker",
        {"a": None, "b": None, "c": "member jpg: cut off: 100 of {jpg} bytes"},
    ),
    "cut in a header": (
        lambda: three()[: tars.member_header(three(), "c.jpg") + 77],
        "cut off within a header at byte {header}; 77 bytes skipped",
        {"a": None, "b": BEFORE},
    ),
    "cut between two samples": (
        lambda: three()[: tars.member_header(three(), "c.jpg")],
        "cut off at byte {size}: no end-of-archive marker",
        {"a": None, "b": BEFORE},
    ),
    "checksum of a picture's header": (
        lambda: with_wrong_checksum("b.jpg"),
        "a damaged header (wrong checksum) at byte {damage}; {skipped} bytes skipped",
        {"a": BEFORE, "b": BEHIND, "c": None},
    ),
    "two archives in one": (
        lambda: tars.tar(sample("a")) + tars.tar([*sample("b"), *sample("c")]),
        "another archive behind the end of the archive at byte 10240",
        {"a": BEFORE, "b": BEHIND, "c": None},
    ),
}


@pytest.mark.parametrize("case", SHARDS)
def test_damaged_shards(case: str, tmp_path: Path) -> None:
    make, shard_line, problems = SHARDS[case]
    content, whole = make(), three()
    at = tars.member_header(whole, "b.jpg")
    numbers = {
        "size": len(content),
        "jpg": len(picture(3)),
        "header": tars.member_header(whole, "c.jpg"),
        "damage": at,
        "skipped": tars.member_header(whole, "b.json") - at,
    }
    tars.write(tmp_path / "s-0.tar", sample("good"))
    tars.write(tmp_path / "s-1.tar", content)
    tars.write(tmp_path / "s-2.tar", sample("other"))
    expected = {key: problem.format(**numbers) if problem else None for key, problem in problems.items()}
    line = shard_line.format(**numbers)
    bad = [f", key {key}: {problem}" for key, problem in expected.items() if problem]
    with pytest.raises(BadSample) as caught:
        build_index(tmp_path)
    assert str(caught.value) == f"shard s-1.tar{(bad or [': ' + line])[0]}"
    index = build_index(tmp_path, "skip", workers=2)
    assert [entry.problem for entry in index.shards] == [None, line, None]
    assert {index.key(i): index.problem(i) for i in range(len(index))} == {"good": None, **expected, "other": None}
    check_reading(index)


def test_a_key_in_two_shards(tmp_path: Path) -> None:
    tars.write(tmp_path / "s-0.tar", [*sample("a", 1), *sample("b", 2)])
    tars.write(tmp_path / "s-1.tar", [*sample("c", 3), *sample("a", 4)])
    with pytest.raises(BadSample, match=r"^shard s-1.tar, key a: the key is also in shard s-0.tar$"):
        build_index(tmp_path)
    index = build_index(tmp_path, "skip")
    assert [(index.shard_of(i), index.key(i), index.problem(i)) for i in range(len(index))] == [
        (0, "a", None),
        (0, "b", None),
        (1, "c", None),
        (1, "a", "the key is also in shard s-0.tar"),
    ]
    (tmp_path / "s-0.tar").unlink()
    index = build_index(tmp_path)  # the key is there once now
    assert (index.counts.shards_read, index.counts.shards_kept) == (0, 1)
    assert list(index.problems()) == [] and list(index.keys()) == ["c", "a"]


@pytest.mark.parametrize(
    ("shards", "schemes", "message"),
    [
        ("pipe:touch executed", (), "shards: expected local paths or URLs of http, https, s3, gs, found 'pipe:touch"),
        ("PIPE:touch executed", ("https",), "shards: expected local paths or URLs of"),
        ("file:///etc/passwd", (), "shards: expected local paths or URLs of"),
        ("simplecache::https://127.0.0.1/s.tar", ("https",), "shards: expected local paths or URLs of"),
        ("https://127.0.0.1/zip::s.tar", ("https",), "shards: expected local paths or URLs of"),
        ("http://127.0.0.1:9/s.tar", (), "shards: expected local paths .remote_schemes does not name http."),
        ("http://127.0.0.1:9/s.tar", ("https",), "shards: expected local paths .remote_schemes does not name http."),
        ("s3://bucket/s-{000..999}.tar", (), "shards: expected local paths .remote_schemes does not name s3."),
        ("s.tar", ("pipe",), "remote_schemes: expected any of http, https, s3, gs, found 'pipe'"),
        ("s.tar", ("file",), "remote_schemes: expected any of"),
        ("nothing.tar", (), "nothing.tar: shards: expected a file, found 'nothing'"),
        ("nothing-*.tar", (), r"nothing-\*.tar: shards: expected files of this pattern, found 'none'"),
        ("s-{0..9999999}.tar", (), "shards: expected at most 100000 of a range"),
        ("{s.tar", (), "shards: expected a range such as"),
        ("folder", (), "folder: shards: expected at least one .* found 'none'"),
        ("folder.tar", (), "folder.tar/: shards: expected at least one|folder.tar: shards: expected at least one"),
        ([], (), "shards: expected at least one path"),
        (["ok/s.tar", "ok/s.tar"], (), "shards: expected each shard once, found 'ok/s.tar'"),
        (["ok/s.tar", "other/t.tar"], (), "shards: expected all shards of a set in one folder"),
    ],
)  # fmt: skip
def test_places_that_are_refused(
    shards: str | list[str], schemes: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("folder", "folder.tar"):
        (tmp_path / folder).mkdir()
    for name in ("ok/s.tar", "other/t.tar"):
        tars.write(tmp_path / name, sample("a"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"^{message}"):
        build_index(shards, remote_schemes=schemes, index_file=None)
    assert sorted(tmp_path.rglob("*")) == before  # nothing ran, nothing was written


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.tar")
    with pytest.raises(ConfigError, match=r"s.tar: shards: expected a file, found 'something else'"):
        build_index(tmp_path)


def test_sets_without_samples(tmp_path: Path) -> None:
    tars.write(tmp_path / "s.tar", [])
    with pytest.raises(ConfigError, match=r"^shards: expected at least one sample, found 'none in 1 shards'$"):
        build_index(tmp_path)
    tars.write(tmp_path / "t.tar", [("README", b"x"), ("a.cls", b"3")])
    with pytest.raises(ConfigError, match=r"at least one sample, found 'none in 2 shards'$"):
        build_index(tmp_path)
    tars.write(tmp_path / "u.tar", b"")
    with pytest.raises(ConfigError, match=r"none in 3 shards \(u.tar: an empty file \(0 bytes\)\)"):
        build_index(tmp_path, "skip")
    assert not (tmp_path / "index.arrow").exists()
