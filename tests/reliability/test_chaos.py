from pathlib import Path

from tests.conftest import SEED
from tests.reliability import chaos


def test_a_run_outlives_faults_of_all_kinds(tmp_path: Path) -> None:
    figure = chaos.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried == 3, figure
