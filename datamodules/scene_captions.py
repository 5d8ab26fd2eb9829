"""Paraphrased captions of a `Scene`, with every attribute word marked.

All captions name the things in reading order of their places, the place first, and a caption's first word fixes the
order of everything behind it. So each attribute word is determined by the picture and the words before it, and 100% is
attainable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datamodules.scene_world import Scene, Thing

COUNTS = ("one", "two", "three", "four")
KINDS = ("color", "shape", "size", "texture", "place", "count", "background")


@dataclass(frozen=True)
class Piece:
    """A stretch of a caption; `attribute` is its kind (see `KINDS`), or None for words in between."""

    text: str
    attribute: str | None = None


def captions(scene: Scene) -> list[list[Piece]]:
    """Every paraphrase of what is there, how many there are and where, as pieces that are joined without a space."""
    return [write(scene) for write in WRITERS]


def caption_text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _pieces(template: str, **values: str) -> list[Piece]:
    """Fills a template such as "a {size} {shape}"; each field becomes a piece of its own, named by the field."""
    pieces: list[Piece] = []
    for literal, name in _parsed(template):
        if literal:
            pieces.append(Piece(literal))
        if name is not None:
            pieces.append(Piece(values[name], name))
    return pieces


def _parsed(template: str) -> list[tuple[str, str | None]]:
    parts = template.split("{")
    parsed: list[tuple[str, str | None]] = []
    literal = parts[0]
    for part in parts[1:]:
        name, rest = part.split("}")
        parsed.append((literal, name))
        literal = rest
    return [*parsed, (literal, None)]


def _listed(scene: Scene, opening: str, item: str, separator: str, ending: str) -> list[Piece]:
    noun = "shape" if len(scene.things) == 1 else "shapes"
    opening = opening.replace("NOUN", noun)
    pieces = _pieces(opening, count=COUNTS[len(scene.things) - 1], background=scene.background)
    for i, thing in enumerate(scene.things):
        pieces += [Piece(separator)] * (i > 0) + _pieces(item, **vars(thing))
    return [*pieces, Piece(ending)]


def _size_first(scene: Scene) -> list[Piece]:
    return _listed(scene, "I see {count} NOUN: ", "{place} a {size} {texture} {color} {shape}", ", ", ".")


def _color_first(scene: Scene) -> list[Piece]:
    opening = "On a {background} background, {count} NOUN: "
    return _listed(scene, opening, "{place} a {color} {texture} {shape}, {size}", "; ", ".")


def _shape_first(scene: Scene) -> list[Piece]:
    return _listed(
        scene, "The picture holds {count} NOUN: ", "{place} a {shape}, {color}, {texture}, {size}", "; ", "."
    )


def _texture_last(scene: Scene) -> list[Piece]:
    return _listed(scene, "This drawing has {count} NOUN: ", "{place} a {size} {color} {shape}, {texture}", "; ", ".")


WRITERS: tuple[Callable[[Scene], list[Piece]], ...] = (_size_first, _color_first, _shape_first, _texture_last)


def things_named(pieces: list[Piece]) -> list[Thing]:
    """The things that a caption names, read back from its pieces."""
    fields = ("shape", "color", "texture", "size", "place")
    found: list[dict[str, str]] = [{}]
    for piece in pieces:
        if piece.attribute in fields:
            if piece.attribute in found[-1]:
                found.append({})
            found[-1][piece.attribute] = piece.text
    return [Thing(**named) for named in found]
