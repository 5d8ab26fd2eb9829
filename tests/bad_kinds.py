"""Bad samples and damaged shards of many kinds, and what is said of each."""

from __future__ import annotations

import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

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


def damaged_shard(case: str) -> tuple[bytes, str, dict[str, str | None]]:
    """A shard of `SHARDS`, what is said of it, and key -> problem of its samples."""
    make, line, problems = SHARDS[case]
    content, whole = make(), three()
    at = tars.member_header(whole, "b.jpg")
    numbers = {
        "size": len(content),
        "jpg": len(picture(3)),
        "header": tars.member_header(whole, "c.jpg"),
        "damage": at,
        "skipped": tars.member_header(whole, "b.json") - at,
    }
    expected = {key: problem.format(**numbers) if problem else None for key, problem in problems.items()}
    return content, line.format(**numbers), expected
