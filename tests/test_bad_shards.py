"""Bad shards and samples through `build_index`: each is named, everything else is indexed, nothing is lost or run."""

from __future__ import annotations

import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.bad_samples import BadSample
from datamodules.shards import rows as shard_rows
from datamodules.shards import tar_scan
from datamodules.shards.index import ShardIndex
from datamodules.shards.index_build import build_index
from datamodules.shards.reader import ShardReader
from step37_lit.config import ConfigError
from tests import tars
from tests.tars import picture, sample, special, text

JPEG, PNG = picture(5), picture(5, "PNG")
OK = text(caption="a dog")
CHAT = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a dog"}]


def bomb_png() -> bytes:
    """A PNG header of 60,000 x 60,000 pixels with a right checksum."""
    size = struct.pack(">II5B", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = b"IHDR" + size
    chunk = struct.pack(">I", len(size)) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + PNG[33:]


def chat(*turns: dict) -> bytes:
    return text(messages=list(turns))


class Trap:
    """Unpickling it writes a file."""

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (Path("executed"),)


# Name: members between two good samples, and key -> what is wrong with it (None: nothing). Other keys must not appear.
SAMPLES: dict[str, tuple[list, dict[str, str | None]]] = {
    "wrong extension": (
        [("k.jpg", PNG), ("k.json", OK)],
        {"k": "member jpg: the format is PNG, the suffix says JPEG"},
    ),
    "bomb header": (
        [("k.png", bomb_png()), ("k.json", OK)],
        {"k": "member png: PNG of 60000 x 60000 pixels, at most 67108864 and 65535 a side are allowed"},
    ),
    "truncated jpeg header": (
        [("k.jpg", JPEG[:10]), ("k.json", OK)],
        {"k": "member jpg: truncated JPEG: the file ends before its first scan"},
    ),
    "no picture at all": (
        [("k.jpg", b""), ("k.json", OK)],
        {"k": "member jpg: an empty file, expected JPEG, PNG or WEBP"},
    ),
    "empty caption": ([("k.jpg", JPEG), ("k.txt", b" \n\t ")], {"k": "member txt: caption: empty"}),
    "one empty caption of two": (
        [("k.jpg", JPEG), ("k.json", text(captions=["a dog", ""]))],
        {"k": "member json: captions[1]: empty"},
    ),
    "no captions": (
        [("k.jpg", JPEG), ("k.json", text(captions=[]))],
        {"k": "member json: captions: expected a list of 1 to 1000, found 0"},
    ),
    "missing caption": ([("k.jpg", JPEG)], {"k": "no text member (json or txt)"}),
    "missing picture of a caption": ([("k.json", OK)], {"k": "a caption without an image"}),
    "picture of another kind": (
        [("k.gif", b"GIF89a"), ("k.json", OK)],
        {"k": "a caption without an image (members of other kinds: gif)"},
    ),
    "missing picture of a conversation": (
        [("k.json", chat(*CHAT))],
        {"k": "1 image parts in messages, 0 image members"},
    ),
    "more pictures than image parts": (
        [("k.0.jpg", JPEG), ("k.1.jpg", JPEG), ("k.json", chat(*CHAT))],
        {"k": "1 image parts in messages, 2 image members"},
    ),
    "pictures with a gap": (
        [("k.0.jpg", JPEG), ("k.2.jpg", JPEG), ("k.json", OK)],
        {"k": "images need numbers without a gap (0.jpg, 1.jpg, ...), found 0.jpg, 2.jpg"},
    ),
    "pictures without numbers": (
        [("k.jpg", JPEG), ("k.png", PNG), ("k.json", OK)],
        {"k": "images need numbers without a gap (0.jpg, 1.jpg, ...), found jpg, png"},
    ),
    "the first picture is missing": (
        [("k.3.jpg", JPEG), ("k.json", OK)],
        {"k": "images need numbers without a gap (0.jpg, 1.jpg, ...), found 3.jpg"},
    ),
    "caption of 10 MB": (
        [("k.jpg", JPEG), ("k.txt", b"x" * 10_000_000)],
        {"k": "member txt: text of 10000000 bytes, at most 1048576"},
    ),
    "not UTF-8": (
        [("k.jpg", JPEG), ("k.txt", b"caf\xe9"), ("l.jpg", JPEG), ("l.json", b'{"caption": "\xff"}')],
        {"k": "member txt: not UTF-8 at byte 3", "l": "member json: not UTF-8 at byte 13"},
    ),
    "NUL in a caption": ([("k.jpg", JPEG), ("k.txt", b"a\0b")], {"k": "member txt: caption: NUL at character 1"}),
    "half a surrogate pair": (
        [("k.jpg", JPEG), ("k.json", b'{"caption": "a \\ud83d"}')],
        {"k": "member json: caption: half of a surrogate pair at character 2"},
    ),
    "the processor's own mark": (
        [("k.jpg", JPEG), ("k.json", text(caption="a \ufdd0"))],
        {"k": "member json: caption: the noncharacter U+FDD0 at character 2"},
    ),
    "duplicate key": (
        [*sample("k", 1), *sample("l", 2), *sample("k", 3)],
        {"k": "the key is there twice in this shard", "l": None},
    ),
    "duplicate key side by side": (
        [*sample("k", 1), *sample("k", 3)],
        {"k": "the key is there twice in this shard"},
    ),
    "members not next to each other": (
        [("k.jpg", JPEG), ("l.jpg", JPEG), ("k.json", OK), ("l.json", OK)],
        dict.fromkeys("kl", "its members are not next to each other: other keys are between them"),
    ),
    "a second picture far away": (
        [("k.0.jpg", JPEG), ("k.json", OK), *sample("l"), ("k.1.jpg", JPEG)],
        {"k": "its members are not next to each other: other keys are between them", "l": None},
    ),
    "symbolic link": (
        [(special("k.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""), ("k.json", OK)],
        {"k": "member jpg: a symbolic link, expected a regular file"},
    ),
    "hard link": (
        [("k.json", OK), (special("k.jpg", tarfile.LNKTYPE, "0first.jpg"), b"")],
        {"k": "member jpg: a hard link, expected a regular file"},
    ),
    "device": (
        [(special("k.jpg", tarfile.CHRTYPE), b""), ("k.json", OK)],
        {"k": "member jpg: a character device, expected a regular file"},
    ),
    "link without a suffix": (
        [(special("passwd", tarfile.SYMTYPE, "/etc/passwd"), b"")],
        {"passwd": "a symbolic link, expected a regular file"},
    ),
    "absolute name": (
        [("/tmp/k.jpg", JPEG), ("/tmp/k.json", OK)],
        {"/tmp/k": "member jpg: an absolute name"},
    ),
    "name with ..": (
        [("../k.jpg", JPEG), ("../k.json", OK)],
        {"../k": "member jpg: a name with .."},
    ),
    "JSON nested 10,000 deep": (
        [("k.jpg", JPEG), ("k.json", b'{"caption": ' + b"[" * 10_000 + b"]" * 10_000 + b"}")],
        {"k": "member json: JSON nested 10001 deep, at most 64"},
    ),
    "JSON that never ends": (
        [("k.jpg", JPEG), ("k.json", b'{"caption": "' + b'\\"' * 400_000 + b"[" * 100)],
        {"k": "member json: not JSON: Unterminated string starting at: line 1 column 13 (char 12)"},
    ),
    "JSON that is a list": (
        [("k.jpg", JPEG), ("k.json", b'["a dog"]')],
        {"k": "member json: expected an object with messages, captions or caption, found a list"},
    ),
    "JSON that is a number": (
        [("k.jpg", JPEG), ("k.json", b"3")],
        {"k": "member json: expected an object with messages, captions or caption, found a number"},
    ),
    "JSON with a number of 5,000 digits": (
        [("k.jpg", JPEG), ("k.json", b'{"caption": "a dog", "id": ' + b"9" * 5000 + b"}")],
        {"k": "member json: not JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 "
              "digits; use sys.set_int_max_str_digits() to increase the limit"},
    ),
    "JSON of other fields": (
        [("k.jpg", JPEG), ("k.json", text(url="x", text="a dog"))],
        {"k": "member json: expected an object with messages, captions or caption, found the fields ['text', 'url']"},
    ),
    "captions that are no strings": (
        [("k.jpg", JPEG), ("k.json", text(captions=["a dog", 3])), ("l.jpg", JPEG), ("l.json", text(caption=None))],
        {"k": "member json: captions[1]: expected text, found a number",
         "l": "member json: caption: expected text, found null"},
    ),
    "messages that are none": (
        [("k.jpg", JPEG), ("k.json", text(messages="a dog")), ("l.jpg", JPEG), ("l.json", chat({"role": "user"}))],
        {"k": "member json: messages: expected a list of turns, found text",
         "l": "member json: messages[0]: expected role and content, found the fields ['role']"},
    ),
    "unknown role": (
        [("k.jpg", JPEG), ("k.json", chat({"role": "robot", "content": "x"}))],
        {"k": "member json: messages[0].role: expected system or user or assistant, found 'robot'"},
    ),
    "no answer, or an empty one": (
        [("k.json", chat({"role": "user", "content": "x"})), ("l.json", chat({"role": "assistant", "content": " "}))],
        {"k": "member json: messages: expected an assistant turn, found none",
         "l": "member json: messages: an assistant turn is empty"},
    ),
    "unknown part": (
        [("k.jpg", JPEG), ("k.json", chat({"role": "user", "content": [{"type": "video"}]}))],
        {"k": "member json: messages[0].content[0].type: expected text or image, found 'video'"},
    ),
    "members of other kinds": (
        [("k.cls", b"3"), *sample("k"), ("k.pyd", pickle.dumps(Trap())), ("README", b"x"), ("l.pth", b"x")],
        {"k": None},
    ),
    "JSON of other fields beside a text": (
        [("k.jpg", JPEG), ("k.json", text(url="x")), ("k.txt", b"a dog\n")],
        {"k": None},
    ),
    "a conversation without pictures": (
        [("k.json", chat({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}))],
        {"k": None},
    ),
    "upper case": ([("k.JPG", JPEG), ("k.TXT", b"a dog")], {"k": None}),
}  # fmt: skip


@pytest.mark.parametrize("case", SAMPLES)
def test_bad_samples(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    members, expected = SAMPLES[case]
    tars.write(tmp_path / "set" / "s.tar", tars.tar([*sample("0first"), *members, *sample("zlast")]))
    bad = {key: problem for key, problem in expected.items() if problem is not None}
    if bad:
        key, problem = next(iter(bad.items()))
        with pytest.raises(BadSample) as caught:
            build_index(tmp_path / "set")
        assert str(caught.value) == f"shard s.tar, key {key}: {problem}"
        assert not (tmp_path / "set" / "index.arrow").exists()
    index = build_index(tmp_path / "set", "skip")
    assert {index.key(i): problem for i, problem in index.problems()} == bad
    assert set(index.keys()) == {"0first", *expected, "zlast"}
    check_reading(index)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["index.arrow", "s.tar", "set"]


def check_reading(index: ShardIndex) -> None:
    """Good samples can be read, bad ones say why not."""
    reader = ShardReader(index)
    for i in range(len(index)):
        problem = index.problem(i)
        if problem is None:
            assert len(reader.read(i).images) == len(index.image_sizes(i))
        else:
            with pytest.raises(BadSample) as caught:
                reader.read(i)
            assert caught.value.reason == problem and caught.value.key == index.key(i)


def test_names_that_only_extended_headers_can_hold(tmp_path: Path) -> None:
    def long_name(name: bytes, data: bytes) -> bytes:
        return tars.member(b"././@LongLink", name + b"\0", b"L") + tars.member(b"short", data)

    first, last = (tars.tar(sample(key)) for key in ("0first", "zlast"))
    content = first[: tars.end_of_members(first)]
    content += long_name(b"a\0b.jpg", JPEG) + long_name(b"\xff.jpg", JPEG) + long_name(b"x" * 5000 + b".jpg", JPEG)
    tars.write(tmp_path / "s.tar", content + last)
    with pytest.raises(BadSample, match=r"^shard s.tar, key 'a\\x00b': member jpg: NUL in the name$"):
        build_index(tmp_path)
    index = build_index(tmp_path, "skip")
    assert {index.key(i): problem for i, problem in index.problems()} == {
        "a\0b": "member jpg: NUL in the name",
        "\\xff": "member jpg: a name that is not UTF-8",
        "x" * 100: "member ..: a name of 5004 bytes, at most 4096",
    }
    assert list(index.keys()) == ["0first", "a\0b", "\\xff", "x" * 100, "zlast"]


def test_a_member_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tar_scan, shard_rows):
        monkeypatch.setattr(module, "MAX_MEMBER_BYTES", 5000)
    large = picture(1, size=(300, 300))
    tars.write(tmp_path / "s.tar", [*sample("a"), ("b.jpg", large), ("b.json", OK), ("c.mp4", large), *sample("d")])
    index = build_index(tmp_path, "skip")
    assert list(index.problems()) == [(1, f"member jpg: {len(large)} bytes, at most 5000")]
    assert list(index.keys()) == ["a", "b", "d"] and index.shards[0].ignored == 1
    check_reading(index)


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
