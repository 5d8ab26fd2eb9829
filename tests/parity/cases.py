"""Tiny random models and packs, each with a feature of Step-3.7 on or off.

A `Case` changes fields of the hub-style configuration below; its samples are lists of segments:

    an int n       n random words
    "image"        <im_start> <im_patch>... <im_end>, one global view of 112 x 112 pixels
    "crops"        two local patches of 84 x 84 pixels (as 504 beside 728: the table of positions is resampled), a
                   newline between them, then the global view
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

GLOBAL_SIDE, PATCH_SIDE = 112, 84
VISION = {"width": 64, "layers": 2, "heads": 4, "mlp_ratio": 2.0, "image_size": GLOBAL_SIDE, "patch_size": 14}
FULL, SLIDING = "full_attention", "sliding_attention"
KINDS = [FULL, SLIDING, SLIDING, FULL]
LLAMA3 = {
    "rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 32.0,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": KINDS,
    "sliding_window": 8,
    "attention_other_setting": {"num_attention_heads": 6},
    "moe_layers_enum": "2,3",
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "share_expert_dim": 48,
    "moe_router_scaling_factor": 3.0,
    "rope_theta": [100.0 if kind == FULL else 10.0 for kind in KINDS],  # small, so that every channel turns
    "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in KINDS],
    "rope_scaling": LLAMA3,
    "swiglu_limits": [None, None, None, 0.3],
    "swiglu_limits_shared": [None, 0.5, None, 0.4],
    "pad_token_id": 299,  # never used: the oracle gives its embedding no gradient
}
IMAGE_TOKEN = 290
MIXED = ((9, "image", 12), (30,), (5, "crops", 7, "image", 4), (2,))


@dataclass(frozen=True)
class Case:
    """One configuration and one pack.

    Args:
        name: For messages and pytest.
        text: Changed fields of `TEXT`; None takes a field out.
        samples: Segments of each sample of the pack.
        root: Changed fields of the configuration's top level.
    """

    name: str
    text: dict[str, Any] = field(default_factory=dict)
    samples: tuple[tuple[int | str, ...], ...] = MIXED
    root: dict[str, Any] = field(default_factory=dict)

    @property
    def text_config(self) -> dict[str, Any]:
        return {name: value for name, value in (TEXT | self.text).items() if value is not None}


def _uniform(kind: str) -> dict[str, Any]:
    layers = len(KINDS)
    full = kind == FULL
    return {
        "layer_types": [kind] * layers,
        "rope_theta": [100.0 if full else 10.0] * layers,
        "partial_rotary_factors": [0.5 if full else 1.0] * layers,
    }


NO_CLAMP = {"swiglu_limits": None, "swiglu_limits_shared": None}
CASES = [
    Case("everything"),
    Case("dense", {"moe_layers_enum": ""}),
    Case("all_moe", {"moe_layers_enum": "0,1,2,3"}),
    Case("all_sliding", _uniform(SLIDING)),
    Case("all_full", _uniform(FULL)),
    Case("same_heads", {"attention_other_setting": None}),
    Case("no_llama3", {"rope_scaling": None}),
    Case("whole_rotary", {"partial_rotary_factors": [1.0] * 4}),
    Case("quarter_rotary", {"partial_rotary_factors": [0.25 if kind == FULL else 0.5 for kind in KINDS]}),
    Case("no_clamp", NO_CLAMP),
    Case("clamp_routed", NO_CLAMP | {"swiglu_limits": [None, None, 0.2, 0.3]}),
    Case("clamp_shared", NO_CLAMP | {"swiglu_limits_shared": [0.3, 0.3, 0.3, 0.3]}),
    Case("no_router_scale", {"moe_router_scaling_factor": 1.0}),
    Case("mtp_in_config", {"num_nextn_predict_layers": 1, "layer_types": [*KINDS, SLIDING]}),
    Case("projector_bias", root={"projector_bias": True}),
    Case("one_sample_of_words", samples=((40,),)),
    Case("words_only_pack", samples=((17,), (3,), (26,))),
    Case("several_images", samples=((4, "image", "image", 6, "image", 3),)),
    Case("crops", samples=((3, "crops", 5), (6, "crops", 2, "crops", 4))),
    Case("one_token", samples=((1,), (12,), (1,))),
]
