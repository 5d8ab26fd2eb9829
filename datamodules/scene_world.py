"""What a scene can hold, how scenes are drawn from (seed, index), and which combinations are never trained on.

A scene has 1 to 4 things. A thing has a shape, a colour, a texture, a size and a place. One colour for each shape, and
one shape for each colour, is kept out of training: a pair (colour, shape) is *held out* when `HELD_OUT` says so. The
held-out share is small and lies evenly over all values, so that no value is rarer than another in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "heart", "diamond")
# No word that follows an article begins with a vowel: "an" would give the answer away.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (245, 50, 50),
    "green": (50, 200, 60),
    "blue": (60, 105, 255),
    "yellow": (240, 225, 40),
    "brown": (185, 120, 60),
    "purple": (175, 60, 235),
    "pink": (250, 160, 205),
    "cyan": (50, 215, 225),
}
TEXTURES = ("plain", "striped", "dotted")
SIZES = ("small", "large")
PLACES: dict[str, tuple[float, float]] = {  # centre as a share of the picture's width and height
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
# Near the mean that the model's normalisation subtracts: on black ones hues were learnt long after shapes.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "gray": (112, 110, 104),
    "slate": (78, 92, 128),
    "olive": (104, 104, 62),
}
MAX_THINGS = 4
HELD_OUT = frozenset(zip(COLORS, (SHAPES[3:] + SHAPES[:3]), strict=True))

Split = Literal["train", "seen", "unseen"]
SPLITS: tuple[Split, ...] = ("train", "seen", "unseen")


@dataclass(frozen=True)
class Thing:
    """One shape of a scene, in the words that captions use."""

    shape: str
    color: str
    texture: str
    size: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Things in reading order of their places (top left first, bottom right last), on a background."""

    things: tuple[Thing, ...]
    background: str


SEEN_PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)
UNSEEN_PAIRS = tuple(sorted(HELD_OUT))


def generator(seed: int, split: Split, index: int, stream: str) -> np.random.Generator:
    """The random numbers of one scene: independent of every other scene, split and stream ("scene", "pixels", ...)."""
    return np.random.default_rng([seed, SPLITS.index(split), index, *stream.encode()])


def draw_scene(seed: int, split: Split, index: int, count_weights: tuple[float, ...]) -> Scene:
    """Scene number `index` of a split; a pure function of its arguments.

    Args:
        seed: Seed of the data set.
        split: `train` and `seen` hold pairs of colour and shape that are not held out, `unseen` only held-out ones.
        index: Number of the scene, 0 or more.
        count_weights: Relative frequency of 1, 2, 3 and 4 things.
    """
    random = generator(seed, split, index, "scene")
    weights = np.asarray(count_weights, dtype=float)
    count = 1 + int(random.choice(len(weights), p=weights / weights.sum()))
    places = sorted(random.choice(len(PLACES), size=count, replace=False))
    pairs = UNSEEN_PAIRS if split == "unseen" else SEEN_PAIRS
    things = []
    for place in places:
        color, shape = pairs[random.integers(len(pairs))]
        texture, size = TEXTURES[random.integers(len(TEXTURES))], SIZES[random.integers(len(SIZES))]
        things.append(Thing(shape, color, texture, size, tuple(PLACES)[place]))
    return Scene(tuple(things), tuple(BACKGROUNDS)[random.integers(len(BACKGROUNDS))])
