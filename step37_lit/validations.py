"""When Lightning validates."""

from __future__ import annotations

import math

import lightning.pytorch as pl


def validation_follows(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates behind step `batch_idx` of the epoch."""
    epochs = trainer.check_val_every_n_epoch
    if not trainer.enable_validation or (epochs is not None and (trainer.current_epoch + 1) % epochs):
        return False
    if trainer.val_check_batch is None:  # an interval of time
        return False
    if math.isinf(trainer.val_check_batch):  # a loader without a length: behind its last batch
        return trainer.is_last_batch
    batches = trainer.fit_loop.total_batch_idx if epochs is None else batch_idx
    return (batches + 1) % trainer.val_check_batch == 0
