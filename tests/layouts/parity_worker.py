"""Trains the model of `layout_parity.py` in one layout after the other; started by `layout_parity.measure`.

torchrun ... tests/layouts/parity_worker.py '{"folder": ..., "layouts": [...], "steps": 20}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import broken_layouts
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from training import TEXT, VISION, sample

from step37_lit import Step37Config
from step37_lit.batch import PackedBatch
from step37_lit.lit_module import with_overrides
from step37_lit.megatron import data_parallel, process, schedule
from step37_lit.megatron.build import build_stage
from step37_lit.megatron.chunks import ModelChunks, chunks_of
from step37_lit.megatron.initialize import global_name, tensor_share
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.optimizer import AdamWSettings, ForwardingOptimizer
from step37_lit.model.experts import GroupedExperts
from step37_lit.model.recompute import Recompute
from step37_lit.model.step37_model import Step37Model

MTP = {
    "num_mtp_layers": 2,
    "mtp": True,
    "mtp_loss_weight": 1.0,  # so that the MTP layers weigh as much as the main head
    "layer_types": ["full_attention", *["sliding_attention"] * 3, *["sliding_attention"] * 2],
    "swiglu_limits": [None] * 6,
    "swiglu_limits_shared": [None] * 6,
}
PACKS = 4  # of a step
SEED = 11


def config() -> Step37Config:
    return with_overrides(Step37Config.preset("tiny_moe"), text=TEXT | MTP, vision=VISION)


def step_packs(step: int) -> list[PackedBatch]:
    """This data-parallel rank's packs of a step; lengths differ from pack to pack."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    numbers = range(step * PACKS + rank, (step + 1) * PACKS, ranks)
    return [
        PackedBatch.from_samples([sample(3 * n + i, SEED) for i in range(3)], pad_to=72 + 4 * (n % 2)) for n in numbers
    ]


def whole_weights(model: Step37Model | ModelChunks, full: dict[str, Tensor] | None) -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's weights and router biases, each with what one rank has in its place (itself without `full`)."""
    held = {}
    for chunk in chunks_of(model):
        experts = {name: m for name, m in chunk.named_modules() if isinstance(m, GroupedExperts)}
        routers = {name: m for name, m in chunk.named_modules() if isinstance(m, TopKRouter)}
        tensors = dict(chunk.named_parameters()) | {f"{n}.expert_bias": m.expert_bias for n, m in routers.items()}
        for local, weight in tensors.items():
            name = global_name(chunk, local)
            expected = weight if full is None else full[name]
            module = experts.get(local.rpartition(".")[0])
            if full is not None and module is not None:
                group, expected = module.tp_group, expected[list(module.expert_indices)]
                expected = tensor_share(weight, expected, dist.get_world_size(group), dist.get_rank(group))
            elif full is not None and getattr(weight, "tensor_model_parallel", False):
                group = parallel_state.get_tensor_model_parallel_group()
                expected = tensor_share(weight, expected, dist.get_world_size(group), dist.get_rank(group))
            held[name] = (weight.detach(), expected.detach())
    return held


def train(
    layout: ParallelLayout, recompute: Recompute, overlap: bool, steps: int, full: dict[str, Tensor] | None
) -> dict[str, Any]:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    process.initialize(layout)
    layout.validate(config(), dist.get_world_size())
    model = build_stage(config(), layout, recompute=recompute, seed=5)
    ddps = data_parallel.wrap(model, overlap)
    optimizer = ForwardingOptimizer(ddps, AdamWSettings(lr=1e-4), clip_grad=1.0, dtype=torch.float32)
    rows = []
    for step in range(steps):
        for ddp in ddps:
            ddp.zero_grad_buffer()
        optimizer.clear_gradients()
        result = schedule.train_step(ddps, step_packs(step))
        optimizer.step()
        rows.append({"losses": [float(result.loss), *result.mtp_losses.tolist()], "norm": optimizer.grad_norm})
    data_parallel.gather_weights(ddps)
    held = whole_weights(model, full)
    differences = {name: float((own - expected).abs().max()) for name, (own, expected) in held.items()}
    return {
        "rows": rows,
        "names": sorted(held),
        "weights": max(value for name, value in differences.items() if not name.endswith("expert_bias")),
        "bias": max([0.0, *(value for name, value in differences.items() if name.endswith("expert_bias"))]),
        "held": {name: own for name, (own, _) in held.items()},
    }


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    weights = folder / "reference.pt"
    full = torch.load(weights) if weights.exists() else None
    found = []
    for each in job["layouts"]:
        with pytest.MonkeyPatch.context() as patch:
            if each["broken"] is not None:
                broken_layouts.BROKEN[each["broken"]].patch(patch)
            layout, recompute = ParallelLayout(**each["split"]), Recompute(**each["recompute"])
            found.append(train(layout, recompute, each["overlap"], job["steps"], full))
    held = [one.pop("held") for one in found]
    if full is None:
        torch.save(held[0], weights)
        (folder / "reference.json").write_text(json.dumps(found[0]))
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    process.shutdown()


if __name__ == "__main__":
    main()
