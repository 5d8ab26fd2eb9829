"""Trains the tests' model on N ranks and writes what each rank saw as JSON; started by `spawn.train`.

python tests/layouts/train_worker.py '{"devices": 2, "tensor": 2, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import torch
from training import Record, TinyData, module_arguments, trainer_arguments

from datamodules.packed import PackedDataModule
from step37_lit import MegatronStrategy, Step37LitModule


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    record = Record()
    trainer = pl.Trainer(
        strategy=MegatronStrategy(**job["strategy"]),
        callbacks=[record],
        **trainer_arguments(Path(job["folder"]), devices=job["devices"], **job["trainer"]),
    )
    data = PackedDataModule(**job["data"]) if "sets" in job["data"] else TinyData(**job["data"])
    trainer.fit(Step37LitModule(**module_arguments(**job["module"])), datamodule=data)
    seen = {
        "rows": record.rows,
        "global_step": trainer.global_step,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "world_size": trainer.world_size,
    }
    Path(job["folder"], f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        raise SystemExit("start through tests/layouts/spawn.py")
    main()
