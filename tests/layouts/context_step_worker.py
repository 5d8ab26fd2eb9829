"""One step in many layouts, by the same processes one layout behind the other.

torchrun ... tests/layouts/context_step_worker.py '{"layouts": {"name": {"context": 2}}, "dense": false, "out": ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from context_packs import DENSE, PACKS, module_arguments, pack
from megatron.core import parallel_state
from torch import Tensor, nn

from step37_lit.config import Step37Config
from step37_lit.lit_module import with_overrides
from step37_lit.megatron import data_parallel, process, schedule
from step37_lit.megatron.build import build_model
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer


def one_step(layout: ParallelLayout, dense: bool = False) -> dict[str, float]:
    """Loss, gradient norm and encoded images of one global step; the same on every rank."""
    arguments = module_arguments(**(DENSE if dense else {}))
    config = with_overrides(
        Step37Config.preset(arguments["preset"]), text=arguments["text"], vision=arguments["vision"]
    )
    model = build_model(config, layout, seed=arguments["seed"])
    ddp = data_parallel.wrap(model)
    optimizer = ForwardingOptimizer(ddp, AdamWSettings(lr=1e-4), clip_grad=1.0, dtype=torch.float32)
    images = torch.zeros(())
    if model.vision_model is not None:

        def count(tower: nn.Module, inputs: tuple[Tensor, ...], features: Tensor) -> None:
            images.add_(len(inputs[0]))

        model.vision_model.register_forward_hook(count)
    ranks = parallel_state.get_data_parallel_world_size()
    packs = [pack(number) for number in range(parallel_state.get_data_parallel_rank(), PACKS, ranks)]
    result = schedule.train_step(ddp, packs)
    optimizer.step()
    dist.all_reduce(images)
    weight = config.text.mtp_loss_weight
    loss = float(result.loss + weight * result.mtp_losses.mean())
    assert optimizer.grad_norm is not None
    return {"loss": loss, "norm": optimizer.grad_norm, "images": float(images)}


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    found = {}
    dist.init_process_group("gloo")
    for name, sizes in job["layouts"].items():
        process.initialize(ParallelLayout(**sizes))
        found[name] = one_step(ParallelLayout(**sizes), job["dense"])
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(found))
    process.shutdown()


if __name__ == "__main__":
    main()
