"""Trains to a step in one layout, or goes on from a checkpoint of another: what `test_resumed_layouts.py` starts.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 ... python tests/layouts/resume_worker.py '[{"folder": ..., "strategy": {}, ...}]'

Each case leaves its rows (loss, gradient norm, learning rate) in FOLDER/rows.json and its state in FOLDER/end. All
cases of N ranks run in the same processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
from cases import run_cases
from training import Record, TinyData, module_arguments, trainer_arguments

from step37_lit import MegatronStrategy, Step37LitModule


class SaveAtEnd(pl.Callback):
    """Before the run ends, since Lightning's loops count an ended epoch as done."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.save_checkpoint(self.folder / "end")


def run(case: dict[str, Any], devices: int) -> None:
    folder, record = Path(case["folder"]), Record()
    arguments = trainer_arguments(folder, devices=devices, max_steps=case["steps"], limit_val_batches=0)
    trainer = pl.Trainer(
        strategy=MegatronStrategy(**case["strategy"]), callbacks=[record, SaveAtEnd(folder)], **arguments
    )
    # A low rate: at a higher one routing flips where two scores are equal to rounding, in one rank's run too.
    module = Step37LitModule(**module_arguments(preset="tiny_moe", lr=2e-4, decay_steps=40))
    trainer.fit(module, datamodule=TinyData(steps=40), ckpt_path=case["source"])
    if trainer.global_rank == 0:
        (folder / "rows.json").write_text(json.dumps(record.rows))


if __name__ == "__main__":
    run_cases(run)
