from pathlib import Path

from tests.conftest import SEED
from tests.reliability import bad_samples


def test_bad_samples_are_named_and_the_good_ones_are_the_same(tmp_path: Path) -> None:
    figure = bad_samples.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried == 6, figure
