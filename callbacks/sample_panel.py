"""Validation pictures with their generated captions in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.caption_metrics import FOLDER, CaptionMetrics
from callbacks.sample_sheet import Caption, draw_sheet
from step37_lit.batch import PackedBatch, Sample
from step37_lit.config import ConfigError, require

COLUMNS = 4
TAG = "val/captions"
MARKUP = "&<>\"'|*_`[]~#!\\"


class SamplePanel(pl.Callback):
    """Shows the same pictures of the validation split after each validation: a sheet under Images, with a reference in
    black and the generated caption below it, green where it is one of the references; both and their CIDEr-D under
    Text.

    The captions are those that `callbacks.caption_metrics.CaptionMetrics` has generated for the scores, which the
    Trainer must have too. Without a TensorBoard logger it says so and does nothing.

    Args:
        count: Pictures, the first ones of the split (of the first data-parallel rank's share).
    """

    def __init__(self, count: int = 8):
        require(count > 0, "sample_panel.count", "a positive number", count)
        self.count = count
        self._captioning: CaptionMetrics | None = None
        self._boards: list[TensorBoardLogger] = []
        self._pictures: dict[str, Tensor] = {}  # by key, [3, H, W] uint8

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
        self._captioning = self._caption_metrics(trainer)
        self._boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not self._boards:
            rank_zero_warn("SamplePanel: the Trainer has no TensorBoardLogger, so no pictures are shown")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._pictures = {}

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        outputs: object,
        batch: list[PackedBatch],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert self._captioning is not None, "validation before setup"
        shows = trainer.is_global_zero and bool(self._boards) and not trainer.sanity_checking
        if not shows or dataloader_idx != self._captioning.loader or len(self._pictures) >= self.count:
            return
        for sample in (sample for pack in batch for sample in pack.samples()):
            key = sample.key.partition("#")[0]  # texts of one picture differ behind the #
            picture = whole_view(sample, pl_module.config.tokens.im_start)
            if picture is not None and bool(sample.loss_mask.any()) and len(self._pictures) < self.count:
                self._pictures.setdefault(key, picture.cpu())

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # Behind every callback's on_validation_epoch_end, whatever their order.
        pictures, self._pictures = self._pictures, {}
        if not pictures:
            return
        assert self._captioning is not None, "validation before setup"
        suffix = pl_module.eval_suffixes[self._captioning.loader]
        file = Path(trainer.default_root_dir) / FOLDER / f"step_{trainer.global_step:06d}{suffix}.jsonl"
        rows = {row["key"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
        shown = [rows[key] for key in pictures if key in rows]  # texts without a picture count in max_samples
        if not shown:
            return
        sheet = draw_sheet([Caption(pictures[r["key"]], reference(r), r["caption"]) for r in shown], COLUMNS)
        for board in self._boards:
            writer = board.experiment
            writer.add_image(f"{TAG}{suffix}", np.array(sheet), trainer.global_step, dataformats="HWC")
            writer.add_text(f"{TAG}{suffix}", markdown(shown), trainer.global_step)


def whole_view(sample: Sample, start_token: int) -> Tensor | None:
    """A sample's first picture as a whole, without its local patches: [3, H, W] uint8, or None without a picture."""
    return next(
        (i.images[0] for i in sample.images if i.insert_start_token == start_token and i.images is not None), None
    )


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
