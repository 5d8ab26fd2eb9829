"""Layer specs of the text decoder: which part sits in which of megatron's slots, layer by layer.

TransformerBlock
  layers[i]: DecoderLayer (TransformerLayer)
    input_layernorm     ZeroCentredRMSNorm
    self_attention      HybridSelfAttention (full or sliding, its own number of heads)
    pre_mlp_layernorm   ZeroCentredRMSNorm
    mlp                 DenseMLP, or MixtureOfExperts (Router, GroupedExperts, SharedExpert)
  final_layernorm       ZeroCentredRMSNorm
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor

from step37_lit.megatron.core_attention import AttentionBackend, core_attention_of
from step37_lit.megatron.dispatch import MixtureOfExperts
from step37_lit.megatron.norm import ZeroCentredRMSNorm
from step37_lit.megatron.part_spec import PartSpec
from step37_lit.megatron.transformer_config import Step37TransformerConfig
from step37_lit.model.attention import HybridAttentionSubmodules, HybridSelfAttention
from step37_lit.model.experts import DenseMLP, GroupedExperts, Router, SharedExpert
from step37_lit.model.recompute import RecomputeMode, run

_LINEARS = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class DecoderLayer(TransformerLayer):
    """megatron's layer.

    Args:
        recompute: Keep the input only, and compute the layer again in the backward pass.
    """

    def __init__(self, *args: Any, recompute: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recompute = recompute

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        # By position: autograd's hooks (offloading, counting) see what is kept by position only.
        return run(self.recompute, super().forward, hidden_states, *args, **kwargs)


def decoder_block_spec(
    config: Step37TransformerConfig,
    pg_collection: ProcessGroupCollection,
    vp_stage: int | None = None,
    attention_backend: AttentionBackend = "auto",
) -> TransformerBlockSubmodules:
    """Specs of the layers that this rank's pipeline stage (and virtual stage `vp_stage`) holds."""
    stage = get_pg_rank(pg_collection.pp)
    first = get_transformer_layer_offset(config, vp_stage, stage)
    layers = range(first, first + get_num_layers_to_build(config, vp_stage, stage))
    return TransformerBlockSubmodules(
        layer_specs=[
            decoder_layer_spec(config, layer, pg_collection, attention_backend, config.recompute.of_layer(number))
            for number, layer in enumerate(layers)
        ],
        layer_norm=ZeroCentredRMSNorm,
    )


def decoder_layer_spec(
    config: Step37TransformerConfig,
    layer: int,
    pg_collection: ProcessGroupCollection,
    attention_backend: AttentionBackend,
    recompute: RecomputeMode,
) -> ModuleSpec:
    """Spec of decoder layer `layer` (0-based over the whole model)."""
    parts = recompute == "selective"
    return ModuleSpec(
        module=DecoderLayer,
        params={"recompute": recompute == "full"},
        submodules=TransformerLayerSubmodules(
            input_layernorm=ZeroCentredRMSNorm,
            self_attention=_attention_spec(attention_backend, parts),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=ZeroCentredRMSNorm,
            mlp=_feed_forward_spec(config, layer, pg_collection, parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _attention_spec(backend: AttentionBackend, recompute: bool) -> ModuleSpec:
    return ModuleSpec(
        module=HybridSelfAttention,
        params={"recompute": recompute},
        submodules=HybridAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            linear_gate=ColumnParallelLinear,
            core_attention=core_attention_of(backend),
            linear_proj=RowParallelLinear,
            q_layernorm=ZeroCentredRMSNorm,
            k_layernorm=ZeroCentredRMSNorm,
        ),
    )


def _feed_forward_spec(
    config: Step37TransformerConfig, layer: int, pg_collection: ProcessGroupCollection, recompute: bool
) -> PartSpec:
    text = config.step37.text
    shared = {"limit": text.swiglu_limits_shared[layer], "recompute": recompute}
    routed = {"limit": text.swiglu_limits[layer], "recompute": recompute}
    if layer not in text.moe_layers:
        return PartSpec(module=DenseMLP, submodules=_LINEARS, params={**shared, "tp_group": pg_collection.tp})
    return PartSpec(
        module=MixtureOfExperts,
        submodules=MoESubmodules(
            router=Router,
            experts=PartSpec(module=GroupedExperts, params=routed),
            shared_experts=PartSpec(module=SharedExpert, submodules=_LINEARS, params=shared),
        ),
        params={"pg_collection": pg_collection},
    )
