"""Histogram of token lengths and scatter of picture sizes, as numbers that an SVG can take: per cent of its sides.

Per cent and not units of a view box, so that text keeps its size whatever the width of the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

MOST_BARS = 48
FEWEST_BARS = 12  # a set of equal lengths must not look like a wall
X_TICKS, Y_TICKS = 7, 5  # at most, and one at zero
CELLS_PER_OCTAVE = 8  # pictures whose sides differ by less than 9% share a dot
SMALLEST_DOT, LARGEST_DOT = 2.5, 13.0  # pixels of their radius


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its value and its place in per cent from the axis's start."""

    value: int
    at: float


@dataclass(frozen=True)
class Bar:
    """Texts of `first` to `last` tokens; place and size in per cent from the left and from the bottom."""

    first: int
    last: int
    count: int
    x: float
    width: float
    height: float


@dataclass(frozen=True)
class Histogram:
    """Token lengths.

    Args:
        bars: Those that are not empty.
        x_ticks: Tokens.
        y_ticks: Texts.
        limit_at: Place of the pack's length in per cent, or None where it is far outside.
    """

    bars: tuple[Bar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    limit_at: float | None


@dataclass(frozen=True)
class Dot:
    """Pictures of nearly one size, `width` x `height` on average; place in per cent from the left and the bottom."""

    width: int
    height: int
    count: int
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class SizePlot:
    """Sizes of pictures on logarithmic axes.

    Args:
        dots: The most frequent ones first, so that the rare ones are drawn over them.
        x_ticks: Widths in pixels.
        y_ticks: Heights in pixels.
        common: The most frequent sizes: width, height, number of pictures.
        distinct: Number of different sizes.
    """

    dots: tuple[Dot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    common: tuple[tuple[int, int, int], ...]
    distinct: int


def histogram(lengths: np.ndarray, max_length: int) -> Histogram:
    """Bars of equal width over token lengths, with borders at round numbers.

    Args:
        lengths: [n] int, at least one.
        max_length: Tokens of a pack.
    """
    least, most = int(lengths.min()), int(lengths.max())
    width = _round_step(most + 1 - least, MOST_BARS)
    first, last = least // width, most // width + 1  # borders in units of the width
    lacking = max(0, FEWEST_BARS - (last - first))
    first = max(0, first - lacking // 2)
    last = max(last, first + FEWEST_BARS)
    start, end = first * width, last * width
    counts = np.bincount(lengths // width - first, minlength=last - first)
    y_ticks, top = _counts_axis(int(counts.max()))
    bar_width = _share(width, 0, end - start)
    bars = tuple(
        Bar(low, low + width - 1, count, _share(low, start, end), bar_width, _share(count, 0, top))
        for low, count in zip(range(start, end, width), counts.tolist(), strict=True)
        if count
    )
    step = _round_step(end - start, X_TICKS)
    x_ticks = tuple(Tick(value, _share(value, start, end)) for value in range(-(-start // step) * step, end + 1, step))
    return Histogram(bars, x_ticks, y_ticks, _share(max_length, start, end) if start < max_length <= end else None)


def size_plot(sizes: np.ndarray, most_common: int = 6) -> SizePlot:
    """Picture sizes.

    Args:
        sizes: [n, 2] int, width and height in pixels, at least one picture.
        most_common: Rows of `SizePlot.common`.
    """
    x_axis, y_axis = (_LogAxis(int(column.min()), int(column.max())) for column in sizes.T)
    _, place, counts = _grouped(np.round(CELLS_PER_OCTAVE * np.log2(sizes)).astype(np.int64))
    means = [np.bincount(place, weights=side) / counts for side in sizes.T]
    dots = []
    for cell in np.argsort(-counts, kind="stable").tolist():
        width, height = (float(mean[cell]) for mean in means)
        radius = max(SMALLEST_DOT, LARGEST_DOT * math.sqrt(counts[cell] / counts.max()))
        at = x_axis.at(width), y_axis.at(height)
        dots.append(Dot(round(width), round(height), int(counts[cell]), *at, radius))
    exact, _, exact_counts = _grouped(sizes.astype(np.int64))
    order = np.argsort(-exact_counts, kind="stable")[:most_common]
    common = tuple((int(exact[i, 0]), int(exact[i, 1]), int(exact_counts[i])) for i in order)
    return SizePlot(tuple(dots), x_axis.ticks(), y_axis.ticks(), common, len(exact))


class _LogAxis:
    """A logarithmic axis with room around its values."""

    def __init__(self, least: int, most: int):
        self.start, self.end = math.log2(least) - 0.4, math.log2(most) + 0.4

    def at(self, value: float) -> float:
        return _share(math.log2(value), self.start, self.end)

    def ticks(self) -> tuple[Tick, ...]:
        """At round numbers, as few as say where things are."""
        low, high = 2**self.start, 2**self.end
        decades = range(max(0, math.floor(math.log10(low))), math.ceil(math.log10(high)) + 1)
        for digits in ((10,), (10, 20, 50), (10, 15, 20, 30, 40, 50, 60, 80)):
            values = sorted({digit * 10**decade // 10 for decade in decades for digit in digits})
            ticks = tuple(Tick(value, self.at(value)) for value in values if low <= value <= high)
            if len(ticks) >= 3:
                break
        return ticks


def _grouped(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct rows of [n, 2] int64, from 0 to 2^31; for each of the n the number of its row; how often each is there.

    `np.unique` over rows takes ten times as long as over numbers.
    """
    distinct, place, counts = np.unique(pairs[:, 0] << 32 | pairs[:, 1], return_inverse=True, return_counts=True)
    return np.stack([distinct >> 32, distinct & 0xFFFFFFFF], axis=1), place, counts


def _counts_axis(most: int) -> tuple[tuple[Tick, ...], int]:
    """Ticks from 0 to a round number that is not below `most`, and that number."""
    step = _round_step(most, Y_TICKS)
    top = -(-most // step) * step
    return tuple(Tick(value, _share(value, 0, top)) for value in range(0, top + 1, step)), top


def _round_step(span: int, parts: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that covers `span` in at most `parts` parts."""
    scale = 1
    while True:
        for step in (scale, 2 * scale, 5 * scale):
            if span <= step * parts:
                return step
        scale *= 10


def _share(value: float, start: float, end: float) -> float:
    return 100 * (value - start) / (end - start)
