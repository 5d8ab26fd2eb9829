"""Trains a small MoE with MTP layers and pictures on N ranks; writes what each rank saw, and its parameters.

python tests/layouts/context_worker.py '{"folder": ..., "devices": 2, "strategy": {"context": 2}, "steps": 20, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import lightning.pytorch as pl
import torch
from context_packs import PicturePacks, module_arguments
from megatron.core import parallel_state
from torch import Tensor, nn
from training import Record, trainer_arguments

from step37_lit import MegatronStrategy, Step37LitModule
from step37_lit.megatron.initialize import global_name
from step37_lit.model.experts import GroupedExperts
from step37_lit.model.step37_model import Step37Model


class CountImages(pl.Callback):
    """Images that this rank's vision tower encoded in each step, and how often anything flowed back through it."""

    def __init__(self) -> None:
        self.encoded: list[int] = []
        self.backwards: list[int] = []

    def on_train_start(self, trainer: Any, lit: Any) -> None:
        if lit.model.vision_model is not None:
            lit.model.vision_model.register_forward_hook(self._count)

    def on_train_batch_start(self, trainer: Any, lit: Any, batch: Any, batch_idx: int) -> None:
        self.encoded.append(0)
        self.backwards.append(0)

    def _count(self, tower: nn.Module, inputs: tuple[Tensor, ...], features: Tensor) -> None:
        if torch.is_grad_enabled():
            self.encoded[-1] += len(inputs[0])
            if features.requires_grad:
                features.register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards[-1] += 1


def share_of(model: Step37Model, name: str, parameter: Tensor) -> dict[str, Any]:
    """This rank's part of a parameter, and which part of the whole one it is."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, GroupedExperts):
        return {"value": parameter.detach(), "rows": list(module.expert_indices)}
    split = getattr(parameter, "tensor_model_parallel", False)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return {
        "value": parameter.detach(),
        "split": [parameter.partition_dim, parameter.partition_stride, ranks] if split else None,
        "rank": parallel_state.get_tensor_model_parallel_rank(),
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    record, count = Record(), CountImages()
    arguments = {"max_steps": job["steps"], "limit_val_batches": 1}
    trainer = pl.Trainer(
        strategy=MegatronStrategy(**job["strategy"]),
        callbacks=[record, count],
        **trainer_arguments(folder, devices=job["devices"], **arguments),
    )
    lit = Step37LitModule(**module_arguments(**job["module"]))
    trainer.fit(lit, datamodule=PicturePacks(job["steps"]))
    model = lit.model
    torch.save(
        {global_name(model, name): share_of(model, name, p) for name, p in model.named_parameters()},
        folder / f"rank{trainer.global_rank}.pt",
    )
    seen = {
        "rows": record.rows,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "encoded": count.encoded,
        "backwards": count.backwards,
    }
    Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    if "OMP_NUM_THREADS" not in os.environ:
        raise SystemExit("start through tests/layouts/spawn.py")
    main()
