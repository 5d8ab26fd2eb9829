"""Trains the model of `layout_parity.py` in one layout after the other; started by `layout_parity.measure`.

torchrun ... tests/layouts/parity_worker.py '{"folder": ..., "layouts": [...], "steps": [of each], "keep": [5, 20]}'
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


def config(dense: bool) -> Step37Config:
    text = TEXT | MTP | ({"moe_layers": ()} if dense else {})
    return with_overrides(Step37Config.preset("tiny_moe"), text=text, vision=VISION)


def step_packs(step: int) -> list[PackedBatch]:
    """This data-parallel rank's packs of a step; lengths differ from pack to pack."""
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    numbers = range(step * PACKS + rank, (step + 1) * PACKS, ranks)
    return [
        PackedBatch.from_samples([sample(3 * n + i, SEED) for i in range(3)], pad_to=72 + 8 * (n % 2)) for n in numbers
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


def train(each: dict[str, Any], steps: int, keep: list[int], folder: Path) -> dict[str, Any]:
    """Trains in one layout and compares the weights with those that `folder` has of one rank after as many steps.

    Args:
        each: Fields of `Layout`.
        steps: To take.
        keep: Steps after which the weights are left in the folder, where this is the one rank.
        folder: Of the references.
    """
    layout, model_config = ParallelLayout(**each["split"]), config(each["dense"])
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    process.initialize(layout)
    layout.validate(model_config, dist.get_world_size())
    model = build_stage(model_config, layout, recompute=Recompute(**each["recompute"]), seed=5)
    ddps = data_parallel.wrap(model, each["overlap"])
    optimizer = ForwardingOptimizer(ddps, AdamWSettings(lr=1e-4), clip_grad=1.0, dtype=torch.float32)
    rows = []
    for step in range(steps):
        for ddp in ddps:
            ddp.zero_grad_buffer()
        optimizer.clear_gradients()
        result = schedule.train_step(ddps, step_packs(step))
        optimizer.step()
        rows.append({"losses": [float(result.loss), *result.mtp_losses.tolist()], "norm": optimizer.grad_norm})
        if step + 1 in keep:
            kept = {name: own.clone() for name, (own, _) in whole_weights(model, None).items()}
            torch.save(kept, weights_file(folder, each["dense"], step + 1))
    data_parallel.gather_weights(ddps)
    held = whole_weights(model, torch.load(weights_file(folder, each["dense"], steps)))
    differences = {name: float((own - expected).abs().max()) for name, (own, expected) in held.items()}
    return {
        "rows": rows,
        "names": sorted(held),
        "weights": max(value for name, value in differences.items() if not name.endswith("expert_bias")),
        "bias": max([0.0, *(value for name, value in differences.items() if name.endswith("expert_bias"))]),
    }


def weights_file(folder: Path, dense: bool, steps: int) -> Path:
    """Weights of one rank after some steps."""
    return folder / f"{'dense' if dense else 'experts'}_{steps}.pt"


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    found = []
    for each, steps in zip(job["layouts"], job["steps"], strict=True):
        with pytest.MonkeyPatch.context() as patch:
            if each["broken"] is not None:
                broken_layouts.BROKEN[each["broken"]].patch(patch)
            found.append(train(each, steps, job["keep"], folder))
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    process.shutdown()


if __name__ == "__main__":
    main()
