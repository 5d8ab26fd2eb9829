"""What a run says of itself: metrics.csv, one file which a resumed run continues, and its figures in a line."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from step37_lit.text_file import written_whole

VALIDATED = ("loss", "attribute_accuracy", "attribute_accuracy_seen", "generated_attribute_accuracy", "cider_d")


def figures(metrics: Mapping[str, Any], training: bool) -> str:
    """The figures that tell how far a run is: "val/loss 0.0562, val/cider_d 5.0440"; with `train/loss` if asked."""
    names = [*(["train/loss"] if training else []), *(f"val/{name}" for name in VALIDATED)]
    return ", ".join(f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics)


class _Writer(ExperimentWriter):
    """Replaces `metrics.csv` by a file that is written beside it first, so that a kill or a full disk loses no row.

    Args:
        folder: Of the file.
        continues: Whether rows that are there are kept, up to the step where the run goes on; else they are deleted.
    """

    def __init__(self, folder: str, continues: bool):
        self._continues = continues
        self._earlier: list[dict[str, str]] = []
        super().__init__(log_dir=folder)

    def _check_log_dir_exists(self) -> None:
        if not self._continues:
            super()._check_log_dir_exists()
        elif Path(self.metrics_file_path).is_file():
            self._earlier = _whole_rows(Path(self.metrics_file_path))

    def save(self) -> None:
        if self._earlier and self.metrics:
            # Steps behind the checkpoint are trained again. A validation comes first where the run made up for it: it
            # is of the checkpoint's own step, whose row stays.
            first = min(int(row["step"]) for row in self.metrics)
            made_up = any(name.startswith("val/") for name in self.metrics[0])
            self.metrics_keys = list(self._earlier[0])
            self._replace([row for row in self._earlier if int(row["step"]) < first + made_up])
            self._earlier = []
        super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._replace(_whole_rows(Path(self.metrics_file_path)))

    def _replace(self, rows: list[dict[str, str]]) -> None:
        with written_whole(Path(self.metrics_file_path)) as staged, staged.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Rows by column; the last line is left out where a full disk has cut it."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [row for row in csv.DictReader(whole.splitlines()) if None not in row.values()]


class RunCSVLogger(CSVLogger):
    """Lightning's CSV logger with one `metrics.csv` in the run's folder.

    Args:
        folder: The run's folder.
        continues: Whether the run is resumed and its rows go on; else a file that is there is deleted.
    """

    def __init__(self, folder: str | Path, continues: bool):
        super().__init__(folder, name="", version="")
        self._continues = continues

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _Writer(self.log_dir, self._continues)
        return self._experiment
