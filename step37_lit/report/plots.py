"""Curves of a run, as numbers that an SVG can take: per cent of its sides, whatever its width.

A value that is logged at few steps is drawn as it is. One that is logged at many is drawn as means over equal spans of
steps, within the least and the most of each span.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from step37_lit.report.axes import Axis, Tick, short
from step37_lit.report.charts import Chart
from step37_lit.report.read import Series

MOST_SPANS = 100  # that a curve is drawn of
X_TICKS, Y_TICKS = 4, 5
DASHES_FROM = 6  # lines that colours can tell apart


@dataclass(frozen=True)
class Line:
    """A curve.

    Args:
        name: For the legend.
        colour: Number of its colour.
        dashed: Whether another line has the same colour.
        last: Its last value as text.
        path: Of the curve, in SVG's language.
        area: Of what lies between least and most; empty where values are drawn as they are.
        dots: Places of the values; none where they are too many.
        not_finite: How many values cannot be drawn, and the first step of them.
    """

    name: str
    colour: int
    dashed: bool
    last: str
    path: str
    area: str
    dots: tuple[tuple[float, float], ...]
    not_finite: tuple[int, int] | None


@dataclass(frozen=True)
class Spot:
    """A strip of the chart that tells its values, line by line, when it is pointed at."""

    x: float
    width: float
    title: tuple[str, ...]


@dataclass(frozen=True)
class Band:
    """A stage of the freezing schedule from step `first` to step `last`; place and width in per cent.

    Args:
        index: Its number in the schedule.
        name: Its name in the recipe.
        trains: The groups that train in it, in words; empty where the recipe is not known.
    """

    index: int
    name: str
    trains: str
    first: int
    last: int
    x: float
    width: float


@dataclass(frozen=True)
class Plot:
    """A chart with its data."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    spots: tuple[Spot, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class _Curve:
    """Means, least and most of spans of steps.

    Args:
        centers, means, low, high: [n] float64.
        first, last: [n] int64, the first and the last step that a value of the span has.
        pooled: Whether a span can have several values.
    """

    centers: np.ndarray
    means: np.ndarray
    low: np.ndarray
    high: np.ndarray
    first: np.ndarray
    last: np.ndarray
    pooled: bool


def plot(chart: Chart, data: dict[str, Series], steps: int) -> Plot:
    """A chart's curves.

    Args:
        chart: What is to be drawn.
        data: The logged values by the names of the lines, none of them empty.
        steps: Optimizer steps that the horizontal axis ends at.
    """
    curves = {name: _curve(series.finite, steps) for name, series in data.items() if len(series.finite.steps)}
    x_axis = Axis(0, max(1, steps))
    least = min((float(curve.low.min()) for curve in curves.values()), default=0.0)
    most = max((float(curve.high.max()) for curve in curves.values()), default=1.0)
    y_axis = Axis.over(least, most, chart.zero, chart.log)
    lines = (
        _line(name, number, series, curves.get(name), (x_axis, y_axis), chart.percent)
        for number, (name, series) in enumerate(data.items())
    )
    return Plot(
        title=chart.title,
        unit=chart.unit,
        lines=tuple(lines),
        spots=_spots(curves, x_axis, chart.percent),
        x_ticks=x_axis.ticks(X_TICKS),
        y_ticks=y_axis.ticks(Y_TICKS, chart.percent),
    )


def bands(stages: Series | None, configs: Sequence[Mapping[str, Any]], steps: int) -> tuple[Band, ...]:
    """The freezing stages that were reached, in their order.

    Args:
        stages: Number of the stage at each step, or None.
        configs: The schedule's stages in the recipe; one that is not there is named by its number.
        steps: Optimizer steps that the horizontal axis ends at.
    """
    if stages is None:
        return ()
    axis = Axis(0, max(1, steps))
    changes = np.flatnonzero(np.diff(stages.values)) + 1
    borders = [0, *changes.tolist(), len(stages.values)]
    found = []
    for start, end in itertools.pairwise(borders):
        index, first, last = int(stages.values[start]), int(stages.steps[start]), int(stages.steps[end - 1])
        config = configs[index] if index < len(configs) else {}
        name, trains = str(config.get("name", f"stage {index}")), _trains(config.get("train", {}))
        x = axis.at(first - 1)
        found.append(Band(index, name, trains, first, last, x, axis.at(last) - x))
    return tuple(found)


