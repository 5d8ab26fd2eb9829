from pathlib import Path

from tests.conftest import SEED
from tests.reliability import signals


def test_a_signal_to_one_rank_ends_all_alike(tmp_path: Path) -> None:
    figure = signals.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 2, figure
