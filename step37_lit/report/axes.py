"""Axes: round numbers for ticks, and places in per cent of an axis."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

LOG_SPAN = 8.0  # a logarithmic axis needs values this many times apart


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: what it says and its place in per cent from the axis's start."""

    label: str
    at: float


@dataclass(frozen=True)
class Axis:
    """An axis from `start` to `end`.

    Args:
        start: Value at 0 %.
        end: Value at 100 %, above `start`.
        log: Whether equal distances are equal ratios; needs positive values.
    """

    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, least: float, most: float, zero: bool = False, log: bool = False) -> Axis:
        """With a little room around the values.

        Args:
            least: The smallest value.
            most: The largest value, the same or above.
            zero: Begin at 0, where no value is below.
            log: Logarithmic, where the values are positive and far apart.
        """
        if log and least > 0 and most > LOG_SPAN * least:
            room = (most / least) ** 0.05
            return cls(least / room, most * room, log=True)
        room = 0.06 * (most - least) or 0.1 * abs(most) or 1.0
        start = 0.0 if zero and least >= 0 else least - room
        return cls(start, most + room)

    def at(self, value: float) -> float:
        """Per cent from the start."""
        if self.log:
            return 100 * math.log(value / self.start) / math.log(self.end / self.start)
        return 100 * (value - self.start) / (self.end - self.start)

    def ticks(self, most: int, percent: bool = False) -> tuple[Tick, ...]:
        """At most `most` round values, or a few more on a logarithmic axis."""
        values = self._log_values(most) if self.log else self._linear_values(most)
        return tuple(Tick(tick_label(value, percent), self.at(value)) for value in values)

    def _linear_values(self, most: int) -> list[float]:
        step = round_step((self.end - self.start) / most)
        numbers = range(math.ceil(self.start / step - 1e-9), math.floor(self.end / step + 1e-9) + 1)
        return [number * step for number in numbers]

    def _log_values(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.start)), math.ceil(math.log10(self.end)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            values = [digit * 10.0**decade for decade in decades for digit in digits]
            values = [value for value in values if self.start <= value <= self.end]
            if len(values) <= most + 1:
                break
        return values[:: -(-len(values) // (most + 1))]  # very many decades


def round_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, ... times a power of ten that is not below `least`, which is positive."""
    for power in itertools.count(math.floor(math.log10(least))):
        for digit in (1, 2, 5):
            if digit * 10.0**power >= least * (1 - 1e-9):
                return digit * 10.0**power
    raise AssertionError("there is always one")


def tick_label(value: float, percent: bool = False) -> str:
    """A round number as short as it can be."""
    if percent:
        return f"{100 * value:.10g} %"
    return short(value, digits=10)


def short(value: float, percent: bool = False, digits: int = 4) -> str:
    """A number with `digits` significant digits, thousands separated; very small and very large ones as 6e-4."""
    if percent:
        return f"{100 * value:.1f} %"
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded and not 1e-3 <= abs(rounded) < 1e7:
        mantissa, _, power = f"{rounded:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(power)}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(rounded))) if rounded else 0))
    text = f"{rounded:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
