"""Saves checkpoints without an end, to be killed; for `tests.forks.Child`."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from step37_lit import MegatronStrategy, RunCheckpoints, Step37LitModule
from tests.training import TinyData, module_arguments, trainer_arguments


def save_without_end(folder: str) -> None:
    arguments = trainer_arguments(Path(folder), max_steps=100_000, max_epochs=10**6, limit_val_batches=0)
    arguments["enable_checkpointing"] = True
    trainer = pl.Trainer(
        strategy=MegatronStrategy(), callbacks=[RunCheckpoints(every_steps=1, keep_last=3)], **arguments
    )
    trainer.fit(Step37LitModule(**module_arguments(decay_steps=100_000)), datamodule=TinyData(steps=40))
