"""Which source a path is: by the user's word, or by looking at it."""

from __future__ import annotations

import os
from pathlib import Path

from datamodules.sources.base import Source, printable
from datamodules.sources.captions import CocoSource, Flickr8kSource, is_flickr8k_header
from datamodules.sources.chat import ChatSource
from datamodules.sources.folder import TEXT_SUFFIXES, FolderSource
from step37_lit.errors import ConfigError
from step37_lit.images import SUFFIX_FORMATS

FLICKR8K_FILE = "captions.txt"
FILE_FORMATS: dict[str, type[Flickr8kSource | CocoSource | ChatSource]] = {
    source.format: source for source in (Flickr8kSource, CocoSource, ChatSource)
}


def detect_format(source: str) -> str:
    """The one format that a file or folder can have: `flickr8k`, `coco`, `chat` or `folder`, or `scenes` for that word.

    Raises:
        ConfigError: there is nothing, or it can be taken for none or for several.
    """
    path = Path(source)
    if not path.exists():
        if source == "scenes":
            return "scenes"
        raise ConfigError("SOURCE", "a file, a folder, or the word scenes", source)
    found = _formats_of_folder(path) if path.is_dir() else _formats_of_file(path)
    if source == "scenes":
        found.append("scenes")
    if len(found) != 1:
        what = " or ".join(found) or "something else"
        raise ConfigError("SOURCE", "what is clearly of one format (name it: --format)", what, file=printable(source))
    return found[0]


def _formats_of_file(path: Path) -> list[str]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return ["chat"] if suffix == ".jsonl" else ["coco"]
    try:
        with path.open("rb") as file:
            return ["flickr8k"] if is_flickr8k_header(file.readline(100).rstrip(b"\r\n")) else []
    except OSError as error:
        raise ConfigError("SOURCE", "a file that can be read", error.strerror, file=path) from error


def _formats_of_folder(path: Path) -> list[str]:
    found = ["flickr8k"] if (path / FLICKR8K_FILE).is_file() else []
    return found + (["folder"] if _has_sidecar(path) else [])


def _has_sidecar(folder: Path) -> bool:
    for _, _, names in os.walk(folder):
        stems: dict[str, set[str]] = {}
        for name in names:
            stem, suffix = os.path.splitext(name)
            stems.setdefault(stem, set()).add(suffix[1:].lower())
        if any(kinds & set(SUFFIX_FORMATS) and kinds & set(TEXT_SUFFIXES) for kinds in stems.values()):
            return True
    return False


def open_source(source: str, format: str, image_root: str | None, out: Path) -> Source:
    """The source behind a path; nothing but its place is looked at yet.

    Args:
        source: A file or a folder.
        format: `flickr8k` (folder or file), `coco`, `chat` or `folder`.
        image_root: Folder of the pictures, where it is not the usual one.
        out: Folder of the shards, which must not be in a folder that is read as a whole.

    Raises:
        ConfigError: there is no such file or folder, the format has no use for `image_root`, or `out` is in it.
    """
    path = Path(source)
    if format == "folder":
        if image_root is not None:
            raise ConfigError("--image-root", "none for a folder, whose pictures are in it", image_root)
        if not path.is_dir():
            raise ConfigError("SOURCE", "a folder", source)
        if out.resolve().is_relative_to(path.resolve()):
            raise ConfigError("OUT", "a folder outside of SOURCE", str(out))
        return FolderSource(path)
    file = path / FLICKR8K_FILE if format == "flickr8k" and path.is_dir() else path
    if not file.is_file():
        raise ConfigError("SOURCE", "a file", str(file))
    return FILE_FORMATS[format](file, image_root)
