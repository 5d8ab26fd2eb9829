"""Bad samples through `build_index`: each is named, everything else is indexed, nothing is lost or run."""

from __future__ import annotations

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
from datamodules.shards.index_build import build_index
from tests import tars
from tests.indexed_shards import check_reading
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
