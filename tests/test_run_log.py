"""`metrics.csv` of a run: rows go on behind a resume, and nothing that happens in a rewrite takes them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from step37_lit.run_log import RunCSVLogger


def rows(folder: Path) -> list[tuple[int, dict[str, float]]]:
    with (folder / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [(int(row.pop("step")), {name: float(value) for name, value in row.items() if value}) for row in found]


def log(folder: Path, steps: range, continues: bool, name: str = "loss") -> None:
    logger = RunCSVLogger(folder, continues)
    for step in steps:
        logger.log_metrics({name: step / 2}, step)
        logger.save()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    log(tmp_path, range(5), continues=False)
    log(tmp_path, range(3, 6), continues=True, name="other")
    assert rows(tmp_path) == [(i, {"loss": i / 2}) for i in range(3)] + [(i, {"other": i / 2}) for i in range(3, 6)]
    log(tmp_path, range(2), continues=False)
    assert rows(tmp_path) == [(0, {"loss": 0.0}), (1, {"loss": 0.5})]


@pytest.mark.parametrize("name", ["loss", "other"])
def test_a_rewrite_that_fails_leaves_every_row(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path, range(5), continues=False)

    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        log(tmp_path, range(3, 6), continues=True, name=name)
    assert [step for step, _ in rows(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_cut_line_is_left_out(tmp_path: Path) -> None:
    log(tmp_path, range(5), continues=False)
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text()[:-3])
    log(tmp_path, range(6, 7), continues=True)
    assert [step for step, _ in rows(tmp_path)] == [0, 1, 2, 3, 6]
