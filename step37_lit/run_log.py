"""What a run says of itself: metrics.csv, one file which a resumed run continues, and its figures in a line."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

VALIDATED = ("loss", "attribute_accuracy", "attribute_accuracy_seen", "generated_attribute_accuracy", "cider_d")


def figures(metrics: Mapping[str, Any], training: bool) -> str:
    """The figures that tell how far a run is: "val/loss 0.0562, val/cider_d 5.0440"; with `train/loss` if asked."""
    names = [*(["train/loss"] if training else []), *(f"val/{name}" for name in VALIDATED)]
    return ", ".join(f"{name} {float(metrics[name]):.4f}" for name in names if name in metrics)


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
            # Steps behind the checkpoint are trained again. A validation comes first where the run made up for it: it
            # is of the checkpoint's own step, whose row stays.
            first = min(int(row["step"]) for row in self.metrics)
            made_up = any(name.startswith("val/") for name in self.metrics[0])
            kept = [row for row in self._earlier if int(row["step"]) < first + made_up]
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
