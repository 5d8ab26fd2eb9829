from pathlib import Path

from tests.conftest import SEED
from tests.reliability import uneven_shards


def test_ranks_have_as_many_steps_whatever_the_shards(tmp_path: Path) -> None:
    figure = uneven_shards.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 4, figure
