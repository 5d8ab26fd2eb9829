"""Heat map of expert load: a row for each layer with routed experts, a cell for each expert."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from step37_lit.report.axes import Axis, Tick, round_step
from step37_lit.report.charts import Chart
from step37_lit.report.read import ExpertLoad, Series

# Borders between levels, in tokens of an expert as a multiple of its layer's mean; the middle level is even load.
BORDERS = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)
LEVELS = ("under ¼ ×", "¼ to ½ ×", "½ to 0.8 ×", "0.8 to 1¼ ×", "1¼ to 2 ×", "2 to 4 ×", "4 × and more")
MOST_TICKS = 8
BUSIEST = Chart("Busiest expert", "multiple of the mean", zero=True)
EVENNESS = Chart("Evenness", "entropy / that of even load")


@dataclass(frozen=True)
class Row:
    """A layer.

    Args:
        layer: Of the decoder, from 0.
        cells: Levels and the paths of their cells in SVG's language; an expert is 1 wide, a row 1 high.
        title: Its figures in words, line by line.
    """

    layer: int
    cells: tuple[tuple[int, str], ...]
    title: tuple[str, ...]


@dataclass(frozen=True)
class HeatMap:
    """The last load of every layer.

    Args:
        step: Optimizer steps done.
        experts: Of a layer, at most.
        tokens: Of the first layer, over all its experts.
        rows: Layers in their order.
        ticks: Numbers of experts, in the middle of their columns.
    """

    step: int
    experts: int
    tokens: int
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]


def heat_map(loads: Sequence[ExpertLoad]) -> HeatMap | None:
    """The load at the last step that has all layers; None without any."""
    layers = {load.layer for load in loads}
    by_step: dict[int, dict[int, ExpertLoad]] = {}
    for load in loads:
        by_step.setdefault(load.step, {})[load.layer] = load
    whole = [step for step, found in by_step.items() if found.keys() == layers]
    if not whole:
        return None
    found = [by_step[max(whole)][layer] for layer in sorted(layers)]
    experts = max(len(load.tokens) for load in found)
    axis, every = Axis(0, experts), max(1, int(round_step(experts / MOST_TICKS)))
    return HeatMap(
        step=max(whole),
        experts=experts,
        tokens=int(found[0].tokens.sum()),
        rows=tuple(_row(load, y) for y, load in enumerate(found)),
        ticks=tuple(Tick(f"{expert}", axis.at(expert + 0.5)) for expert in range(0, experts, every)),
    )


def balance(loads: Sequence[ExpertLoad]) -> list[tuple[Chart, dict[str, Series]]]:
    """Charts of how even the load is, over the layers."""
    busiest: dict[int, list[float]] = {}
    evenness: dict[int, list[float]] = {}
    for load in sorted(loads, key=lambda load: load.step):
        if load.tokens.any():
            busiest.setdefault(load.step, []).append(float(load.tokens.max() / load.tokens.mean()))
            evenness.setdefault(load.step, []).append(_evenness(load.tokens))
    return [(BUSIEST, _over_layers(busiest, "highest", max)), (EVENNESS, _over_layers(evenness, "lowest", min))]


def _over_layers(
    values: dict[int, list[float]], name: str, extreme: Callable[[list[float]], float]
) -> dict[str, Series]:
    steps = np.array(list(values), dtype=np.int64)
    worst, mean = ([of(v) for v in values.values()] for of in (extreme, statistics.fmean))
    return {f"{name} layer": Series(steps, np.array(worst)), "mean of layers": Series(steps, np.array(mean))}


def _row(load: ExpertLoad, y: int) -> Row:
    mean = load.tokens.mean()
    times = (load.tokens / mean if mean else load.tokens).tolist()
    cells = [""] * len(LEVELS)
    for x, value in enumerate(times):
        cells[bisect.bisect_right(BORDERS, value)] += f"M{x} {y}h1v1h-1z"
    filled = tuple((level, path) for level, path in enumerate(cells) if path)
    return Row(load.layer, filled, _title(load, times))


def _title(load: ExpertLoad, times: list[float]) -> tuple[str, ...]:
    most, least = max(range(len(times)), key=times.__getitem__), min(range(len(times)), key=times.__getitem__)
    lines = [
        f"layer {load.layer}, {int(load.tokens.sum()):,} tokens to {len(times)} experts",
        f"most: expert {most}, {times[most]:.2f} × the mean",
        f"least: expert {least}, {times[least]:.2f} × the mean",
        f"entropy: {100 * _evenness(load.tokens):.1f} % of that of even load",
    ]
    if len(load.bias):
        lines.append(f"router bias: {load.bias.min():.3g} to {load.bias.max():.3g}")
    return tuple(lines)


def _evenness(tokens: np.ndarray) -> float:
    """Entropy of the load as a share of the largest one; 1 where all experts get the same."""
    share = tokens[tokens > 0] / tokens.sum() if tokens.sum() else np.ones(1)
    return float(-(share * np.log(share)).sum()) / math.log(len(tokens)) if len(tokens) > 1 else 1.0