def _trains(groups: Mapping[str, Any]) -> str:
    """Groups with their factors on the learning rate, as the recipe has them."""
    texts = []
    for group, training in groups.items():
        given = training if isinstance(training, Mapping) else {"factor": training}
        every = (given.get("gradual") or {}).get("every_steps")
        by_layer = f", a layer more every {every} steps" if every is not None else ""
        texts.append(f"{group} × {given.get('factor', 1)}{by_layer}")
    return "; ".join(texts)


def _curve(series: Series, steps: int) -> _Curve:
    if len(series.steps) <= MOST_SPANS:
        values, at = series.values, series.steps
        return _Curve(at.astype(np.float64), values, values, values, at, at, pooled=False)
    span = -(-steps // MOST_SPANS)
    borders = np.flatnonzero(np.diff((series.steps - 1) // span, prepend=-1))
    counts = np.diff(borders, append=len(series.steps))
    first, last = series.steps[borders], series.steps[borders + counts - 1]
    return _Curve(
        centers=(first + last) / 2,
        means=np.add.reduceat(series.values, borders) / counts,
        low=np.minimum.reduceat(series.values, borders),
        high=np.maximum.reduceat(series.values, borders),
        first=first,
        last=last,
        pooled=True,
    )


def _line(name: str, number: int, series: Series, curve: _Curve | None, axes: tuple[Axis, Axis], percent: bool) -> Line:
    broken = series.steps[~np.isfinite(series.values)]
    places = () if curve is None else _places(curve.centers, curve.means, axes)
    area = ""
    if curve is not None and curve.pooled:
        edge = (*_places(curve.centers, curve.high, axes), *_places(curve.centers, curve.low, axes)[::-1])
        area = f"{_path(edge)}z"
    return Line(
        name=name,
        colour=number % DASHES_FROM,
        dashed=number >= DASHES_FROM,
        last=short(float(series.values[-1] if curve is None else curve.means[-1]), percent),
        path=_path(places),
        area=area,
        dots=places if curve is not None and not curve.pooled and len(places) <= MOST_SPANS // 2 else (),
        not_finite=(len(broken), int(broken[0])) if len(broken) else None,
    )


def _places(x: np.ndarray, y: np.ndarray, axes: tuple[Axis, Axis]) -> tuple[tuple[float, float], ...]:
    return tuple((axes[0].at(a), 100 - axes[1].at(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True))


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if i else 'M'}{x:.2f} {y:.2f}" for i, (x, y) in enumerate(places))


def _spots(curves: dict[str, _Curve], axis: Axis, percent: bool) -> tuple[Spot, ...]:
    """Strips around the places of the values that are closest together."""
    if not curves:
        return ()
    finest = max(curves.values(), key=lambda curve: (curve.pooled, len(curve.centers)))
    centers = finest.centers.tolist()
    middles = [(a + b) / 2 for a, b in itertools.pairwise(centers)]
    starts = [axis.start, *middles]
    ends = [*middles, axis.end]
    spots = []
    for start, end in zip(starts, ends, strict=True):
        told = [text for name, curve in curves.items() if (text := _told(name, curve, start, end, percent))]
        steps = [step for _, first, last in told for step in (first, last)]
        first, last = min(steps), max(steps)
        where = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        spots.append(Spot(axis.at(start), axis.at(end) - axis.at(start), (where, *(text for text, *_ in told))))
    return tuple(spots)


def _told(name: str, curve: _Curve, start: float, end: float, percent: bool) -> tuple[str, int, int] | None:
    """The last value of a curve in a strip as text, with the steps that it is of; None where it has none."""
    inside = np.flatnonzero((curve.centers > start) & (curve.centers <= end))
    if not len(inside):
        return None
    i = inside[-1]
    text = f"{name}: {short(float(curve.means[i]), percent)}"
    if curve.pooled:
        text += f" ({short(float(curve.low[i]), percent)} to {short(float(curve.high[i]), percent)})"
    return text, int(curve.first[i]), int(curve.last[i])
