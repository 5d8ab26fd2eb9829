"""Loads a hub folder and the checkpoint that was imported from it on N ranks, saves the weights again.

torchrun ... tests/layouts/hub_worker.py '{"folder": ..., "hubs": [of each rank], "checkpoint": ..., "layout": {...}}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist

from step37_lit import build_model, saved_model
from step37_lit.hub.load import load_hub_weights, loadable_weights
from step37_lit.initial_weights import load_initial_weights
from step37_lit.megatron import process
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.saver import CheckpointSaver, Job
from step37_lit.megatron.sharding import OwnParts


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    layout = ParallelLayout(**job["layout"])
    process.initialize(layout)
    config = saved_model.read_config(Path(job["checkpoint"]))
    from_hub, from_checkpoint = (build_model(config, layout, torch.bfloat16, seed=seed) for seed in (1, 2))
    error = None
    try:
        read = load_hub_weights([from_hub], job["hubs"][dist.get_rank()])
    except ValueError as found:
        error = str(found)
    if error is None:
        load_initial_weights([from_checkpoint], job["checkpoint"])
        weights = loadable_weights(from_hub)
        expected = loadable_weights(from_checkpoint)
        differing = [name for name in weights if not torch.equal(weights[name], expected[name])]
        files = saved_model.description(config, None, None)
        tensors = {"model": OwnParts([from_checkpoint]).model(writing=True)}
        saver = CheckpointSaver()
        described = {"kind": "weights", "step": 0, "dtype": "bfloat16"}
        saver.save(Job(Path(job["folder"], "saved"), tensors, files, described, points=False))
        saver.wait()
        held = sum(weight.numel() * weight.element_size() for weight in weights.values())
        result = {"differing": differing, "read": read, "held": held, "weights": len(weights)}
    else:
        result = {"error": error}
    Path(job["folder"], f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    process.shutdown()


if __name__ == "__main__":
    main()
