"""HTML pages of one file: no script, nothing loaded from elsewhere.

What a page shows is often written by strangers. Whatever a template puts out is escaped and its invisible characters
are spelt; the page's policy lets a browser use the page's own style and `data:` pictures and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from step37_lit.text_file import written_whole

UNITS = ("bytes", "kB", "MB", "GB", "TB")
# Controls, format characters (overrides of the direction among them), surrogates, private, unassigned, separators.
INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # scripts and emoji need them, and all they do is to shape their neighbours


def render(template: str, css: str, **values: Any) -> str:
    """A page.

    Args:
        template: In Jinja; it has `css` for its one `<style>`, `policy` for its Content-Security-Policy, and the
            filters `number` (1,234), `percent` (12.3 %), `place` and `from_top` (per cent of a side) and `size`.
        css: The style.
        **values: What the template shows.

    Raises:
        jinja2.UndefinedError: the template asks for something that is not among the values.
    """
    css = f"\n{css}"  # the browser counts the line break behind <style> as part of what it hashes
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    allowed = f"style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    policy = f"default-src 'none'; {allowed}"
    return _environment().from_string(template).render(css=Markup(css), policy=policy, **values)


def write_page(html: str, path: Path) -> None:
    """Writes a page; the file is whole or absent. Raises `OSError` where it cannot be written."""
    with written_whole(path) as staged:
        staged.write_text(html, encoding="utf-8")


def visible(text: str) -> str:
    """The text with what cannot be seen, or turns the direction of what is around it, spelt as `⟨U+202E⟩`."""
    return "".join(f"⟨U+{ord(character):04X}⟩" if _is_invisible(character) else character for character in text)


def readable_size(num_bytes: int) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more."""
    size, unit = float(num_bytes), 0
    while size >= 1000 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{num_bytes} {UNITS[0]}"


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
        "size": readable_size,
    }
    return environment
