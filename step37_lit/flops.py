"""Floating-point operations of a pack: what the model's matrix products need, counted from the config.

A multiplication and its addition are two operations; the backward pass costs twice the forward. Padding, norms,
softmax and rotary embeddings are not counted, so a share of peak made from these figures is not flattered.
"""

from __future__ import annotations

from step37_lit.batch import PackedBatch
from step37_lit.config import Step37Config, TextConfig, VisionConfig


def training_flops(config: Step37Config, pack: PackedBatch) -> float:
    """Forward and backward of one pack."""
    return 3.0 * forward_flops(config, pack)


def forward_flops(config: Step37Config, pack: PackedBatch) -> float:
    """One forward pass of a pack with its images; the head only where there is a loss."""
    text, samples = config.text, len(pack.sample_keys)
    lengths = pack.cu_seqlens.diff()[:samples].tolist()
    learnt = float(pack.loss_mask.sum())
    total = sum(lengths) * _text_flops_per_token(text) + 2.0 * learnt * text.hidden_size * text.vocab_size
    total += sum(_attention_flops(text, length) for length in lengths)
    for image in pack.images:
        if image.images is not None:
            side = image.images.shape[-1]
            projected = config.vision.num_tokens(side) * 2.0 * config.vision.output_dim * text.hidden_size
            total += image.num_images * (_vision_flops(config.vision, side) + projected)
    return total


def _text_flops_per_token(text: TextConfig) -> float:
    hidden, total = text.hidden_size, 0.0
    for layer in range(text.num_layers):
        heads = text.heads_of(layer)
        total += hidden * text.head_dim * (2 * heads + 2 * text.num_kv_groups) + hidden * heads
        if layer in text.moe_layers:
            experts = text.top_k * text.expert_ffn_size + text.shared_expert_ffn_size
            total += 3 * hidden * experts + hidden * text.num_experts
        else:
            total += 3 * hidden * text.ffn_hidden_size
    return 2.0 * total


def _attention_flops(text: TextConfig, length: int) -> float:
    """Scores and weighted sums of all layers for one sub-sequence."""
    full_pairs = length * (length + 1) / 2
    window = min(text.sliding_window, length)
    sliding_pairs = window * (window + 1) / 2 + (length - window) * window
    total = 0.0
    for layer in range(text.num_layers):
        pairs = full_pairs if text.layer_types[layer] == "full_attention" else sliding_pairs
        total += 4.0 * pairs * text.heads_of(layer) * text.head_dim
    return total


def _vision_flops(vision: VisionConfig, side: int) -> float:
    grid, width = side // vision.patch_size, vision.width
    patches = grid * grid
    total = 2.0 * patches * 3 * vision.patch_size**2 * width
    block = 2.0 * patches * (4 * width**2 + 2 * width * vision.ffn_hidden_size) + 4.0 * patches**2 * width
    total += vision.num_layers * block
    for channels in (width, 2 * width):
        grid = (grid + 1) // 2
        total += 2.0 * grid * grid * 9 * channels * 2 * channels
    return total
