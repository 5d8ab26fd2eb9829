"""The inspector's page as HTML: one file, no script, nothing loaded from elsewhere.

Keys, captions and reasons are written by strangers. Whatever the template puts out is escaped and its invisible
characters are spelt; the page's policy lets a browser use this style and `data:` pictures and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from datamodules.inspector.packs import KINDS
from datamodules.inspector.plots import histogram, size_plot
from datamodules.inspector.style import CSS
from datamodules.inspector.template import TEMPLATE

if TYPE_CHECKING:
    from datamodules.inspector.inspect import Inspection

MAX_BAD_ROWS = 500
UNITS = ("bytes", "kB", "MB", "GB", "TB")
# Controls, format characters (overrides of the direction among them), surrogates, private, unassigned, separators.
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # scripts and emoji need them, and all they do is to shape their neighbours

LABELS = {"image": "picture", "text": "text without loss", "loss": "text with loss", "padding": "padding"}
HEADINGS = {"image": "Picture", "text": "No loss", "loss": "Loss"}


def page(inspection: Inspection) -> str:
    """The whole page."""
    css = f"\n{CSS}"
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    allowed = f"style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    positions = sum(pack.length for pack in inspection.packs)
    table = _length_table(inspection)
    pictures = len(inspection.image_sizes)
    several = ["set"] if len(inspection.names) > 1 else []
    return (
        _environment()
        .from_string(TEMPLATE)
        .render(
            it=inspection,
            num_pictures=pictures,
            css=Markup(css),
            policy=f"default-src 'none'; {allowed}",
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
    )


def visible(text: str) -> str:
    """The text with what cannot be seen, or turns the direction of what is around it, spelt as `⟨U+202E⟩`."""
    return "".join(f"⟨U+{ord(character):04X}⟩" if _is_invisible(character) else character for character in text)


def _is_invisible(character: str) -> bool:
    return character not in JOINERS and unicodedata.category(character) in INVISIBLE


def _environment() -> Environment:
    def spelt(value: Any) -> Any:
        return visible(value) if type(value) is str else value

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=spelt, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": lambda value: f"{value:,}",
        "percent": lambda share: f"{100 * share:.1f} %",
        "place": lambda share: f"{share:.3f}%",
        "from_top": lambda share: f"{100 - share:.3f}%",
        "size": _size,
    }
    return environment


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{num_bytes} {UNITS[0]}"


def _length_table(inspection: Inspection) -> list[tuple[str, int]]:
    at = {"Shortest": 0.0, "Median": 0.5, "95 % up to": 0.95, "Longest": 1.0}
    found = np.quantile(inspection.lengths, list(at.values()), method="nearest").tolist()
    return [*zip(at, found, strict=True), ("A pack", inspection.epoch.max_length)]


def _size_facts(inspection: Inspection) -> str:
    (width, height), (most_width, most_height) = inspection.image_sizes.min(axis=0), inspection.image_sizes.max(axis=0)
    return f"widths {width} to {most_width} pixels, heights {height} to {most_height} pixels"
