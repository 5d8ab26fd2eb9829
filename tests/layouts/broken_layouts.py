"""What is wrong on purpose: one fault for each kind of parallelism, each with a layout in which it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from layout_parity import Layout

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Broken:
    """A fault.

    Args:
        layout: Must notice it.
        patch: Makes it.
    """

    layout: Layout
    patch: Callable[[Patch], None]


BROKEN: dict[str, Broken] = {}
