from pathlib import Path

from tests.conftest import SEED
from tests.reliability import corruption


def test_damage_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    figure = corruption.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried > 200, figure
