"""Saves checkpoints without an end, to be killed, or under a limit that makes a save fail.

python tests/checkpoints/save_worker.py FOLDER [MAX_STEPS]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import torch
from training import TinyData, module_arguments, trainer_arguments

from step37_lit import MegatronStrategy, RunCheckpoints, Step37LitModule
from step37_lit.errors import ConfigError


class Steps(pl.Callback):
    """Says on stdout which step is done, so that a test can wait for one."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        print(f"step {trainer.global_step}", flush=True)


def main() -> int:
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100_000
    arguments = trainer_arguments(folder, max_steps=steps, max_epochs=10**6, limit_val_batches=0)
    callbacks = [Steps(), RunCheckpoints(every_steps=1, keep_last=3)]
    arguments["enable_checkpointing"] = True
    trainer = pl.Trainer(strategy=MegatronStrategy(), callbacks=callbacks, **arguments)
    module = Step37LitModule(**module_arguments(decay_steps=100_000))
    try:
        trainer.fit(module, datamodule=TinyData(steps=40))
    except ConfigError as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
