"""`Step37Config` -> `config.json` of a hub folder, in the hub's own layout or in that of `transformers`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch

from step37_lit.config import ATTENTION_KINDS, AttentionKind, Llama3Scaling, Step37Config, TextConfig, VisionConfig
from step37_lit.errors import require
from step37_lit.hub.config_json import PROCESSOR_TYPE
from step37_lit.hub.text_fields import UNUSED_ROPE

ConfigLayout = Literal["hub", "transformers"]
LAYOUTS: tuple[ConfigLayout, ...] = ("hub", "transformers")
MTP_KIND = "dense"


def hub_config(config: Step37Config, layout: ConfigLayout, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of `config.json`. `read_hub_config` makes the same config of them, but for what no hub folder says:
    settings of training (`text.mtp`, `mtp_loss_weight`, `router_bias_update_rate`), rotary settings of a kind of
    attention that no layer has, and `vision.crop_size` (`preprocessor_config`).

    Args:
        config: The model.
        layout: Whose names of fields.
        dtype: Of the weights beside it.

    Raises:
        ConfigError: the layout has no field for what the model computes.
    """
    tokens = config.tokens
    root: dict[str, Any] = {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "torch_dtype" if layout == "hub" else "dtype": str(dtype).removeprefix("torch."),
        "image_token_id": tokens.im_patch,
        "projector_bias": config.projector_bias,
    }
    for name in ("im_start", "im_end", "patch_start", "patch_newline", "patch_end"):
        root[f"{name}_token_id"] = getattr(tokens, name)
    if layout == "hub":
        root["image_token_len"] = config.vision.num_tokens(config.vision.image_size)
        root["understand_projector_stride"] = 2
    vision = _hub_vision(config.vision) if layout == "hub" else _transformers_vision(config.vision)
    text = _common_text(config.text) | (_hub_text if layout == "hub" else _transformers_text)(config.text)
    ends = {"bos_token_id": tokens.bos, "eos_token_id": list(tokens.eos) or None}
    return root | {"vision_config": vision, "text_config": text | ends}


def preprocessor_config(config: Step37Config) -> dict[str, Any]:
    """The fields of `preprocessor_config.json` (names of `transformers`): the side of the global view and that of the
    multicrop patches, which `config.json` has no field for."""
    side = config.vision.image_size
    return {
        "image_processor_type": PROCESSOR_TYPE,
        "size": {"height": side, "width": side},
        "patch_size": config.vision.crop_size,
    }


def hub_facts(config: Step37Config) -> Step37Config:
    """What of a config a hub folder says: settings of training at their defaults, no MTP layers built, and the rotary
    settings of a kind of attention that no layer has as the reader gives them."""
    default, kinds = TextConfig(), config.text.layer_types
    text = dataclasses.replace(
        config.text,
        mtp=False,
        mtp_loss_weight=default.mtp_loss_weight,
        router_bias_update_rate=default.router_bias_update_rate,
        full_rope=config.text.full_rope if "full_attention" in kinds else UNUSED_ROPE,
        sliding_rope=config.text.sliding_rope if "sliding_attention" in kinds else UNUSED_ROPE,
    )
    return dataclasses.replace(config, text=text)


def _mlp_ratio(vision: VisionConfig) -> float:
    """A ratio of which `transformers` makes the inner width again: int(width x ratio)."""
    ratio = vision.ffn_hidden_size / vision.width
    return ratio if int(vision.width * ratio) == vision.ffn_hidden_size else math.nextafter(ratio, math.inf)


def _hub_vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "width": vision.width,
        "layers": vision.num_layers,
        "heads": vision.num_heads,
        "mlp_ratio": _mlp_ratio(vision),
        "intermediate_size": vision.ffn_hidden_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "ls_init_value": vision.layer_scale_init,
        "rope_theta": vision.rope_theta,
        "hidden_act": "quick_gelu",
        "use_ln_pre": True,
        "use_ln_post": False,
        "use_abs_posemb": True,
        "use_rope2d": True,
        "use_cls_token": False,
    }


