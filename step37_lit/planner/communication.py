"""Bytes that a rank sends in a step, by group, and the time they take.

A ring's all-gather or reduce-scatter of B bytes over n ranks sends (n - 1) / n B from each, an all-reduce twice that.
Counted for forward and backward, and for what recomputation runs again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from step37_lit.config import Step37Config
from step37_lit.planner.hardware import Hardware
from step37_lit.planner.layout import PlannedLayout
from step37_lit.planner.weights import FP32_BYTES, ITEM_BYTES, StateBytes, buffer_elements, chunk_weights
from step37_lit.planner.work import Training


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends, or seconds that it spends on them.

    Args:
        tensor: All-gathers, reduce-scatters and all-reduces of the residual stream over the tensor ranks.
        expert: All-to-all of tokens to their experts and back.
        expert_tensor: All-gathers and reduce-scatters of the tokens between the ranks that share an expert's matrices.
        context: Keys and values of the other context ranks.
        pipeline: Residual stream to the next stage, its gradient to the one before.
        data: Reduce-scatter of the gradients and all-gather of the weights, once a step.
    """

    tensor: float = 0.0
    expert: float = 0.0
    expert_tensor: float = 0.0
    context: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Traffic:
        return Traffic(*(factor * value for value in dataclasses.astuple(self)))

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def microbatch_traffic(config: Step37Config, layout: PlannedLayout, training: Training, chunk: int) -> Traffic:
    """Sent for one micro-batch by a rank that holds `chunk`; `data` is 0."""
    text, item = config.text, ITEM_BYTES[training.dtype]
    first, last = chunk == 0, chunk == layout.chunks - 1
    layers = list(layout.layers(text)[chunk])
    if last:
        layers += range(text.num_layers, text.num_layers + text.num_built_mtp_layers)
    tokens = training.pack.tokens / layout.context
    row = tokens * text.hidden_size * item
    again = 1 if training.recompute == "full" else 0  # the forward pass of each layer once more
    tensor = len(layers) * row * (_layer_rings(layout, again))
    heads = (1 + text.num_built_mtp_layers) if last else 0
    tensor += row * 2 * (first + heads)  # embedding and heads: one all-reduce of the row, or a gather and a scatter
    routed = training.pack.tokens / layout.residual_ranks * text.top_k * text.hidden_size
    moe = sum(layer in text.moe_layers for layer in layers)
    exchanges = moe * (4 + 2 * again) * routed * item
    # Gathered in the model's dtype and summed in the routing weights' fp32; backward the other way round.
    between = moe * (2 + again) * routed * (item + FP32_BYTES) * (layout.expert_tensor - 1)
    keys = 2 * text.num_kv_groups / layout.tensor * text.head_dim * tokens * item
    context = len(layers) * keys * (layout.context - 1) * (3 + again)  # forward; backward also sends their gradients
    handed = (2 if text.mtp else 1) * row / (layout.tensor if layout.sequence_parallel else 1)
    return Traffic(
        tensor=tensor * (layout.tensor - 1) / layout.tensor,
        expert=exchanges * (layout.expert - 1) / layout.expert,
        expert_tensor=between,
        context=context,
        pipeline=handed * ((not first) + (not last)),
    )


def data_traffic(config: Step37Config, layout: PlannedLayout, training: Training, stage: int) -> tuple[float, float]:
    """Bytes that a rank of `stage` sends once a step for its dense weights, and for its experts."""
    sent = [0.0, 0.0]
    per_element = FP32_BYTES + ITEM_BYTES[training.dtype]  # gradients there, weights back
    for chunk in layout.chunks_of_stage(stage):
        held = [w for w in chunk_weights(config, layout, chunk) if w.part not in training.frozen]
        for expert, shards in ((False, layout.dense_shards), (True, layout.expert_shards)):
            elements = buffer_elements([w.numel for w in held if w.expert == expert], shards)
            sent[expert] += per_element * elements * (shards - 1) / shards
    return sent[0], sent[1]


def seconds(layout: PlannedLayout, hardware: Hardware, sent: Traffic, data: tuple[float, float]) -> Traffic:
    """Time of the traffic. Groups lie as megatron orders ranks: tensor, context, expert and data, pipeline."""
    stage_ranks = layout.ranks // layout.pipeline
    outer = layout.pipeline > 1 and stage_ranks >= hardware.gpus_per_node
    link = hardware.network_bandwidth if outer else hardware.node_bandwidth
    dense = hardware.link_seconds(data[0], layout.dense_shards, layout.tensor)
    return Traffic(
        tensor=hardware.link_seconds(sent.tensor, layout.tensor, 1),
        expert=hardware.link_seconds(sent.expert, layout.expert, layout.expert_tensor, all_to_all=True),
        expert_tensor=hardware.link_seconds(sent.expert_tensor, layout.expert_tensor, 1),
        context=hardware.link_seconds(sent.context, layout.context, layout.tensor),
        pipeline=sent.pipeline / (link * 1e9 * hardware.link_efficiency),
        data=dense + hardware.link_seconds(data[1], layout.expert_shards, layout.expert * layout.expert_tensor),
    )


def optimizer_seconds(state: StateBytes, hardware: Hardware) -> float:
    """AdamW reads and writes its state once; it is bound by the memory."""
    return 2 * state.optimizer / (hardware.memory_bandwidth * 1e9)


def _layer_rings(layout: PlannedLayout, again: int) -> int:
    """Rings of the residual stream (all-gather or reduce-scatter) of a decoder layer.

    Sequence parallelism: linear_qkv, linear_gate and linear_fc1 gather, linear_proj and linear_fc2 scatter; backward,
    the first three gather again for the weights' gradients and scatter, the other two gather. Without it: forward one
    all-reduce (two rings) behind each of the two, backward one in front of each of the three.
    """
    forward, backward = (5, 8) if layout.sequence_parallel else (4, 6)
    return forward * (1 + again) + backward
