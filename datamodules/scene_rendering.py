"""Draws a `Scene` with Pillow: shapes with textures and jitter on a graded, noisy background."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from datamodules.scene_world import BACKGROUNDS, COLORS, PLACES, Scene, Thing

Point = tuple[float, float]

# Radius of a shape as a share of the picture's side, lowest and highest of each size.
RADII = {"small": (0.145, 0.16), "large": (0.215, 0.235)}
CENTER_JITTER = 0.02  # share of the picture's side
TINT, GRADIENT = 8, 15  # levels of 255
COLOR_JITTER = 18  # levels of 255
PERIOD = 0.125  # of stripes and dots, as a share of the picture's side
WHITE = (250, 250, 250)
SHADE = 0.35  # brightness of dots against the colour; not black, so that outlines stay
ROTATION = 6.0  # degrees to either side
NOISE_DIVISOR = 16  # noise of 256 / 16 levels of 255
OVERSAMPLING = 2


def render(scene: Scene, side: int, random: np.random.Generator) -> Image.Image:
    """A picture of the scene.

    Args:
        scene: What to draw.
        side: Width and height in pixels.
        random: Source of everything that the scene leaves open (exact place, tint, phase of textures, noise).

    Returns:
        An RGB picture of `side` x `side` pixels.
    """
    picture = Image.fromarray(_background(scene.background, side, random), "RGB")
    for thing in scene.things:
        _paint(picture, thing, side, random)
    # A byte a value is much cheaper to draw than an integer in a range: v // 16 - 8 is uniform in -8..7.
    noise = np.frombuffer(random.bytes(side * side * 3), dtype=np.uint8).reshape(side, side, 3) // NOISE_DIVISOR
    noisy = np.asarray(picture, dtype=np.int16) + noise - 128 // NOISE_DIVISOR
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), "RGB")


def _background(name: str, side: int, random: np.random.Generator) -> np.ndarray:
    """The named colour with a slight tint and a gradient: [side, side, 3] uint8."""
    base = np.array(BACKGROUNDS[name]) + random.uniform(-TINT, TINT, size=3)
    slope = random.uniform(-GRADIENT, GRADIENT, size=2)
    ramp = np.linspace(-0.5, 0.5, side)
    shade = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    return (base + shade[..., None]).clip(0, 255).astype(np.uint8)


def _paint(picture: Image.Image, thing: Thing, side: int, random: np.random.Generator) -> None:
    radius = random.uniform(*RADII[thing.size]) * side
    jitter = random.uniform(-CENTER_JITTER, CENTER_JITTER, size=2)
    x, y = ((share + shift) * side for share, shift in zip(PLACES[thing.place], jitter, strict=True))
    half = math.ceil(radius * 1.1)
    left, top = round(x) - half, round(y) - half
    angle = random.uniform(-ROTATION, ROTATION)

    scale = OVERSAMPLING
    mask = Image.new("L", (2 * half * scale, 2 * half * scale))
    draw_shape(ImageDraw.Draw(mask), thing.shape, half * scale, radius * scale, math.radians(angle))
    mask = mask.reduce(scale)
    color = np.array(COLORS[thing.color]) + random.integers(-COLOR_JITTER, COLOR_JITTER + 1, size=3)
    fill = tuple(int(level) for level in color.clip(0, 255))
    tile = Image.new("RGB", mask.size, fill)
    draw_texture(ImageDraw.Draw(tile), thing.texture, mask.size[0], PERIOD * side, fill)
    picture.paste(tile, (left, top), mask)


def draw_texture(draw: ImageDraw.ImageDraw, texture: str, side: int, period: float, fill: tuple[int, ...]) -> None:
    """White stripes or dark dots on a square tile of `side` pixels, counted from its middle; nothing for `plain`."""
    if texture == "plain":
        return
    count = math.ceil(side / 2 / period)
    marks = [side / 2 + period * k for k in range(-count, count + 1)]
    dark = tuple(int(level * SHADE) for level in fill)
    half = period / 5 if texture == "striped" else period / 3.5
    for y in marks:
        if texture == "striped":
            draw.rectangle((0, y - half, side, y + half), fill=WHITE)
        else:
            for x in marks:
                draw.ellipse((x - half, y - half, x + half, y + half), fill=dark)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, center: float, radius: float, angle: float) -> None:
    """Fills one shape with 255 around (center, center); `angle` in radians."""
    if shape in ("circle", "ring"):
        draw.ellipse((center - radius, center - radius, center + radius, center + radius), fill=255)
        if shape == "ring":
            hole = radius * 0.55
            draw.ellipse((center - hole, center - hole, center + hole, center + hole), fill=0)
        return
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [
        (center + radius * (x * cos - y * sin), center + radius * (x * sin + y * cos)) for x, y in OUTLINES[shape]
    ]
    draw.polygon(corners, fill=255)


def _star(points: int, inner: float) -> list[Point]:
    turns = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [
        ((inner if i % 2 else 1.05) * math.cos(t), (inner if i % 2 else 1.05) * math.sin(t))
        for i, t in enumerate(turns)
    ]


def _heart() -> list[Point]:
    """The usual heart curve, 16 sin^3 t against 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, scaled to the unit circle."""
    turns = [2 * math.pi * i / 28 for i in range(28)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
        for t in turns
    ]


ARM = 0.34  # half the width of a cross's arms
OUTLINES: dict[str, list[Point]] = {  # corners in units of the radius, y downwards
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1.05), (0.75, 0), (0, 1.05), (-0.75, 0)],
    "cross": [
        (-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
        (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM),
    ],
    "star": _star(5, 0.42),
    "heart": _heart(),
}  # fmt: skip
