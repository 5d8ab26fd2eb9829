"""Conversations: JSONL, each line {"messages": [...], "images": ["path", ...], "id": "..."}."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datamodules.sources.base import (
    BadItem,
    Item,
    Ref,
    Source,
    check_line,
    check_texts,
    from_json,
    image_inside,
    key_of,
    printable,
    read_lines,
    to_json,
)
from step37_lit.errors import ConfigError


class ChatSource(Source):
    """A ref is (number of the line, its offset, its length). Fields other than `images` are kept in the sample.

    Args:
        file: The JSONL.
        image_folder: What the pictures' paths are relative to; None is the folder of the JSONL.
    """

    format = "chat"

    def __init__(self, file: Path, image_folder: str | None = None):
        if image_folder is not None and not Path(image_folder).is_dir():
            raise ConfigError("--image-root", "a folder", image_folder)
        self.file, self.name = file, file.stem
        self.root = Path(image_folder if image_folder is not None else file.parent).resolve()

    def refs(self) -> Iterator[Ref | BadItem]:
        for number, offset, line in read_lines(self.file):
            try:
                check_line(line)
            except ValueError as error:
                yield BadItem(self._place(number), "", "", str(error))
            else:
                if line.strip():
                    yield number, offset, len(line)

    def item(self, ref: Ref) -> Item:
        number, offset, length = ref
        place, key = self._place(number), ""
        try:
            content = self._content(offset, length)
            key = self._key(content, number)
            images = [image_inside(self.root, name) for name in _image_names(content)]
            texts = {"json": to_json({name: value for name, value in content.items() if name != "images"})}
            check_texts(texts, len(images))
        except ValueError as error:
            raise BadItem(place, key, "", str(error)) from error
        return Item(key, place, texts, images)

    def _place(self, number: int) -> str:
        return printable(f"{self.file.name}, line {number}")

    def _content(self, offset: int, length: int) -> dict[str, Any]:
        with self.file.open("rb") as file:
            file.seek(offset)
            content = from_json(file.read(length))
        if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
            raise ValueError("expected an object with a list of messages")
        return content

    def _key(self, content: dict[str, Any], number: int) -> str:
        identity = content.get("id", f"{self.file.stem}-{number:08d}")
        if isinstance(identity, bool) or not isinstance(identity, int | str) or not str(identity):
            raise ValueError(f"expected an id of text or a number, found {identity!r}")
        return key_of(str(identity))


def _image_names(content: dict[str, Any]) -> list[str]:
    names = content.get("images", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('expected "images", a list of paths')
    return names
