"""What every source of samples has in common: items, keys, and files that are never outside the source's folder.

A source is read twice with the same code: once to plan the shards (`refs` and `item`, for which a picture is only a
`stat`), and once by the process that writes a shard (`item` and then the pictures' bytes).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datamodules.bad_samples import BadSample
from datamodules.conversations import choose_text
from datamodules.shards.tar_scan import MAX_MEMBER_BYTES
from step37_lit.errors import ConfigError
from step37_lit.images import SUFFIX_FORMATS
from step37_lit.processor import DEFAULT_PROMPT

MAX_LINE_BYTES = 8 * 2**20  # a text member may have 1 MiB, and escapes such as \u00e9 make a line longer
MAX_KEY_BYTES = 80  # a member's name has 100 bytes in a plain tar header; the rest is for ".123.jpeg"
IMAGE_FOLDERS = ("images", "Images")

# What finds an item again; only its source knows what is in it. Small, since a plan holds one for each sample.
Ref = tuple[Any, ...]


class BadItem(BadSample):
    """A bad sample that is not in a shard yet: `shard` is the source's file and line."""

    def __str__(self) -> str:
        return super().__str__().removeprefix("shard ")


class ItemImage(Protocol):
    """A picture of an item. `stamp` changes with its bytes; `size` is in bytes, or 0 where it is not known before."""

    @property
    def suffix(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def stamp(self) -> tuple[int, ...]: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class FileImage:
    """A picture in a file, as it was when the source was read: `suffix` in lower case, `size` in bytes."""

    path: str
    suffix: str
    size: int
    mtime_ns: int

    @property
    def stamp(self) -> tuple[int, ...]:
        return (self.size, self.mtime_ns)

    def read(self) -> bytes:
        """Raises ValueError with the reason."""
        try:
            data = Path(self.path).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from error
        if len(data) != self.size:
            raise ValueError(f"expected {self.size} bytes (as planned), found {len(data)}")
        return data


@dataclass(frozen=True)
class Item:
    """One sample of a source.

    Args:
        key: Its key in the shards.
        place: File and line (or the like) that it comes from, for messages.
        texts: Text members by suffix: `json`, `txt` or both.
        images: Its pictures in order.
    """

    key: str
    place: str
    texts: dict[str, bytes]
    images: Sequence[ItemImage]

    def image_members(self) -> list[tuple[str, ItemImage]]:
        """Each picture with its member's suffix: `jpg` for a single one, `0.jpg`, `1.jpg`, ... for several."""
        numbered = len(self.images) > 1
        return [(f"{i}.{image.suffix}" if numbered else image.suffix, image) for i, image in enumerate(self.images)]

    def bad(self, member: str, reason: object) -> BadItem:
        return BadItem(self.place, self.key, member, str(reason))


class Source(ABC):
    """Where samples come from. It is picklable, and reads nothing before it is asked to.

    Attributes:
        format: Its name on the command line.
        sized: The bytes of its pictures are known before they are read.
        name: What its shards are called where the user says nothing.
    """

    format: ClassVar[str]
    sized: ClassVar[bool] = True
    name: str

    def settings(self) -> dict[str, Any]:
        """Everything but its files that decides what its items are."""
        return {}

    @abstractmethod
    def refs(self) -> Iterator[Ref | BadItem]:
        """All items in a fixed order, and what cannot become one. Raises `ConfigError` for a source of another kind."""

    @abstractmethod
    def item(self, ref: Ref) -> Item:
        """The item behind a ref; its pictures are not read. Raises `BadItem`."""

    def left_out(self) -> str:
        """What `refs` passed over since it is neither text nor a picture, for the end of a line; empty for nothing."""
        return ""


def key_of(name: str) -> str:
    """A sample's key from a path without its suffix, or from an id.

    Dots, slashes, white space and what cannot be printed become `_`, since a webdataset key ends at the first dot. A
    key of more than `MAX_KEY_BYTES` bytes ends in 16 digits of the name's SHA-256 instead of its own end.
    """
    key = "".join("_" if c in "./\\" or c.isspace() or not c.isprintable() else c for c in name)
    encoded = key.encode()
    if len(encoded) <= MAX_KEY_BYTES:
        return key
    digits = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return encoded[: MAX_KEY_BYTES - 17].decode(errors="ignore") + "-" + digits


def key_of_image(name: str) -> str:
    """The key of a picture's sample: its path without the suffix."""
    return key_of(os.path.splitext(name)[0])


def printable(text: str) -> str:
    """Names come from untrusted files: control characters must not reach a terminal."""
    return text if text.isprintable() else ascii(text)


def check_texts(texts: dict[str, bytes], num_images: int) -> None:
    """Raises ValueError with the reason unless a reader of the set will take the text members."""
    _, chosen = choose_text(texts)
    chosen.variants(DEFAULT_PROMPT, num_images)


def to_json(content: object) -> bytes:
    """One line of UTF-8. Raises ValueError for NaN, half of a surrogate pair, and what is nested too deep."""
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def from_json(data: bytes) -> Any:
    """Raises ValueError with the reason, whatever the bytes are."""
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise ValueError("not JSON: nested too deep") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def file_inside(root: Path, name: str) -> tuple[str, os.stat_result]:
    """A regular file named by untrusted text, with all links resolved.

    Args:
        root: A folder without links in its path.
        name: Relative to it.

    Raises:
        ValueError: with the reason; a path or a link that leads out of `root` is never opened.
    """
    if not name or "\0" in name:
        raise ValueError(f"expected a file's name, found {name!r}")
    if name.startswith("/") or ".." in name.split("/"):
        raise ValueError(f"expected a path inside the source's folder, found {name!r}")
    try:
        path = os.path.realpath(os.path.join(root, name))  # pathlib takes three times as long, a million times
        if not path.startswith(os.path.join(root, "")):
            raise ValueError(f"{name!r} is a link that leads out of the source's folder")
        found = os.stat(path)
    except OSError as error:
        raise ValueError(f"{name!r}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{name!r} is not a regular file")
    return path, found


def image_inside(root: Path, name: str) -> FileImage:
    """A picture named by untrusted text; only its suffix and its size are looked at. Raises ValueError."""
    suffix = os.path.splitext(name)[1].removeprefix(".").lower()
    if suffix not in SUFFIX_FORMATS:
        raise ValueError(f"expected a picture ({', '.join(SUFFIX_FORMATS)}), found {name!r}")
    path, found = file_inside(root, name)
    if found.st_size > MAX_MEMBER_BYTES:
        raise ValueError(f"{name!r}: expected at most {MAX_MEMBER_BYTES} bytes, found {found.st_size}")
    return FileImage(path, suffix, found.st_size, found.st_mtime_ns)


def image_root(folder: Path, given: str | None) -> Path:
    """Where a text file's pictures are: the folder that the user names, `images` or `Images` beside it, or beside it.

    Raises:
        ConfigError: there is no such folder, both stand there, or a link leads out.
    """
    if given is not None:
        if not Path(given).is_dir():
            raise ConfigError("--image-root", "a folder", given)
        return Path(given).resolve()
    found = {(folder / name).resolve() for name in IMAGE_FOLDERS if (folder / name).is_dir()}
    if len(found) > 1:
        raise ConfigError("--image-root", "one of images/ and Images/, which are both there", None, file=folder)
    root = found.pop() if found else folder.resolve()
    if not root.is_relative_to(folder.resolve()):
        raise ConfigError("--image-root", "named, since the picture folder is a link out of the source", str(root))
    return root


def read_lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Number (from 1), offset and bytes of each line, without its end; a line over `MAX_LINE_BYTES` has its first
    `MAX_LINE_BYTES + 1` bytes, so that no file can fill the memory."""
    try:
        with path.open("rb") as file:
            number, offset = 1, 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                length, rest = len(line), line
                while not rest.endswith(b"\n") and (rest := file.readline(2**20)):
                    length += len(rest)
                yield number, offset, line.rstrip(b"\r\n")
                number, offset = number + 1, offset + length
    except OSError as error:
        raise ConfigError("SOURCE", "a file that can be read", error.strerror, file=path) from error


def check_line(line: bytes) -> None:
    """Raises ValueError for a line that `read_lines` cut."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"expected a line of at most {MAX_LINE_BYTES} bytes, found more")


def read_whole(path: Path) -> bytes:
    """Raises `ConfigError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError("SOURCE", "a file that can be read", error.strerror, file=path) from error
