"""Named model sizes: the published 200B model and two that train on a laptop's CPU."""

from __future__ import annotations

from collections.abc import Callable

from step37_lit.config import AttentionKind, RopeConfig, Step37Config, TextConfig, TokenIds, VisionConfig

# The tiny presets' tokenizer (step37_lit.tokenizer) puts the special tokens first, under the model's names.
TINY_TOKENS = TokenIds(
    bos=0, eos=(1, 2, 9), im_start=3, im_patch=4, im_end=5, patch_start=6, patch_newline=7, patch_end=8
)


def _tiny_layer_types(num_layers: int) -> tuple[AttentionKind, ...]:
    period: tuple[AttentionKind, ...] = ("full_attention", "sliding_attention", "sliding_attention", "sliding_attention")
    return tuple(period[i % 4] for i in range(num_layers))


def tiny() -> Step37Config:
    """Four dense layers and a four-layer vision tower; 112-pixel pictures become 4 tokens... see the recipe."""
    layers = 4
    return Step37Config(
        vision=VisionConfig(
            width=96, num_layers=4, num_heads=4, ffn_hidden_size=256, image_size=112, patch_size=14, layer_scale_init=1.0
        ),
        text=TextConfig(
            vocab_size=512,
            hidden_size=128,
            ffn_hidden_size=352,
            num_layers=layers,
            num_mtp_layers=0,
            layer_types=_tiny_layer_types(layers),
            num_heads=4,
            num_sliding_heads=6,
            num_kv_groups=2,
            head_dim=32,
            sliding_window=64,
            full_rope=RopeConfig(theta=5e6, rotary_factor=0.5),
            sliding_rope=RopeConfig(theta=1e4, rotary_factor=1.0),
            max_position=4096,
            moe_layers=(),
            swiglu_limits=(None,) * layers,
            swiglu_limits_shared=(None,) * layers,
        ),
        tokens=TINY_TOKENS,
    )


def tiny_moe() -> Step37Config:
    """`tiny` with 8 routed experts and a shared one in layers 2 and 3."""
    import dataclasses

    base = tiny()
    text = dataclasses.replace(
        base.text, moe_layers=(2, 3), num_experts=8, top_k=2, expert_ffn_size=64, shared_expert_ffn_size=64
    )
    return dataclasses.replace(base, text=text)


PRESETS: dict[str, Callable[[], Step37Config]] = {"tiny": tiny, "tiny_moe": tiny_moe, "flash": Step37Config}
