"""Trains the tests' model with experts on N ranks with `ExpertLoad`; started by `tests/test_expert_load.py`.

python tests/layouts/expert_load_worker.py '{"folder": "...", "devices": 2, "strategy": {}}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import torch
from training import TinyData, module_arguments, trainer_arguments

from callbacks.expert_load import ExpertLoad
from step37_lit import MegatronStrategy, Step37LitModule


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    arguments = trainer_arguments(Path(job["folder"]), devices=job["devices"], max_steps=4, limit_val_batches=0)
    trainer = pl.Trainer(strategy=MegatronStrategy(**job["strategy"]), callbacks=[ExpertLoad(2)], **arguments)
    trainer.fit(Step37LitModule(**module_arguments(preset="tiny_moe")), datamodule=TinyData())


if __name__ == "__main__":
    main()
