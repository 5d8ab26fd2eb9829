from pathlib import Path

from tests.conftest import SEED
from tests.reliability import atomic_save


def test_a_kill_in_a_save_leaves_what_was_complete(tmp_path: Path) -> None:
    figure = atomic_save.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == 2, figure
