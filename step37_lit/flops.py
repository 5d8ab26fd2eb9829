"""Floating-point operations of a pack: what the model's matrix products need, counted from the config.

A multiplication and its addition are two operations; the backward pass costs twice the forward. Padding, norms,
softmax and rotary embeddings are not counted, so a share of peak made from these figures is not flattered; nor is what
recomputation does twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from step37_lit.batch import PackedBatch
from step37_lit.config import Step37Config, TextConfig, VisionConfig
from step37_lit.model.packing import following


@dataclass(frozen=True)
class Flops:
    """Operations of a forward pass by part.

    Args:
        vision: Vision tower and projector.
        projections: Query, key, value, gate and output matrices of attention.
        attention: Scores and weighted sums of attention, over the pairs that are not masked.
        dense: Feed-forward parts of dense layers.
        experts: Routed and shared experts and the router.
        head: Output head.
        mtp: MTP layers with their heads.
    """

    vision: float = 0.0
    projections: float = 0.0
    attention: float = 0.0
    dense: float = 0.0
    experts: float = 0.0
    head: float = 0.0
    mtp: float = 0.0

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))

    def __add__(self, other: Flops) -> Flops:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Flops(*(own + others for own, others in pairs))

    def dot(self, factors: Flops) -> float:
        """Sum of the parts, each times its factor."""
        return sum(
            own * factor for own, factor in zip(dataclasses.astuple(self), dataclasses.astuple(factors), strict=True)
        )

    def __mul__(self, factor: float) -> Flops:
        return Flops(*(factor * value for value in dataclasses.astuple(self)))


def training_flops(config: Step37Config, pack: PackedBatch) -> float:
    """Forward and backward of one pack."""
    return 3.0 * forward_flops(config, pack).total


def forward_flops(config: Step37Config, pack: PackedBatch) -> Flops:
    """One forward pass of a pack with its images; heads only where there is a loss."""
    lengths = pack.cu_seqlens.diff()[: len(pack.sample_keys)].tolist()
    mask = pack.loss_mask[0]
    learnt = [float(mask.sum())]
    for _ in range(config.text.num_built_mtp_layers):
        mask = following(mask, pack.cu_seqlens)
        learnt.append(float(mask.sum()))
    text = decoder_flops(config.text, lengths, range(config.text.num_layers))
    heads = Flops(head=head_flops(config.text, learnt[0]), mtp=mtp_flops(config.text, lengths, learnt[1:]))
    sides = [(i.images.shape[-1], i.num_images) for i in pack.images if i.images is not None]
    return text + heads + Flops(vision=vision_flops(config, sides))


def decoder_flops(text: TextConfig, lengths: Sequence[int], layers: Iterable[int]) -> Flops:
    """Some layers of the decoder (or of the MTP layers behind it) over sub-sequences of these lengths."""
    tokens = sum(lengths)
    pairs = {"full_attention": _causal_pairs(lengths), "sliding_attention": _window_pairs(lengths, text.sliding_window)}
    total = Flops()
    for layer in layers:
        projections, dense, experts = _layer_flops_per_token(text, layer)
        attention = 4.0 * pairs[text.layer_types[layer]] * text.heads_of(layer) * text.head_dim
        total += Flops(0.0, tokens * projections, attention, tokens * dense, tokens * experts)
    return total


def head_flops(text: TextConfig, learnt: float) -> float:
    """The output head on the tokens that have a loss."""
    return 2.0 * learnt * text.hidden_size * text.vocab_size


def mtp_flops(text: TextConfig, lengths: Sequence[int], learnt: Sequence[float]) -> float:
    """The MTP layers that are built, each with the tokens that it learns."""
    layers = range(text.num_layers, text.num_layers + text.num_built_mtp_layers)
    joined = len(layers) * sum(lengths) * 4.0 * text.hidden_size**2  # [2 hidden] -> [hidden]
    heads = sum(head_flops(text, tokens) for tokens in learnt)
    return decoder_flops(text, lengths, layers).total + joined + heads


def vision_flops(config: Step37Config, images: Iterable[tuple[int, int]]) -> float:
    """Tower and projector; `images` are (side in pixels, number)."""
    total = 0.0
    for side, number in images:
        projected = 2.0 * config.vision.num_tokens(side) * config.vision.output_dim * config.text.hidden_size
        total += number * (_tower_flops(config.vision, side) + projected)
    return total


def _layer_flops_per_token(text: TextConfig, layer: int) -> tuple[float, float, float]:
    """Attention's matrices, dense feed-forward part, experts with their router."""
    hidden, heads = text.hidden_size, text.heads_of(layer)
    projections = 2.0 * (hidden * text.head_dim * (2 * heads + 2 * text.num_kv_groups) + hidden * heads)
    if layer not in text.moe_layers:
        return projections, 6.0 * hidden * text.ffn_hidden_size, 0.0
    inner = text.top_k * text.expert_ffn_size + text.shared_expert_ffn_size
    return projections, 0.0, 6.0 * hidden * inner + 2.0 * hidden * text.num_experts


def _causal_pairs(lengths: Sequence[int]) -> float:
    return sum(length * (length + 1) / 2 for length in lengths)


def _window_pairs(lengths: Sequence[int], window: int) -> float:
    return sum(_causal_pairs([min(window, length)]) + max(length - window, 0) * window for length in lengths)


def _tower_flops(vision: VisionConfig, side: int) -> float:
    grid, width = side // vision.patch_size, vision.width
    patches = grid * grid
    total = 2.0 * patches * 3 * vision.patch_size**2 * width
    block = 2.0 * patches * (4 * width**2 + 2 * width * vision.ffn_hidden_size) + 4.0 * patches**2 * width
    total += vision.num_layers * block
    for channels in (width, 2 * width):
        grid = (grid + 1) // 2
        total += 2.0 * grid * grid * 9 * channels * 2 * channels
    return total
