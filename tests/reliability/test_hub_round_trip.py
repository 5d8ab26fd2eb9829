from pathlib import Path

from tests.conftest import SEED
from tests.reliability import hub_round_trip


def test_a_killed_conversion_leaves_nothing_half(tmp_path: Path) -> None:
    figure = hub_round_trip.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 3, figure
