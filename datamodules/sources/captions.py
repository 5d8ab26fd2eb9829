"""Pictures with captions: Flickr8k's `captions.txt` and COCO's captions JSON; a picture's captions are one sample."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.conversations import parse_text
from datamodules.sources.base import (
    BadItem,
    Item,
    Ref,
    Source,
    check_line,
    check_texts,
    from_json,
    image_inside,
    image_root,
    key_of_image,
    printable,
    read_lines,
    read_whole,
    to_json,
)
from step37_lit.errors import ConfigError

CSV_HEADER = ["image", "caption"]
BOM = "\ufeff"


class CaptionSource(Source):
    """A ref is (place, name of the picture, its captions).

    Args:
        file: The text file with names and captions.
        image_folder: Where the pictures are; None looks for `images` or `Images` beside the file, then beside it.
    """

    def __init__(self, file: Path, image_folder: str | None = None):
        self.file, self.name = file, file.stem
        self.root = image_root(file.parent, image_folder)

    def place(self, within: str) -> str:
        return printable(f"{self.file.name}, {within}")

    def item(self, ref: Ref) -> Item:
        place, name, captions = ref
        key = key_of_image(name)
        try:
            image = image_inside(self.root, name)
            texts = {"json": to_json({"captions": list(captions)})}
            check_texts(texts, 1)
        except ValueError as error:
            raise BadItem(place, key, "", str(error)) from error
        return Item(key, place, texts, [image])


class Flickr8kSource(CaptionSource):
    """`captions.txt`: CSV with the header `image,caption`, one record a line; a picture may have several lines."""

    format = "flickr8k"

    def __init__(self, file: Path, image_folder: str | None = None):
        super().__init__(file, image_folder)
        self.name = file.resolve().parent.name

    def refs(self) -> Iterator[Ref | BadItem]:
        captions: dict[str, tuple[str, list[str]]] = {}
        lines = read_lines(self.file)
        _, _, header = next(lines, (1, 0, b""))
        if not is_flickr8k_header(header):
            raise ConfigError("header", ",".join(CSV_HEADER), header[:80].decode(errors="replace"), file=self.file)
        for number, _, line in lines:
            if not line:
                continue
            place = self.place(f"line {number}")
            try:
                name, caption = self._record(line)
            except ValueError as error:
                yield BadItem(place, "", "", str(error))
            else:
                captions.setdefault(name, (place, []))[1].append(caption)
        for name, (place, texts) in captions.items():
            yield place, name, tuple(texts)

    @staticmethod
    def _record(line: bytes) -> tuple[str, str]:
        # Line by line: a quote that is never closed would otherwise swallow the rest of the file.
        check_line(line)
        try:
            fields = next(csv.reader([line.decode()], strict=True))
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8: {error.reason} at byte {error.start} of the line") from error
        except csv.Error as error:
            raise ValueError(f"not CSV: {error}") from error
        if len(fields) != 2:
            raise ValueError(f"expected 2 fields ({','.join(CSV_HEADER)}; a comma needs quotes), found {len(fields)}")
        return fields[0].strip(), parse_text("txt", fields[1].encode()).captions[0]


def is_flickr8k_header(line: bytes) -> bool:
    text = line[:80].decode(errors="replace").removeprefix(BOM)
    return [field.strip().lower() for field in text.split(",")] == CSV_HEADER


class CocoSource(CaptionSource):
    """COCO's `captions_*.json`: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}."""

    format = "coco"

    def refs(self) -> Iterator[Ref | BadItem]:
        content = self._content()
        names: dict[int | str, tuple[str, str]] = {}
        for i, image in enumerate(content["images"]):
            place = self.place(f"images[{i}]")
            try:
                identity, name = _checked_image(image)
                if identity in names:
                    raise ValueError(f"id {identity!r} is that of {names[identity][0]} too")
                names[identity] = place, name
            except ValueError as error:
                yield BadItem(place, "", "", str(error))
        captions: dict[int | str, list[str]] = {identity: [] for identity in names}
        for i, annotation in enumerate(content["annotations"]):
            try:
                identity, caption = _checked_annotation(annotation)
                if identity not in captions:
                    raise ValueError(f"image_id {identity!r} is not among the images")
                captions[identity].append(caption)
            except ValueError as error:
                yield BadItem(self.place(f"annotations[{i}]"), "", "", str(error))
        for identity, (place, name) in names.items():
            if captions[identity]:
                yield place, name, tuple(captions[identity])
            else:
                yield BadItem(place, key_of_image(name), "", "no caption that can be used")

    def _content(self) -> dict[str, list[Any]]:
        data = read_whole(self.file)
        try:
            content = from_json(data)
        except ValueError as error:
            raise ConfigError("SOURCE", "a JSON file", str(error), file=self.file) from error
        for name in ("images", "annotations"):
            if not isinstance(content, dict) or not isinstance(content.get(name), list):
                raise ConfigError(name, "a list in an object", "something else", file=self.file)
        return content


def _checked_image(image: Any) -> tuple[int | str, str]:
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        raise ValueError("expected an object with a file_name")
    return _checked_id(image, "id"), image["file_name"]


def _checked_annotation(annotation: Any) -> tuple[int | str, str]:
    if not isinstance(annotation, dict) or not isinstance(annotation.get("caption"), str):
        raise ValueError("expected an object with a caption")
    return _checked_id(annotation, "image_id"), parse_text("txt", annotation["caption"].encode()).captions[0]


def _checked_id(content: dict[str, Any], name: str) -> int | str:
    identity = content.get(name)
    if isinstance(identity, bool) or not isinstance(identity, int | str):
        raise ValueError(f"expected {name}, a number or text, found {identity!r}")
    return identity
