"""Generates with the tests' model on N ranks and writes each rank's completions as JSON.

torchrun ... tests/layouts/generate_worker.py '{"folder": ..., "layout": {...}, "prompts": 5, ...}'
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from training import TEXT, VISION, sample

from step37_lit import Step37Config
from step37_lit.generation import Generator
from step37_lit.lit_module import with_overrides
from step37_lit.megatron import process
from step37_lit.megatron.build import build_stage
from step37_lit.megatron.chunks import ModelChunks, chunks_of
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.model.step37_model import Step37Model
from step37_lit.sampling import GenerationSettings
from step37_lit.tokenizer import Step37Tokenizer

SCALE = 3.0


def with_mtp_layers(config: Step37Config) -> Step37Config:
    """The same with two MTP layers behind the others."""
    text = config.text
    longer: dict[str, Any] = {"layer_types": (*text.layer_types, *["sliding_attention"] * 2)}
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        longer[name] = (*getattr(text, name), None, None)
    return replace(config, text=replace(text, num_mtp_layers=2, mtp=True, **longer))


def agree(model: Step37Model | ModelChunks) -> None:
    """Weights with which the MTP layers often draft what the model chooses: all look at the newest token first."""
    with torch.no_grad():
        for chunk in chunks_of(model):
            if chunk.pre_process:
                chunk.embedding.word_embeddings.weight.mul_(SCALE)
            if chunk.post_process:
                for layer in chunk.mtp.layers:
                    words, hidden = layer.eh_proj.weight.chunk(2, dim=1)
                    words.copy_(SCALE * torch.eye(len(words)))
                    hidden.zero_()
                    layer.output_layer.weight.copy_(chunk.output_layer.weight)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    layout = ParallelLayout(**job["layout"])
    process.initialize(layout)
    config = with_mtp_layers(with_overrides(Step37Config.preset(job["preset"]), text=TEXT, vision=VISION))
    model = build_stage(config, layout, seed=5)
    agree(model)
    prompts = [sample(index, seed=9) for index in range(job["prompts"])]
    if job["shared_out"]:  # each data-parallel rank has prompts of its own
        ranks = parallel_state.get_data_parallel_world_size()
        prompts = prompts[parallel_state.get_data_parallel_rank() :: ranks]
    found: dict[str, list] = {}
    steps = []
    for settings in job["settings"]:
        generator = Generator(model, Step37Tokenizer.train(["a"], 300), batch_size=8)
        for each in generator.generate(prompts, GenerationSettings(**settings)):
            found[f"{settings} {each[0].key}"] = [[list(c.tokens), c.logprob] for c in each]
        steps.append(generator.tokens_per_step)
    state = [model.training, model.config.sequence_parallel]
    Path(job["folder"], f"rank{dist.get_rank()}.json").write_text(
        json.dumps({"found": found, "steps": steps, "state": state})
    )
    process.shutdown()


if __name__ == "__main__":
    main()