def _transformers_vision(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "step3p5_vision",
        "hidden_size": vision.width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "mlp_ratio": _mlp_ratio(vision),
        "intermediate_size": vision.ffn_hidden_size,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "layer_scale_init_value": vision.layer_scale_init,
        "hidden_act": "quick_gelu",
        "max_position_embeddings": vision.position_grid**2,
        "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
    }


def _common_text(text: TextConfig) -> dict[str, Any]:
    return {
        "model_type": "step3p5",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.ffn_hidden_size,
        "num_hidden_layers": text.num_layers,
        "num_nextn_predict_layers": text.num_mtp_layers,
        "num_attention_heads": text.num_heads,
        "head_dim": text.head_dim,
        "hidden_act": "silu",
        "sliding_window": text.sliding_window,
        "max_position_embeddings": text.max_position,
        "rms_norm_eps": text.norm_eps,
        "initializer_range": text.init_std,
        "moe_intermediate_size": text.expert_ffn_size,
        "share_expert_dim": text.shared_expert_ffn_size,
        "moe_router_scaling_factor": text.router_scaling_factor,
        "swiglu_limits": list(text.swiglu_limits),
        "swiglu_limits_shared": list(text.swiglu_limits_shared),
        "tie_word_embeddings": False,
    }


def _hub_text(text: TextConfig) -> dict[str, Any]:
    ropes = [text.rope_of(kind) for kind in text.layer_types]
    return {
        "num_attention_groups": text.num_kv_groups,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": text.num_sliding_heads,
            "num_attention_groups": text.num_kv_groups,
            "head_dim": text.head_dim,
            "true_head_dim": text.head_dim,
        },
        "att_impl_type": "GQA",
        "layer_types": list(text.layer_types),
        "rope_theta": [rope.theta for rope in ropes],
        "partial_rotary_factors": [rope.rotary_factor for rope in ropes],
        **_hub_scaling(text),
        "max_seq_len": text.max_position,
        "zero_centered": True,
        "use_head_wise_attn_gate": True,
        "use_qk_norm": True,
        "use_moe": bool(text.moe_layers),
        "moe_layers_enum": ",".join(map(str, text.moe_layers)),
        "moe_num_experts": text.num_experts,
        "moe_top_k": text.top_k,
        "moe_router_activation": "sigmoid",
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "norm_expert_weight": True,
    }


def _used_kinds(text: TextConfig) -> list[AttentionKind]:
    return [kind for kind in ATTENTION_KINDS if kind in text.layer_types]


def _hub_scaling(text: TextConfig) -> dict[str, Any]:
    """One `rope_scaling` for the kinds of attention in `yarn_only_types`."""
    scaled = {kind: text.rope_of(kind).scaling for kind in _used_kinds(text)}
    scalings = {scaling for scaling in scaled.values() if scaling is not None}
    same = "that of text.sliding_rope (the hub's layout has one field for both)"
    require(len(scalings) <= 1, "text.full_rope.scaling", same, text.full_rope.scaling)
    if not scalings:
        return {}
    (scaling,) = scalings
    kinds = [kind for kind, value in scaled.items() if value is not None]
    return {"rope_scaling": _llama3(scaling), "yarn_only_types": kinds}


def _llama3(scaling: Llama3Scaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def _transformers_text(text: TextConfig) -> dict[str, Any]:
    layers = text.num_layers
    ropes = {}
    for kind in _used_kinds(text):
        rope = text.rope_of(kind)
        scaling = {"rope_type": "default"} if rope.scaling is None else _llama3(rope.scaling)
        ropes[kind] = {"rope_theta": rope.theta, "partial_rotary_factor": rope.rotary_factor, **scaling}
    return {
        "num_key_value_heads": text.num_kv_groups,
        "num_sliding_attention_heads": text.num_sliding_heads,
        "query_pre_attn_scalar": text.head_dim,
        "layer_types": list(text.layer_types[:layers]),
        "mtp_layer_types": list(text.layer_types[layers:]) or None,
        "mlp_layer_types": ["sparse" if layer in text.moe_layers else "dense" for layer in range(layers)],
        "mtp_mlp_layer_types": [MTP_KIND] * text.num_mtp_layers or None,
        "rope_parameters": ropes,
        "n_routed_experts": text.num_experts,
        "num_experts_per_tok": text.top_k,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "output_router_logits": False,
        "use_cache": True,
    }
