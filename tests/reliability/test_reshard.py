from pathlib import Path

from tests.conftest import SEED
from tests.reliability import reshard


def test_some_pairs_of_layouts(tmp_path: Path) -> None:
    figure = reshard.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried == 3, figure
