"""Trains the tests' model by a freezing schedule on N ranks and writes what each rank saw as JSON.

python tests/layouts/freeze_worker.py '{"folder": ..., "devices": 2, "strategy": {"tensor": 2}, "stages": [...]}'
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
from lightning.pytorch.callbacks import ModelCheckpoint
from training import Record, TinyData, module_arguments, trainer_arguments

from callbacks.freeze_schedule import FreezeSchedule
from step37_lit import MegatronStrategy, Step37LitModule
from step37_lit.megatron.initialize import global_name


class Digests(pl.Callback):
    """Of this rank's share of each parameter (by its name in the whole model) before each step, and at the end."""

    def __init__(self) -> None:
        self.steps: list[dict[str, str]] = []

    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({global_name(lit.model, name): digest(p) for name, p in lit.model.named_parameters()})

    def on_train_end(self, trainer: Any, lit: Any) -> None:
        self.on_train_batch_start(trainer, lit, None, 0)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    schedule, digests, record = FreezeSchedule(job["stages"]), Digests(), Record()
    callbacks: list[pl.Callback] = [schedule, digests, record]
    if job["save"]:
        callbacks.append(
            ModelCheckpoint(
                folder, "at{step}", every_n_train_steps=job["save"], save_top_k=-1, auto_insert_metric_name=False
            )
        )
    trainer = pl.Trainer(
        strategy=MegatronStrategy(**job["strategy"]),
        callbacks=callbacks,
        **trainer_arguments(folder, devices=job["devices"], enable_checkpointing=bool(job["save"]), **job["trainer"]),
    )
    lit = Step37LitModule(**module_arguments(decay_steps=40))
    trainer.fit(lit, datamodule=TinyData(steps=40), ckpt_path=job["ckpt_path"])
    moments = [float(state["step"]) for inner in trainer.optimizers[0].inner for state in inner.state.values()]
    seen = {
        "rows": record.rows,
        "digests": digests.steps,
        "schedule": schedule.state_dict(),
        "moments": sorted(moments),
    }
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        raise SystemExit("start through tests/layouts/test_freezing.py")
    main()
