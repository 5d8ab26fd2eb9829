"""Trains, saves, loads and digests checkpoints on N ranks: what the tests of resharding start.

python tests/layouts/reshard_worker.py '{"folder": ..., "devices": 2, "strategy": {...}, "module": {...}, "sources": [...]}'

Without sources: trains `steps` steps and saves to FOLDER/made. With sources: loads each of them into this layout, saves
it again below FOLDER. Weights and optimizer state are then compared file against file, by `digests`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import torch
from training import TinyData, module_arguments, trainer_arguments

from step37_lit import MegatronStrategy, Step37LitModule
from step37_lit.checkpoint.tensors import TensorFolder


def digests(checkpoint: Path) -> dict[str, str]:
    """Of each whole tensor of a checkpoint's weights and optimizer state."""
    found = {}
    for part in ("model", "optimizer"):
        tensors = TensorFolder(checkpoint / part)
        for name in sorted(tensors.names()):
            raw = tensors.tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
            found[f"{part}/{name}"] = hashlib.sha256(raw).hexdigest()
    return found


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
            trainer.save_checkpoint(self.folder / Path(source).parent.name)
        strategy.saver.wait()
        trainer.should_stop = True


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    sources = job["sources"]
    callbacks = [LoadAndSave(sources, folder)] if sources else []
    arguments = trainer_arguments(folder, devices=job["devices"], max_steps=job["steps"], limit_val_batches=0)
    trainer = pl.Trainer(strategy=MegatronStrategy(**job["strategy"]), callbacks=callbacks, **arguments)
    trainer.fit(Step37LitModule(**module_arguments(decay_steps=40, **job["module"])), datamodule=TinyData(steps=40))
    if not sources:
        trainer.save_checkpoint(folder / "made")


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        raise SystemExit("start through tests/layouts/test_resharding.py")
    main()
