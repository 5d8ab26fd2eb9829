"""`config.json` in the hub's own layout, written from the published facts of the model."""

from __future__ import annotations

from typing import Any

LAYERS, MTP = 45, 3
FULL, SLIDING = "full_attention", "sliding_attention"


def published_hub_config() -> dict[str, Any]:
    """Step-3.7 Flash in the hub's layout. The published file itself is not at hand; every value is from its card."""
    kinds = [FULL if layer % 4 == 0 else SLIDING for layer in range(LAYERS + MTP)]
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype": "bfloat16",
        "image_token_id": 128001,
        "image_token_len": 169,
        "patch_token_len": 81,
        "understand_projector_stride": 2,
        "projector_bias": False,
        "vision_config": {
            "width": 1536,
            "layers": 47,
            "heads": 16,
            "mlp_ratio": 8960 / 1536,
            "image_size": 728,
            "patch_size": 14,
            "ls_init_value": 0.1,
            "hidden_act": "quick_gelu",
            "use_ln_pre": True,
            "use_ln_post": False,
            "use_abs_posemb": True,
            "use_rope2d": True,
            "use_cls_token": False,
        },
        "text_config": {
            "model_type": "step3p5",
            "vocab_size": 128896,
            "hidden_size": 4096,
            "intermediate_size": 11264,
            "num_hidden_layers": LAYERS,
            "num_nextn_predict_layers": MTP,
            "num_attention_heads": 64,
            "num_attention_groups": 8,
            "head_dim": 128,
            "attention_other_setting": {
                "attention_type": SLIDING,
                "num_attention_heads": 96,
                "num_attention_groups": 8,
                "head_dim": 128,
                "true_head_dim": 128,
            },
            "att_impl_type": "GQA",
            "layer_types": kinds,
            "sliding_window": 512,
            "rope_theta": [5e6 if kind == FULL else 1e4 for kind in kinds],
            "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in kinds],
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 2.0,
                "original_max_position_embeddings": 131072,
                "low_freq_factor": 1.0,
                "high_freq_factor": 32.0,
            },
            "yarn_only_types": [FULL],
            "use_rope_layers": [],
            "max_seq_len": 262144,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "zero_centered": True,
            "use_head_wise_attn_gate": True,
            "use_moe": True,
            "moe_layers_enum": ",".join(str(layer) for layer in range(3, LAYERS)),
            "moe_num_experts": 288,
            "moe_top_k": 8,
            "moe_intermediate_size": 1280,
            "share_expert_dim": 1280,
            "moe_layer_offset": 0,
            "moe_every_n_layer": 1,
            "moe_router_activation": "sigmoid",
            "moe_router_scaling_factor": 3.0,
            "use_moe_router_bias": True,
            "need_fp32_gate": True,
            "norm_expert_weight": True,
            "swiglu_limits": [7.0 if layer in (43, 44) else 0.0 for layer in range(LAYERS + MTP)],
            "swiglu_limits_shared": [16.0 if layer in (43, 44) else 0.0 for layer in range(LAYERS + MTP)],
            "bos_token_id": 0,
            "eos_token_id": [1, 2, 128007],
            "tie_word_embeddings": False,
        },
    }
