from pathlib import Path

from tests.conftest import SEED
from tests.reliability import disk_full, mounts


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    figure = disk_full.measure(full=False, seed=SEED, folder=tmp_path)
    print(figure)
    assert figure.good == figure.tried == (3 if mounts.refusal() is None else 1), figure
