from pathlib import Path

from tests.conftest import SEED
from tests.reliability import bad_input


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path: Path) -> None:
    figure = bad_input.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried > 30, figure
