from pathlib import Path

from tests.conftest import SEED
from tests.reliability import nothing_executes


def test_what_is_planted_does_not_run(tmp_path: Path) -> None:
    figure = nothing_executes.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried > 10, figure
