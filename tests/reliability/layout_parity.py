"""The same steps in every layout as on one rank, from the same weights and data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.layouts import layout_parity
from tests.layouts.layout_parity import LOSS_TOLERANCE, SHORT, Difference, Layout, all_layouts
from tests.reliability.figure import Figure

AT_A_TIME = 6  # layouts that one start of the ranks measures


def measure(full: bool, seed: int, folder: Path, layouts: Sequence[Layout] | None = None) -> Figure:
    """`layouts` in place of all (or, short, of some of two ranks)."""
    steps = 50 if full else 5
    layouts = layouts or (all_layouts() if full else SHORT)
    layout_parity.reference(folder, steps)
    found: list[tuple[Layout, Difference]] = []
    for ranks in sorted({layout.ranks for layout in layouts}):
        own = [layout for layout in layouts if layout.ranks == ranks]
        for first in range(0, len(own), AT_A_TIME):
            part = own[first : first + AT_A_TIME]
            found += zip(part, layout_parity.measure(folder, part, steps), strict=True)
            print(f"{len(found)} of {len(layouts)} layouts", flush=True)
    good = sum(difference.loss <= LOSS_TOLERANCE for _, difference in found)
    largest, at = max((difference.loss, layout.name) for layout, difference in found)
    largest_norm, largest_weights = (max(getattr(d, kind) for _, d in found) for kind in ("norm", "weights"))
    detail = f"{steps} steps, fp32, largest relative difference of the loss {largest:.1e} ({at}), "
    return Figure(good, len(found), detail + f"of the norm {largest_norm:.1e}; weights within {largest_weights:.1e}")
