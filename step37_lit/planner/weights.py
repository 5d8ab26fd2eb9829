"""Parameters of each rank, and the bytes of weights, gradients and optimizer state that it holds.

Names and shapes are the name table's (`step37_lit.hub.names`), which the tests hold against the built model; here is
which axis of the layout divides each of them, and how megatron's distributed optimizer lays them out:

* a buffer for weights that all data-parallel ranks share and one for routed experts; in each, every weight begins at a
  multiple of 64 elements and the end is padded to a multiple of lcm(ranks, 128), with its gradients in fp32;
* each data-parallel rank keeps AdamW's two moments, and main parameters where the model is not fp32, for its
  1 / ranks of a buffer, without the padding; torch's AdamW counts steps in an fp32 number for each piece.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from step37_lit.config import Step37Config
from step37_lit.hub.names import Row, name_table
from step37_lit.planner.layout import PlannedLayout

Part = Literal["language", "vision", "projection"]
DType = Literal["fp32", "bf16"]
ITEM_BYTES: dict[DType, int] = {"fp32": 4, "bf16": 2}
FP32_BYTES = 4
# Siblings in the order in which modules register them, which is the order of megatron's buffers (from behind).
_SIBLINGS = (
    "embedding", "vision_model", "align_projector", "decoder", "positional_embedding", "conv1", "ln_pre",
    "transformer", "vit_downsampler1", "vit_downsampler2", "in_proj_weight", "in_proj_bias", "out_proj",
    "c_fc", "c_proj", "ln_1", "attn", "ls_1", "ln_2", "enorm", "hnorm", "eh_proj", "transformer_layer",
    "layers", "input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp", "ls_2", "linear_qkv",
    "linear_gate", "q_layernorm", "k_layernorm", "linear_proj", "router", "experts", "shared_experts",
    "linear_fc1", "linear_fc2", "weight1", "weight2", "final_layernorm", "output_layer", "mtp",
    "word_embeddings", "resblocks", "weight", "bias", "gamma",
)  # fmt: skip
_ORDER = {name: place for place, name in enumerate(_SIBLINGS)}
_TENSOR_SPLIT = ("linear_qkv", "linear_gate", "linear_proj", "linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class Weight:
    """A parameter as a rank holds it.

    Args:
        name: In the whole model.
        numel: Elements on this rank.
        unit: The decoder layer (0-based) that it belongs to; -1 in front of the decoder, `num_layers` behind it.
        part: What a freezing argument calls it.
        expert: Reduced over the ranks that share an expert, in a buffer of its own.
    """

    name: str
    numel: int
    unit: int
    part: Part
    expert: bool


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds from the first optimizer step on, besides activations.

    Args:
        parameters: Elements of its weights, each once.
        weights: Bytes of the weights with padding, and of the router's buffers.
        gradients: Bytes of the gradient buffers.
        optimizer: Bytes of moments, main parameters and step counters.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


@lru_cache(maxsize=256)
def rank_weights(config: Step37Config, tensor: int, expert: int, expert_tensor: int) -> tuple[Weight, ...]:
    """Parameters of all stages as one rank holds them, in the order in which the model registers them."""
    split = {"tensor": tensor, "expert": expert * expert_tensor, "whole": 1}
    weights = []
    for row in name_table(config):
        if row.ours is None or row.ours.endswith("expert_bias"):
            continue  # MTP layers that are not built; a buffer
        axis = _axis(row.ours)
        numel = math.prod(row.shape) // split[axis]
        weights.append(Weight(row.ours, numel, _unit(row, config), _part(row.ours), axis == "expert"))
    return tuple(sorted(weights, key=lambda weight: _registration(weight.name)))


def chunk_weights(config: Step37Config, layout: PlannedLayout, chunk: int) -> list[Weight]:
    """Parameters of one chunk of the decoder, with what is in front of the first and behind the last one."""
    first, last = chunk == 0, chunk == layout.chunks - 1
    own = layout.layers(config.text)[chunk]
    behind = config.text.num_layers
    return [
        weight
        for weight in rank_weights(config, layout.tensor, layout.expert, layout.expert_tensor)
        if weight.unit in own or (first and weight.unit == -1) or (last and weight.unit == behind)
    ]


def state_bytes(
    config: Step37Config,
    layout: PlannedLayout,
    stage: int,
    dtype: DType = "bf16",
    frozen: frozenset[Part] = frozenset(),
    data_rank: int = 0,
    expert_data_rank: int = 0,
) -> StateBytes:
    """Bytes on a rank of pipeline stage `stage`.

    Args:
        config: The model.
        layout: A valid layout.
        stage: Pipeline stage.
        dtype: Of the parameters.
        frozen: Parts that never train: they have neither gradients nor optimizer state.
        data_rank: Place among the ranks that share the gradients of its dense weights (over DP x CP); the shares of
            any two differ by the padding at most.
        expert_data_rank: Place among the ranks that share the gradients of its experts.
    """
    item, parameters, weights, gradients, optimizer = ITEM_BYTES[dtype], 0, 0, 0, 0
    state_item = 2 * FP32_BYTES + (0 if dtype == "fp32" else FP32_BYTES)
    for chunk in layout.chunks_of_stage(stage):
        held = chunk_weights(config, layout, chunk)
        parameters += sum(weight.numel for weight in held)
        weights += sum(item * weight.numel for weight in held if weight.part in frozen)
        weights += _router_buffers(config, layout, chunk)
        for expert, shards, rank in (
            (False, layout.dense_shards, data_rank),
            (True, layout.expert_shards, expert_data_rank),
        ):
            sizes = [w.numel for w in held if w.expert == expert and w.part not in frozen]
            elements = buffer_elements(sizes, shards)
            weights += item * elements
            gradients += FP32_BYTES * elements
            owned, pieces = owned_elements(sizes, shards, rank)
            optimizer += state_item * owned + FP32_BYTES * pieces
    return StateBytes(parameters, weights, gradients, optimizer)


def buffer_elements(sizes: list[int], shards: int) -> int:
    """Elements of one of megatron's buffers over `shards` ranks, with its padding (in one bucket: reduction that
    overlaps with the backward pass cuts it into buckets and pads each)."""
    if not sizes:
        return 0
    return _pad(sum(_pad(size, 64) for size in sizes), math.lcm(shards, 128))


def owned_elements(sizes: list[int], shards: int, rank: int) -> tuple[int, int]:
    """Elements whose optimizer state a rank keeps, and the number of weights that they are pieces of."""
    share = buffer_elements(sizes, shards) // shards
    begin, end = rank * share, (rank + 1) * share
    owned = pieces = start = 0
    for size in reversed(sizes):  # as backward reaches them
        if start >= end:
            break
        overlap = min(end, start + size) - max(begin, start)
        if overlap > 0:
            owned, pieces = owned + overlap, pieces + 1
        start = _pad(start + size, 64)
    return owned, pieces


def _pad(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _router_buffers(config: Step37Config, layout: PlannedLayout, chunk: int) -> int:
    """Bias and counter of tokens of each MoE layer, fp32 [experts] each."""
    layers = sum(layer in config.text.moe_layers for layer in layout.layers(config.text)[chunk])
    return layers * 2 * FP32_BYTES * config.text.num_experts


def _axis(name: str) -> Literal["tensor", "expert", "whole"]:
    pieces = name.split(".")
    if "experts" in pieces:
        return "expert"
    if pieces[0] == "vision_model":
        return "whole"
    head = pieces[0] == "embedding" or "output_layer" in pieces
    return "tensor" if head or any(piece in _TENSOR_SPLIT for piece in pieces) else "whole"


def _unit(row: Row, config: Step37Config) -> int:
    assert row.ours is not None
    pieces = row.ours.split(".")
    if pieces[:2] == ["decoder", "layers"]:
        return int(pieces[2])
    return -1 if pieces[0] in ("embedding", "vision_model", "align_projector") else config.text.num_layers


def _part(name: str) -> Part:
    return {"vision_model": "vision", "align_projector": "projection"}.get(name.split(".")[0], "language")  # type: ignore[return-value]


def _registration(name: str) -> tuple[int, ...]:
    return tuple(int(piece) if piece.isdigit() else _ORDER[piece] for piece in name.split("."))
