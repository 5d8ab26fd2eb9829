from pathlib import Path

from tests.conftest import SEED
from tests.reliability import elastic_data


def test_another_number_of_ranks_goes_on_in_the_same_order(tmp_path: Path) -> None:
    figure = elastic_data.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 1, figure
