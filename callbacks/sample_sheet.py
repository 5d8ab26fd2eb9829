"""A sheet of validation pictures with their true caption and the model's most likely one."""

from __future__ import annotations

import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from step37_lit.batch import PackedBatch
from step37_lit.errors import require

TILE = 224  # pixels of a picture on the sheet
TEXT_HEIGHT = 150
CHARACTERS = 38  # that fit a line under a picture
BLACK, GREEN, RED, WHITE = (0, 0, 0), (0, 110, 0), (170, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Caption:
    """A picture with its caption and, word for word, what the model would have said after the true words before.

    Args:
        pixels: [3, H, W] uint8.
        true: The caption.
        predicted: The most likely caption, teacher-forced.
    """

    pixels: Tensor
    true: str
    predicted: str


class SampleSheet(pl.Callback):
    """Writes `pictures/step_N.png` below the run's folder after each validation.

    The caption of the model is teacher-forced: each word is the most likely one after the true words before it. Needs a
    data module with a `processor` (for its tokenizer) and packs with pixels.

    Args:
        count: Pictures on a sheet.
        columns: Pictures in a row.
        loader: Which of the validation loaders is shown.
    """

    def __init__(self, count: int = 12, columns: int = 4, loader: int = 0):
        require(count > 0 and columns > 0, "sample_sheet.count, columns", "positive numbers", (count, columns))
        self.count, self.columns, self.loader = count, columns, loader
        self._packs: list[PackedBatch] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._packs = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: list[PackedBatch],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        held = sum(len(pack.sample_keys) for pack in self._packs)
        if dataloader_idx == self.loader and held < self.count:
            self._packs += batch

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not self._packs:
            return
        # Every rank takes part in the forward pass; the first one that has the predictions writes.
        evaluated = pl_module.strategy.evaluate_step(self._packs)
        strategy = pl_module.strategy
        if evaluated and strategy.data_parallel_rank == 0 and strategy.rank_of_stage == 0:
            tokenizer = trainer.datamodule.processor.tokenizer
            captions = [c for pack, _, predicted in evaluated for c in captions_of(pack, predicted, tokenizer)]
            folder = Path(trainer.default_root_dir) / "pictures"
            folder.mkdir(parents=True, exist_ok=True)
            draw_sheet(captions[: self.count], self.columns).save(folder / f"step_{trainer.global_step:06d}.png")
        self._packs = []


def captions_of(pack: PackedBatch, predictions: Tensor, tokenizer: object) -> list[Caption]:
    """Caption and most likely caption of each sample; expects one picture a sample.

    Args:
        pack: With pixels.
        predictions: [1, T] most likely next tokens.
        tokenizer: Anything with `decode(ids)`.
    """
    pictures = torch.cat([image.images for image in pack.images if image.images is not None])
    require(len(pictures) == len(pack.sample_keys), "pictures of a pack", len(pack.sample_keys), len(pictures))
    captions = []
    borders = pack.cu_seqlens.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(borders)):
        if i == len(pack.sample_keys):
            break  # the padded tail
        learnt = pack.loss_mask[0, start:end] > 0
        true, predicted = pack.labels[0, start:end][learnt], predictions[0, start:end][learnt]
        captions.append(Caption(pictures[i].cpu(), _text(tokenizer, true), _text(tokenizer, predicted)))
    return captions


def _text(tokenizer: object, ids: Tensor) -> str:
    return tokenizer.decode(ids.tolist()).strip()


def draw_sheet(captions: list[Caption], columns: int) -> Image.Image:
    """Pictures in rows; the true caption in black, the model's in green where it is the same and else in red."""
    rows = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + TEXT_HEIGHT)), WHITE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, caption in enumerate(captions):
        x, y = i % columns * TILE, i // columns * (TILE + TEXT_HEIGHT)
        picture = Image.fromarray(caption.pixels.permute(1, 2, 0).contiguous().numpy())
        sheet.paste(picture.resize((TILE - 4, TILE - 4), Image.Resampling.NEAREST), (x + 2, y + 2))
        colour = GREEN if caption.true == caption.predicted else RED
        y += TILE + 2
        for text, ink in ((caption.true, BLACK), (caption.predicted, colour)):
            lines = textwrap.fill(text, CHARACTERS)
            draw.multiline_text((x + 4, y), lines, fill=ink, font=font, spacing=1)
            y += 13 * (lines.count("\n") + 1) + 4
    return sheet
