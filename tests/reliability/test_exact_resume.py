from pathlib import Path

from tests.conftest import SEED
from tests.reliability import exact_resume


def test_a_run_that_stops_goes_on_as_the_straight_one(tmp_path: Path) -> None:
    figure = exact_resume.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried == 4, figure
