"""Validation pictures with their generated captions in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from callbacks.caption_metrics import FOLDER, CaptionMetrics
from callbacks.sample_sheet import Caption, draw_sheet
from step37_lit.errors import ConfigError, require
from step37_lit.report.pictures import picture_path

COLUMNS = 4
TAG = "val/captions"
MARKUP = "&<>\"'|*_`[]~#!\\"


class SamplePanel(pl.Callback):
    """Shows the same pictures of the validation split after each validation: a sheet under Images, with a reference in
    black and the generated caption below it, green where it is one of the references; both and their CIDEr-D under
    Text.

    Captions and pictures are those that `callbacks.caption_metrics.CaptionMetrics` keeps in the run's folder; the
    Trainer must have it too. Without a TensorBoard logger it says so and does nothing.

    Args:
        count: Pictures, the first ones that are captioned; of a sample with several, the first.
    """

    def __init__(self, count: int = 8):
        require(count > 0, "sample_panel.count", "a positive number", count)
        self.count = count
        self._boards: list[TensorBoardLogger] = []

    def check(self, trainer: pl.Trainer, module: Any) -> None:
        """Raises `ConfigError` where nothing generates captions, or of fewer pictures."""
        most = self._caption_metrics(trainer).max_samples
        advice = f"at most {most} (max_samples of CaptionMetrics)"
        require(most is None or self.count <= most, "sample_panel.count", advice, self.count)

    def _caption_metrics(self, trainer: pl.Trainer) -> CaptionMetrics:
        for callback in trainer.callbacks:
            if isinstance(callback, CaptionMetrics):
                return callback
        found = [type(callback).__name__ for callback in trainer.callbacks]
        advice = "callbacks.caption_metrics.CaptionMetrics beside SamplePanel, which shows its captions"
        raise ConfigError("trainer.callbacks", advice, found)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.check(trainer, pl_module)
        self._boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not self._boards:
            rank_zero_warn("SamplePanel: the Trainer has no TensorBoardLogger, so no pictures are shown")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Behind every callback's on_validation_epoch_end, whatever their order.
        if trainer.sanity_checking or not trainer.is_global_zero or not self._boards:
            return
        run = Path(trainer.default_root_dir)
        suffix = pl_module.eval_suffixes[self._caption_metrics(trainer).loader]
        file = run / FOLDER / f"step_{trainer.global_step:06d}{suffix}.jsonl"
        if not file.is_file():  # an empty split
            return
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        shown = [row for row in rows if picture_path(run, row["key"]).is_file()][: self.count]
        if not shown:
            return
        sheet = draw_sheet(
            [Caption(_pixels(run, row["key"]), reference(row), row["caption"]) for row in shown], COLUMNS
        )
        for board in self._boards:
            writer = board.experiment
            writer.add_image(f"{TAG}{suffix}", np.array(sheet), trainer.global_step, dataformats="HWC")
            writer.add_text(f"{TAG}{suffix}", markdown(shown), trainer.global_step)


def _pixels(run: Path, key: str) -> Tensor:
    with Image.open(picture_path(run, key)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def reference(row: dict[str, Any]) -> str:
    """The reference that a caption is compared with: the one that it equals, else the first."""
    return row["caption"] if row["caption"] in row["references"] else row["references"][0]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of pictures, captions, references and scores; what they say is text and never markup."""
    lines = ["| picture | caption | reference | CIDEr-D |", "|---|---|---|---|"]
    for row in rows:
        texts = [_escaped(text) for text in (row["key"], row["caption"], reference(row))]
        lines.append(f"| {' | '.join(texts)} | {row['cider_d']:.2f} |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Characters that Markdown or HTML gives a meaning, as entities."""
    return "".join(f"&#{ord(c)};" if c in MARKUP else c for c in " ".join(text.split()))
