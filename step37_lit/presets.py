"""Named model sizes: the published 200B model and two that train on a laptop's CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from step37_lit.config import AttentionKind, RopeConfig, Step37Config, TextConfig, TokenIds, VisionConfig

# The tiny presets' tokenizer (step37_lit.tokenizer) puts the special tokens first, under the model's names.
TINY_TOKENS = TokenIds(
    bos=0, eos=(1, 2, 9), im_start=3, im_patch=4, im_end=5, patch_start=6, patch_newline=7, patch_end=8
)


def _layer_types(num_layers: int) -> tuple[AttentionKind, ...]:
    return tuple("full_attention" if i % 4 == 0 else "sliding_attention" for i in range(num_layers))


def _tiny_text(num_layers: int) -> TextConfig:
    return TextConfig(
        vocab_size=512,
        hidden_size=96,
        ffn_hidden_size=256,
        num_layers=num_layers,
        num_mtp_layers=0,
        layer_types=_layer_types(num_layers),
        num_heads=4,
        num_sliding_heads=6,
        num_kv_groups=2,
        head_dim=32,
        sliding_window=64,
        full_rope=RopeConfig(theta=5e6, rotary_factor=0.5),
        sliding_rope=RopeConfig(theta=1e4, rotary_factor=1.0),
        max_position=4096,
        moe_layers=(),
        swiglu_limits=(None,) * num_layers,
        swiglu_limits_shared=(None,) * num_layers,
        # About hidden_size^-0.5. The published 0.02 belongs to a width of 4096; at 96 it keeps the decoder so quiet
        # that scenes stay at chance (figures in benchmarks/LOG.md).
        init_std=0.1,
    )


def tiny() -> Step37Config:
    """0.9M parameters: two dense layers, one full and one sliding; 112-pixel pictures become 4 tokens."""
    vision = VisionConfig(
        width=64, num_layers=4, num_heads=4, ffn_hidden_size=170, image_size=112, crop_size=84, layer_scale_init=1.0
    )
    return Step37Config(vision=vision, text=_tiny_text(num_layers=2), tokens=TINY_TOKENS)


def tiny_moe() -> Step37Config:
    """`tiny` with four layers, of which the last two have 8 routed experts and a shared one."""
    text = dataclasses.replace(
        _tiny_text(num_layers=4),
        moe_layers=(2, 3),
        num_experts=8,
        top_k=2,
        expert_ffn_size=64,
        shared_expert_ffn_size=64,
    )
    return dataclasses.replace(tiny(), text=text)


PRESETS: dict[str, Callable[[], Step37Config]] = {"tiny": tiny, "tiny_moe": tiny_moe, "flash": Step37Config}
