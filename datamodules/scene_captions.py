"""Paraphrased captions of a `Scene`, with every attribute word marked.

All captions name the things in reading order of their places, the place first, and a caption's first word fixes the
order of everything behind it. So each attribute word is determined by the picture and the words before it, and 100% is
attainable.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

from datamodules.scene_world import COLORS, PLACES, SHAPES, SIZES, TEXTURES, Scene, Thing

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


def score_caption(scene: Scene, text: str) -> tuple[int, int]:
    """Attribute words that a free caption gets right, and how many there are to get right.

    A thing is looked for behind its place, up to the next place that the caption names. Its place, shape, colour,
    texture and size are right where exactly the true word is there; the caption's count is one more. Each place that is
    named and empty is one more to get wrong.
    """
    words = text.lower()
    starts = sorted((words.find(place), place) for place in PLACES if place in words)
    stretches = itertools.pairwise([*starts, (len(words), "")])
    said = {place: words[start:end] for (start, place), (end, _) in stretches}
    right = int([count for count in COUNTS if count in words.split()] == [COUNTS[len(scene.things) - 1]])
    for thing in scene.things:
        if thing.place not in said:
            continue
        right += 1
        kinds = ((thing.shape, SHAPES), (thing.color, COLORS), (thing.texture, TEXTURES), (thing.size, SIZES))
        for true, choices in kinds:
            found = [word for word in re.findall(r"[a-z]+", said[thing.place]) if word in choices]
            right += found == [true]
    empty = set(said) - {thing.place for thing in scene.things}
    return right, 1 + 5 * len(scene.things) + len(empty)


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
