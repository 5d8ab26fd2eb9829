"""The progress bar of training: loss, speed, share of GEMM peak and padding, under short names; a line a validation."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from step37_lit.run_log import figures

# Logged name -> (name in the bar, format)
SHOWN: dict[str, tuple[str, str]] = {
    "train/loss": ("loss", "{:.3f}"),
    "train/tokens_per_second": ("tok/s", "{:,.0f}"),
    "train/images_per_second": ("img/s", "{:,.0f}"),
    "train/mfu": ("GEMM peak", "{:.0%}"),
    "train/padding": ("padding", "{:.0%}"),
    "train/data_wait": ("waiting", "{:.0%}"),
    "val/attribute_accuracy": ("attributes", "{:.1%}"),
    "val/cider_d": ("CIDEr-D", "{:.2f}"),
}


class TrainingProgressBar(RichProgressBar):
    """Lightning's rich bar with what a person watches; one step of the bar is one optimizer step. Each validation while
    training leaves a line above it.

    Args:
        refresh_rate: Steps between two updates of the bar.
        leave: Keep the bar on the screen when an epoch ends.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False):
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        logged = trainer.callback_metrics
        return {short: form.format(float(logged[name])) for name, (short, form) in SHOWN.items() if name in logged}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        # Validations after a run or without one have Lightning's table.
        if trainer.is_global_zero and trainer.state.fn == "fit" and not trainer.sanity_checking:
            reached = f"step {trainer.global_step}: {figures(trainer.callback_metrics, training=False)}"
            self._console.print(f"validation  {reached}", highlight=False, soft_wrap=True)
