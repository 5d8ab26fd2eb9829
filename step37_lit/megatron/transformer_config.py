"""One function translates `Step37Config` and a layout into megatron's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from step37_lit import determinism
from step37_lit.config import Step37Config
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.model.recompute import Recompute


@dataclass
class Step37TransformerConfig(TransformerConfig):
    """megatron's configuration of the text decoder, together with the config that it was made from and what is
    recomputed (by this project's own layers: megatron's switches would not reach them)."""

    step37: Step37Config = field(default_factory=Step37Config)
    recompute: Recompute = field(default_factory=Recompute)


def to_megatron(
    config: Step37Config,
    layout: ParallelLayout | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute | None = None,
) -> Step37TransformerConfig:
    """megatron's fields for the text decoder of `config`.

    What differs from layer to layer (heads, window, rotary embedding, clamps, experts) is not here but in the layer
    specs: megatron hands one configuration to all layers.
    """
    layout = layout if layout is not None else ParallelLayout()
    text = config.text
    return Step37TransformerConfig(
        step37=config,
        recompute=recompute if recompute is not None else Recompute(),
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_groups,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.norm_eps,
        layernorm_zero_centered_gamma=True,
        qk_layernorm=True,  # finalize_model_grads sums the gradients of these norms over the tensor ranks
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Weights are initialised by name (see initialize.py), so that every layout starts from the same ones.
        perform_initialization=False,
        use_cpu_initialization=True,
        calculate_per_token_loss=True,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        pipeline_model_parallel_layout=_pieces(layout, text.num_layers),
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.sequence_parallel,
        variable_seq_lengths=layout.pipeline > 1,
        # gloo and NCCL both swap messages when previous and next stage are the same peer (PP2 with virtual stages).
        batch_p2p_comm=False,
        # With virtual stages and packs of different lengths, exchanging shapes without overlap fails (always batched).
        # Outputs are kept then (deallocate_pipeline_outputs stays off): gloo may still be sending them.
        overlap_p2p_comm=layout.virtual_pipeline is not None,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=determinism.enabled(),
        **_expert_fields(config),
    )


def _pieces(layout: ParallelLayout, num_layers: int) -> list[list[str]] | None:
    """megatron's description of what each pipeline stage (and virtual stage) holds, in the model's order."""
    if layout.pipeline == 1:
        return None
    pieces = [["decoder"] * count for count in layout.layers_of_pieces(num_layers)]
    pieces[0].insert(0, "embedding")
    pieces[-1].append("loss")
    return pieces


def _expert_fields(config: Step37Config) -> dict:
    text = config.text
    if not text.moe_layers:
        return {"moe_token_dispatcher_type": "alltoall"}  # variable_seq_lengths demands it of dense models too
    return {
        "num_moe_experts": text.num_experts,
        "moe_ffn_hidden_size": text.expert_ffn_size,
        "moe_shared_expert_intermediate_size": text.shared_expert_ffn_size,
        "moe_router_topk": text.top_k,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": text.router_scaling_factor,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": text.router_bias_update_rate,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_permute_fusion": False,
        "moe_shared_expert_overlap": False,
    }
