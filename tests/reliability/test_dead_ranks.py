from pathlib import Path

from tests.conftest import SEED
from tests.reliability import dead_ranks


def test_a_dead_and_a_stopped_rank_are_named(tmp_path: Path) -> None:
    figure = dead_ranks.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 2, figure
