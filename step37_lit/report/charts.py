"""Which charts a report has: what is logged under which name, what it is called and measured in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from step37_lit.report.read import Series

SUFFIX = r"(_\w+)?"  # of the split that a validation was of


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        title: Its heading.
        unit: Of the vertical axis.
        lines: Regular expression over whole names of logged values, and what the line is called; a split's suffix
            is added to it.
        percent: Whether the values are shares.
        zero: Whether the vertical axis begins at 0.
        log: Whether it is logarithmic where values are far apart.
    """

    title: str
    unit: str
    lines: dict[str, str] = field(default_factory=dict)
    percent: bool = False
    zero: bool = False
    log: bool = False


CHARTS = (
    Chart("Loss", "nats per token", {"train/loss": "training", f"val/loss{SUFFIX}": "validation"}, log=True),
    Chart("CIDEr-D", "0 to 10", {f"val/cider_d{SUFFIX}": "validation"}, zero=True),
    Chart("BLEU-4", "0 to 1", {f"val/bleu_4{SUFFIX}": "validation"}, zero=True),
    Chart("ROUGE-L", "0 to 1", {f"val/rouge_l{SUFFIX}": "validation"}, zero=True),
    Chart(
        "Attribute accuracy",
        "share of attribute words",
        {
            f"val/generated_attribute_accuracy{SUFFIX}": "generated",
            f"val/attribute_accuracy{SUFFIX}": "after the true words",
        },
        percent=True,
    ),
    Chart("Length of captions", "words", {f"val/caption_words{SUFFIX}": "validation"}),
    Chart("Learning rate", "by group of parameters", {r"lr-.*": ""}, zero=True),
    Chart("Gradient norm", "before clipping", {"train/grad_norm": "training"}, log=True),
    Chart("Speed", "tokens per second", {"train/tokens_per_second": "training"}, zero=True),
    Chart("Share of GEMM peak", "of this machine", {"train/mfu": "training"}, percent=True, zero=True),
    Chart("Padding", "share of positions", {"train/padding": "training"}, percent=True, zero=True),
    Chart("Waiting for data", "share of step time", {"train/data_wait": "training"}, percent=True, zero=True),
)


def lines_of(chart: Chart, metrics: dict[str, Series]) -> dict[str, Series]:
    """The chart's lines that were logged, by their names; equal ones are one line."""
    found = {}
    for pattern, called in chart.lines.items():
        for name, series in metrics.items():
            if match := re.fullmatch(pattern, name):
                suffix = (match[1] or "").replace("_", " ") if match.re.groups else ""
                found[f"{called},{suffix}" if suffix else called or name.rpartition("/")[2]] = series
    return _merged(found)


def other_charts(metrics: dict[str, Series]) -> list[tuple[Chart, dict[str, Series]]]:
    """Charts of what no chart above has; values whose names differ behind the last of two or more `/` share one."""
    shown = [pattern for chart in CHARTS for pattern in chart.lines]
    groups: dict[str, dict[str, Series]] = {}
    for name, series in metrics.items():
        if any(re.fullmatch(pattern, name) for pattern in shown):
            continue
        title, _, line = name.rpartition("/") if name.count("/") > 1 else (name, "", name.rpartition("/")[2])
        groups.setdefault(title, {})[line] = series
    return [(Chart(title, ""), lines) for title, lines in groups.items()]


def _merged(lines: dict[str, Series]) -> dict[str, Series]:
    """Groups of parameters often have the same rate: one line with all their names."""
    merged: list[tuple[list[str], Series]] = []
    for name, series in lines.items():
        for names, other in merged:
            if _equal(series, other):
                names.append(name)
                break
        else:
            merged.append(([name], series))
    return {", ".join(names): series for names, series in merged}


def _equal(one: Series, other: Series) -> bool:
    same_steps = np.array_equal(one.steps, other.steps)
    return same_steps and np.array_equal(one.values, other.values, equal_nan=True)
