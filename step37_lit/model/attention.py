"""Self-attention of one decoder layer, for megatron's `self_attention` slot.

T = tokens of the pack, H = hidden, G = KV groups, N = query heads, D = head_dim (of this tensor rank where split).

    hidden [T, 1, H]
      |- linear_qkv  -> q [T, N, D], k [T, G, D], v [T, G, D]
      |    q_layernorm, k_layernorm (over D), rotate
      |    core_attention (causal inside each sub-sequence, windowed on sliding layers) -> [T, N, D]
      |- linear_gate -> sigmoid, one scalar a head, multiplies that head's output
      `- linear_proj -> [T, 1, H]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from step37_lit.config import ATTENTION_KINDS
from step37_lit.megatron.transformer_config import Step37TransformerConfig
from step37_lit.model import recompute
from step37_lit.model.kv_cache import KVCache
from step37_lit.model.rotary import rotate


@dataclass
class HybridAttentionSubmodules:
    """Parts of `HybridSelfAttention`, chosen by the layer specs."""

    linear_qkv: type
    linear_gate: type
    core_attention: type
    linear_proj: type
    q_layernorm: ModuleSpec | type
    k_layernorm: ModuleSpec | type


class HybridSelfAttention(MegatronModule):
    """Grouped-query attention with q/k norm, rotary embedding of the layer's kind and a gate a head.

    Args:
        config: megatron's configuration, which carries the `Step37Config`.
        submodules: The parts.
        layer_number: 1-based over the whole decoder; decides full or sliding attention and the number of heads.
        pg_collection: megatron's process groups.
        cp_comm_type: Handed on to the core attention.
        recompute: Compute the core attention again in the backward pass.
        name: Handed over by megatron-core since 0.18; not used.
    """

    def __init__(
        self,
        config: Step37TransformerConfig,
        submodules: HybridAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
        recompute: bool = False,
        name: str | None = None,
    ):
        super().__init__(config=config)
        text = config.step37.text
        kind = text.layer_types[layer_number - 1]
        heads, groups, head_dim = text.heads_of(layer_number - 1), text.num_kv_groups, text.head_dim
        self.layer_number = layer_number
        self.window = text.sliding_window if kind == "sliding_attention" else None
        self.head_dim, self.recompute = head_dim, recompute
        self.queries_per_group = heads // groups
        self.rotary_row = ATTENTION_KINDS.index(kind)
        self.rotary_pairs = text.rotary_dim(kind) // 2

        column = {
            "config": config,
            "init_method": None,
            "gather_output": False,
            "bias": False,
            "skip_bias_add": False,
            "tp_group": pg_collection.tp,
        }
        self.linear_qkv = submodules.linear_qkv(config.hidden_size, (heads + 2 * groups) * head_dim, **column)
        self.linear_gate = submodules.linear_gate(config.hidden_size, heads, **column)
        self.q_layernorm = build_module(submodules.q_layernorm, config=config, hidden_size=head_dim, eps=text.norm_eps)
        self.k_layernorm = build_module(submodules.k_layernorm, config=config, hidden_size=head_dim, eps=text.norm_eps)
        self.core_attention = submodules.core_attention(
            softmax_scale=head_dim**-0.5,
            window=self.window,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )
        self.linear_proj = submodules.linear_proj(
            heads * head_dim,
            config.hidden_size,
            config=config,
            init_method=None,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=pg_collection.tp,
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rotary_pos_emb: Tensor,
        packed_seq_params: PackedSeqParams,
        inference_context: KVCache | None = None,
        **unused_by_step37: Any,
    ) -> tuple[Tensor, None]:
        """Attention over one pack.

        Args:
            hidden_states: [T, 1, H] ([T / tensor ranks, 1, H] under sequence parallelism).
            attention_mask: Not used: sub-sequences and windows are masked from `packed_seq_params`.
            rotary_pos_emb: The pack's `rotary_table`.
            packed_seq_params: Borders of the sub-sequences.
            inference_context: Keeps keys and values where sequences are continued.

        Returns:
            [T, 1, H] and no bias.
        """
        q, k, v = self._query_key_value(hidden_states)
        cos, sin = rotary_pos_emb[self.rotary_row, :, :, : self.rotary_pairs]
        q = rotate(self.q_layernorm(q), cos, sin)
        k = rotate(self.k_layernorm(k), cos, sin)
        if inference_context is None:
            attended = recompute.run(self.recompute, self.core_attention, q, k, v, packed_seq_params)
        else:
            own = (self.layer_number, self.window, self.core_attention)
            attended = inference_context.attend(*own, q, k, v, packed_seq_params)
        gate = torch.sigmoid(self.linear_gate(hidden_states)[0].float()).to(attended.dtype)
        attended = attended * gate.view(*attended.shape[:2], 1)
        return self.linear_proj(attended.flatten(1).unsqueeze(1))

    def _query_key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, N, D], k and v [T, G, D]; `linear_qkv` holds, for each group, its queries, then key, then value."""
        qkv, _ = self.linear_qkv(hidden_states)
        grouped = qkv.view(qkv.shape[0], -1, self.queries_per_group + 2, self.head_dim)
        q, k, v = grouped.split([self.queries_per_group, 1, 1], dim=2)
        return q.reshape(qkv.shape[0], -1, self.head_dim), k.squeeze(2), v.squeeze(2)
