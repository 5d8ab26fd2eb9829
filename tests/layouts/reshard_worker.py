"""Trains, saves and loads checkpoints in several layouts of N ranks: what the tests of resharding start.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 ... python tests/layouts/reshard_worker.py '[{"folder": ..., "strategy": {}, ...}]'

A case without sources trains `steps` steps and saves to FOLDER/made. One with sources loads each of them into its
layout and saves it again below FOLDER, so that weights and optimizer state can be compared. All cases of N
ranks run in the same processes, since starting them takes longer than a case.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import torch
from cases import run_cases
from training import TinyData, module_arguments, trainer_arguments

from step37_lit import MegatronStrategy, Step37LitModule


class LoadAndSave(pl.Callback):
    """Loads each source into the running model and optimizer, and saves it again."""

    def __init__(self, sources: list[str], folder: Path):
        self.sources, self.folder = sources, folder

    def on_train_start(self, trainer: Any, lit: Any) -> None:
        strategy = trainer.strategy
        for source in self.sources:
            with torch.no_grad():  # nothing of the source before may be left
                for parameter in lit.model.parameters():
                    parameter.fill_(float("nan"))
            state = strategy.load_checkpoint(source)
            strategy.load_model_state_dict(state)
            strategy.load_optimizer_state_dict(state)
            trainer.save_checkpoint(self.folder / f"from {Path(source).parent.name}")
        strategy.saver.wait()
        trainer.should_stop = True


def run(case: dict[str, Any], devices: int) -> None:
    folder, sources = Path(case["folder"]), case["sources"]
    callbacks = [LoadAndSave(sources, folder)] if sources else []
    arguments = trainer_arguments(folder, devices=devices, max_steps=case["steps"], limit_val_batches=0)
    trainer = pl.Trainer(strategy=MegatronStrategy(**case["strategy"]), callbacks=callbacks, **arguments)
    trainer.fit(Step37LitModule(**module_arguments(decay_steps=40, **case["module"])), datamodule=TinyData(steps=40))
    if not sources:
        trainer.save_checkpoint(folder / "made")


if __name__ == "__main__":
    run_cases(run)
