"""NaN put into a weight, a loss and a gradient, on one rank, two data-parallel ranks and two stages; see the row."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import SEED
from tests.reliability.nan_and_spikes import measure


def test_nan_and_spikes(tmp_path: Path) -> None:
    figure = measure(False, SEED, tmp_path)
    assert figure.good == figure.tried == 3
