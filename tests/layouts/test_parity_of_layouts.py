"""Layouts equal one rank: pictures, experts and MTP layers; faults made on purpose are noticed.

The short list here; `make layouts` measures all that fit on four ranks.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import layout_parity
from broken_layouts import BROKEN
from layout_parity import SHORT, Difference, Layout

STEPS = 5
BREAKING = [replace(broken.layout, broken=name) for name, broken in BROKEN.items()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Difference]:
    """One start of two ranks trains in all layouts, one after the other."""
    folder = tmp_path_factory.mktemp("parity")
    layout_parity.reference(folder, STEPS)
    layouts = [*SHORT, *BREAKING]
    found = layout_parity.measure(folder, layouts, STEPS)
    return {layout.broken or layout.name: difference for layout, difference in zip(layouts, found, strict=True)}


@pytest.mark.parametrize("layout", SHORT, ids=lambda layout: layout.name)
def test_equals_one_rank(layout: Layout, measured: dict[str, Difference]) -> None:
    print(layout.name, measured[layout.name])
    assert measured[layout.name].within()


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_noticed(name: str, measured: dict[str, Difference]) -> None:
    print(name, measured[name])
    assert not measured[name].within()
