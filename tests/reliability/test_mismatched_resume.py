from pathlib import Path

from tests.conftest import SEED
from tests.reliability import mismatched_resume


def test_what_changed_is_refused_or_listed(tmp_path: Path) -> None:
    figure = mismatched_resume.measure(full=False, seed=SEED, folder=tmp_path)
    assert figure.good == figure.tried == 5, figure
