"""A folder of pictures with a text file of the same name beside each: `x.jpg` with `x.txt`, `x.json` or both."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from datamodules.conversations import MAX_TEXT_BYTES
from datamodules.sources.base import (
    BadItem,
    Item,
    Ref,
    Source,
    check_texts,
    file_inside,
    image_inside,
    key_of_image,
    printable,
)
from step37_lit.errors import ConfigError
from step37_lit.images import SUFFIX_FORMATS

TEXT_SUFFIXES = ("json", "txt")
# Not formats that are taken, but nobody puts one into a folder of pictures for another reason.
OTHER_IMAGE_SUFFIXES = ("avif", "bmp", "gif", "heic", "jfif", "tif", "tiff")


class FolderSource(Source):
    """A ref is (name of the picture, names of its text files), relative to the folder; subfolders are read as well.

    Hidden files and files that are neither text nor pictures are left out and counted. Everything else that has no
    partner is a bad item, since one of the two was lost.
    """

    format = "folder"

    def __init__(self, folder: Path):
        self.root = folder.resolve()
        self.name = self.root.name
        self._left_out: Counter[str] = Counter()

    def refs(self) -> Iterator[Ref | BadItem]:
        self._left_out.clear()
        for below, folders, names in os.walk(self.root, onerror=self._cannot_list):
            folders.sort()  # the walk goes on in this order
            at = PurePosixPath(Path(below).relative_to(self.root).as_posix())
            for name in [name for name in folders if os.path.islink(os.path.join(below, name))]:
                yield self._bad(str(at / name), "a link to a folder is not followed")
            yield from self._refs_of(at, sorted(names))

    def _refs_of(self, at: PurePosixPath, names: list[str]) -> Iterator[Ref | BadItem]:
        texts: dict[str, list[str]] = {}
        pictures: list[PurePosixPath] = []
        for name in names:
            path = at / name
            suffix = path.suffix.removeprefix(".").lower()
            if name.startswith("."):
                self._left_out["hidden"] += 1
            elif suffix in SUFFIX_FORMATS or suffix in OTHER_IMAGE_SUFFIXES:
                pictures.append(path)
            elif suffix in TEXT_SUFFIXES:
                texts.setdefault(path.stem, []).append(str(path))
            else:
                self._left_out[path.suffix or "no suffix"] += 1
        for path in pictures:
            if path.stem in texts:
                yield str(path), tuple(texts[path.stem])
            else:
                yield self._bad(str(path), f"no {path.stem}.txt or {path.stem}.json beside it")
        for stem in sorted(texts.keys() - {path.stem for path in pictures}):
            yield self._bad(
                texts[stem][0], f"no picture {stem}.jpg (or {', '.join(list(SUFFIX_FORMATS)[1:])}) beside it"
            )

    def item(self, ref: Ref) -> Item:
        name, text_names = ref
        key = key_of_image(name)
        place = printable(name)
        try:
            image = image_inside(self.root, name)
            texts = {PurePosixPath(text).suffix[1:].lower(): self._text(text) for text in text_names}
            if len(texts) != len(text_names):
                raise ValueError(f"expected one text file of a kind, found {', '.join(text_names)}")
            check_texts(texts, 1)
        except ValueError as error:
            raise BadItem(place, key, "", str(error)) from error
        return Item(key, place, texts, [image])

    def left_out(self) -> str:
        kinds = ", ".join(f"{number} {printable(kind)}" for kind, number in sorted(self._left_out.items()))
        return f"; left out: {kinds}" if kinds else ""

    def _text(self, name: str) -> bytes:
        path, found = file_inside(self.root, name)
        if found.st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{name!r}: expected at most {MAX_TEXT_BYTES} bytes of text, found {found.st_size}")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{name!r}: {error.strerror}") from error

    @staticmethod
    def _bad(name: str, reason: str) -> BadItem:
        return BadItem(printable(name), "", "", reason)

    @staticmethod
    def _cannot_list(error: OSError) -> None:
        raise ConfigError("SOURCE", "folders that can be read", error.strerror, file=error.filename)
