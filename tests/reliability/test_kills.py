from pathlib import Path

from tests.conftest import SEED
from tests.reliability import kills


def test_a_killed_run_ends_as_the_straight_one(tmp_path: Path) -> None:
    figure = kills.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 3, figure
