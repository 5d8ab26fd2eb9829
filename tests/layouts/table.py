"""Measures every layout on up to four ranks and writes the table of docs/layouts.md; `make layouts` runs it.

    python tests/layouts/table.py [--steps 20] [--ranks 1 2 4] [--file docs/layouts.md]
    python tests/layouts/table.py --found FILE --most 10      # in pieces: what FILE has is not measured again

Exit code 1 where a layout differs from one rank by more than the tests allow, or a fault made on purpose by less; 3
where pieces are left.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import layout_parity
from broken_layouts import BROKEN
from layout_parity import Difference, Layout

START, END = "<!-- table -->\n", "<!-- end of table -->\n"
AT_A_TIME = 6  # layouts that one start of the ranks measures


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=layout_parity.STEPS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--file", type=Path, default=Path(__file__).parents[2] / "docs" / "layouts.md")
    parser.add_argument("--found", type=Path, help="JSON lines: figures of the layouts that are measured already")
    parser.add_argument("--most", type=int, help="layouts to measure before an end without a table")
    arguments = parser.parse_args()
    layouts = [layout for layout in layout_parity.all_layouts() if layout.ranks in arguments.ranks]
    layouts += [replace(broken.layout, broken=name) for name, broken in BROKEN.items() if 2 in arguments.ranks]
    known = _known(arguments.found)
    left = [layout for layout in layouts if _key(layout) not in known]
    for layout, difference in _measure(left[: arguments.most], arguments.steps):
        known[_key(layout)] = difference
        if arguments.found is not None:
            with arguments.found.open("a") as file:
                file.write(json.dumps({"layout": _key(layout), "figures": asdict(difference)}) + "\n")
    if any(_key(layout) not in known for layout in layouts):
        return 3
    found = [(layout, known[_key(layout)]) for layout in layouts]
    before, rest = arguments.file.read_text().split(START)
    after = rest.split(END)[1]
    arguments.file.write_text(before + START + _table(found, arguments.steps) + END + after)
    return 0 if all(difference.within() == (layout.broken is None) for layout, difference in found) else 1


def _key(layout: Layout) -> str:
    return f"{layout.ranks} {layout.broken or layout.name}"


def _known(file: Path | None) -> dict[str, Difference]:
    if file is None or not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["layout"]: Difference(**row["figures"]) for row in rows}


def _measure(layouts: list[Layout], steps: int) -> Iterator[tuple[Layout, Difference]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout_parity.reference(folder, steps, models=sorted({layout.dense for layout in layouts}))
        for ranks in sorted({layout.ranks for layout in layouts}):
            own = [layout for layout in layouts if layout.ranks == ranks]
            for first in range(0, len(own), AT_A_TIME):
                part = own[first : first + AT_A_TIME]
                for layout, difference in zip(part, layout_parity.measure(folder, part, steps), strict=True):
                    print(f"{layout.broken or layout.name}: {_figures(difference)}", flush=True)
                    yield layout, difference


def _table(found: list[tuple[Layout, Difference]], steps: int) -> str:
    head = "| layout | ranks | loss | gradient norm | weights | router bias |\n|---|---|---|---|---|---|\n"
    whole = [(layout, difference) for layout, difference in found if layout.broken is None]
    broken = [(layout, difference) for layout, difference in found if layout.broken is not None]
    lines = [f"| {layout.name} | {layout.ranks} | {_figures(difference)} |\n" for layout, difference in whole]
    faults = [f"| {layout.broken} ({layout.name}) | {layout.ranks} | {_figures(d)} |\n" for layout, d in broken]
    largest = [max(getattr(d, kind) for _, d in whole) for kind in ("loss", "norm", "weights", "bias")]
    text = f"\n{len(whole)} layouts, {steps} steps each; `dense` without experts.\n\n{head}{''.join(lines)}"
    text += f"| **largest** | | {' | '.join(f'{value:.1e}' for value in largest)} |\n"
    return (
        text + f"\nWrong on purpose, {min(steps, layout_parity.FAULT_STEPS)} steps each:\n\n{head}{''.join(faults)}\n"
        if faults
        else text + "\n"
    )


def _figures(found: Difference) -> str:
    return f"{found.loss:.1e} | {found.norm:.1e} | {found.weights:.1e} | {found.bias:.1e}"


if __name__ == "__main__":
    sys.exit(main())
