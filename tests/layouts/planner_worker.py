"""Trains on N ranks and writes what each rank held: weights, gradients, optimizer state, and the peak of saved tensors.

python tests/layouts/planner_worker.py '{"devices": 2, "strategy": {"tensor": 2}, ...}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from saved_tensors import SavedTensors
from torch import Tensor
from training import TinyData, module_arguments, trainer_arguments

from step37_lit import MegatronStrategy, Step37LitModule


class Activations(pl.Callback):
    """Counts what autograd keeps from the first forward to the last backward pass of each step."""

    def __init__(self) -> None:
        self.peak = 0
        self.packs: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        model = trainer.strategy.lightning_module.model
        packs = [tensor for pack in batch for tensor in vars(pack).values() if isinstance(tensor, Tensor)]
        self.saved = SavedTensors([*model.parameters(), *model.buffers(), *packs])
        self.saved.__enter__()
        self.packs = [
            {
                "lengths": pack.cu_seqlens.diff().tolist(),
                "learnt": int(pack.loss_mask.sum()),
                "images": [(entry.images.shape[-1], entry.num_images) for entry in pack.images],
            }
            for pack in batch
        ]

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.saved.__exit__(None, None, None)
        self.peak = self.saved.peak


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    activations = Activations()
    trainer = pl.Trainer(
        strategy=MegatronStrategy(**job["strategy"]),
        callbacks=[activations],
        **trainer_arguments(Path(job["folder"]), devices=job["devices"], **job["trainer"]),
    )
    lit = Step37LitModule(**module_arguments(**job["module"]))
    trainer.fit(lit, datamodule=TinyData(**job["data"]))
    optimizer = trainer.strategy.optimizers[0]
    weights = [*lit.model.parameters(), *lit.model.buffers()]
    state = [value for inner in optimizer.inner for of_shard in inner.state.values() for value in of_shard.values()]
    main_params = [shard.main for shard in optimizer.shards() if shard.parameter.dtype != torch.float32]
    buffers = [buffer for ddp in trainer.strategy.ddps for buffer in ddp.buffers + ddp.expert_parallel_buffers]
    seen = {
        "names": [name for name, _ in lit.model.named_parameters()],
        "parameters": sum(p.numel() for p in lit.model.parameters()),
        "weights": storages(weights),
        "gradients": storages(buffer.grad_data for buffer in buffers),
        "optimizer": storages([*state, *main_params]),  # no main parameters where the weights are fp32 themselves
        "activations": activations.peak,
        "packs": activations.packs,
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "data_rank": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "expert_data_rank": parallel_state.get_expert_data_parallel_rank(),
    }
    Path(job["folder"], f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
