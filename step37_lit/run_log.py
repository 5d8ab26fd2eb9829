"""metrics.csv of a run: one file, which a resumed run continues."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class _ContinuingWriter(ExperimentWriter):
    """Keeps the rows of the run that is resumed, up to the step where it goes on."""

    def _check_log_dir_exists(self) -> None:
        self._earlier: list[dict[str, Any]] = []  # Lightning deletes the file here
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self._earlier = list(csv.DictReader(file))

    def save(self) -> None:
        if self._earlier and self.metrics:
            # Steps behind the checkpoint are trained again.
            first = min(int(row["step"]) for row in self.metrics)
            kept = [row for row in self._earlier if int(row["step"]) < first]
            self.metrics = [{k: v for k, v in row.items() if v != ""} for row in kept] + self.metrics
            Path(self.metrics_file_path).unlink()
            self._earlier = []
        super().save()


class ContinuingCSVLogger(CSVLogger):
    """Lightning's CSV logger for a resumed run: appends to `metrics.csv` in place of deleting it.

    Args:
        folder: The run's folder; the file lies directly in it.
    """

    def __init__(self, folder: str | Path):
        super().__init__(folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuingWriter(log_dir=self.log_dir)
        return self._experiment
