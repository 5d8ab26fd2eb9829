"""The inspector's page as HTML, by the rules of `step37_lit.pages`."""

from __future__ import annotations

import numpy as np

from datamodules.inspector.collect import Inspection
from datamodules.inspector.packs import KINDS
from datamodules.inspector.plots import histogram, size_plot
from datamodules.inspector.style import CSS
from datamodules.inspector.template import TEMPLATE
from step37_lit.pages.render import render
from step37_lit.pages.style import BASE_CSS

MAX_BAD_ROWS = 500

LABELS = {"image": "picture", "text": "text without loss", "loss": "text with loss", "padding": "padding"}
HEADINGS = {"image": "Picture", "text": "No loss", "loss": "Loss"}


def page(inspection: Inspection) -> str:
    """The whole page."""
    positions = sum(pack.length for pack in inspection.packs)
    table = _length_table(inspection)
    pictures = len(inspection.image_sizes)
    several = ["set"] if len(inspection.names) > 1 else []
    return render(
        TEMPLATE,
        BASE_CSS + CSS,
        it=inspection,
        num_pictures=pictures,
        kinds=KINDS,
        labels=LABELS,
        headings=HEADINGS,
        shares={kind: sum(pack.count(kind) for pack in inspection.packs) / positions for kind in KINDS},
        lengths=histogram(inspection.lengths, inspection.epoch.max_length),
        length_table=table,
        length_facts=", ".join(f"{name.lower()} {value:,}" for name, value in table),
        sizes=size_plot(inspection.image_sizes) if pictures else None,
        size_facts=_size_facts(inspection) if pictures else "",
        bad=inspection.bad[:MAX_BAD_ROWS],
        bad_columns=[*several, "shard", "key", "member", "reason"],
    )


def _length_table(inspection: Inspection) -> list[tuple[str, int]]:
    at = {"Shortest": 0.0, "Median": 0.5, "95 % up to": 0.95, "Longest": 1.0}
    found = np.quantile(inspection.lengths, list(at.values()), method="nearest").tolist()
    return [*zip(at, found, strict=True), ("A pack", inspection.epoch.max_length)]


def _size_facts(inspection: Inspection) -> str:
    (width, height), (most_width, most_height) = inspection.image_sizes.min(axis=0), inspection.image_sizes.max(axis=0)
    return f"widths {width} to {most_width} pixels, heights {height} to {most_height} pixels"
