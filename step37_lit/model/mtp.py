"""Multi-token prediction: layers behind the decoder that predict tokens further ahead, each with a head of its own.

T = tokens of the pack, H = hidden, V = vocabulary. Layer k (0-based) at position t predicts token t + k + 2:

    embeddings [T, 1, H] of tokens t + k + 1, images in them     hidden [T, 1, H], the decoder's or layer k - 1's
      `- enorm ----------------- concat [T, 1, 2H] --------------- hnorm
                                   |- eh_proj             [T, 1, H]
                                   |- transformer_layer   as the decoder's, sliding attention, dense
                                   `- final_layernorm  -> hidden of layer k + 1
                                        `- output_layer   logits [T, 1, V]

Inputs, labels and loss masks move ahead inside each sub-sequence of the pack; positions keep their own numbers, since
rotary embedding only knows distances. Where a sub-sequence has no token that far ahead, the input is zero and there is
no loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import get_pg_rank
from torch import Tensor, nn

from step37_lit.megatron.core_attention import AttentionBackend
from step37_lit.megatron.head import gather_from_sequence_ranks, loss_per_token, scatter_to_sequence_ranks
from step37_lit.megatron.norm import ZeroCentredRMSNorm
from step37_lit.megatron.transformer_config import Step37TransformerConfig
from step37_lit.model.kv_cache import KVCache
from step37_lit.model.packing import following
from step37_lit.model.text_decoder import decoder_layer_spec


class EmbeddingHiddenProjection(nn.Module):
    """`eh_proj`: [.., 2H] -> [.., H], whole on every tensor rank.

    Under sequence parallelism each rank projects its own tokens, so nothing is computed twice and nothing is sent; a
    split matrix would gather rows twice as wide as the residual stream.
    """

    def __init__(self, config: Step37TransformerConfig):
        super().__init__()
        hidden = config.hidden_size
        self.weight = nn.Parameter(torch.empty(hidden, 2 * hidden, dtype=config.params_dtype))
        # megatron sums gradients so marked over the tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@dataclass
class MTPLayerSubmodules:
    """Parts of `MTPLayer`. (Fields of megatron's own class changed their names from version to version.)"""

    enorm: ModuleSpec | type
    hnorm: ModuleSpec | type
    eh_proj: ModuleSpec | type
    transformer_layer: ModuleSpec
    final_layernorm: ModuleSpec | type


class MTPLayer(MegatronModule):
    """One layer and its head.

    Args:
        config: megatron's configuration.
        submodules: The parts.
        layer_number: 1-based over the decoder and the MTP layers.
        pg_collection: megatron's process groups.
        vp_stage: Virtual pipeline stage of this chunk.
    """

    def __init__(
        self,
        config: Step37TransformerConfig,
        submodules: MTPLayerSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        norm = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.enorm = build_module(submodules.enorm, **norm)
        self.hnorm = build_module(submodules.hnorm, **norm)
        self.eh_proj = build_module(submodules.eh_proj, config=config)
        before = get_transformer_layer_offset(config, vp_stage, get_pg_rank(pg_collection.pp))
        self.transformer_layer = build_module(
            submodules.transformer_layer,
            config=config,
            layer_number=layer_number - before,  # megatron adds the layers of the stages before
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.final_layernorm = build_module(submodules.final_layernorm, **norm)
        self.output_layer = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            config.step37.text.vocab_size,
            config=config,
            init_method=None,
            bias=False,
            gather_output=False,
            tp_group=pg_collection.tp,
        )

    @property
    def mtp_model_layer(self) -> nn.Module:
        """`transformer_layer` under the name by which megatron-core looks for routers since 0.17."""
        return self.transformer_layer

    def forward(
        self,
        embeddings: Tensor,
        hidden: Tensor,
        rotary_table: Tensor,
        packed: PackedSeqParams,
        inference_context: KVCache | None = None,
    ) -> Tensor:
        """[T, 1, H], normed ([T / tensor ranks, 1, H] of all under sequence parallelism)."""
        joined = torch.cat((self.enorm(embeddings), self.hnorm(hidden)), dim=-1)
        hidden, _ = self.transformer_layer(
            hidden_states=self.eh_proj(joined),
            attention_mask=None,
            rotary_pos_emb=rotary_table,
            packed_seq_params=packed,
            inference_context=inference_context,
        )
        return self.final_layernorm(hidden)


class MTPBlock(MegatronModule):
    """The MTP layers one behind the other.

    Args:
        config: megatron's configuration.
        specs: Of the layers (`mtp_layer_specs`).
        pg_collection: megatron's process groups.
        vp_stage: Virtual pipeline stage of this chunk.
    """

    def __init__(
        self,
        config: Step37TransformerConfig,
        specs: list[ModuleSpec],
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ):
        super().__init__(config=config)
        self.layers = nn.ModuleList(
            build_module(layer, config=config, layer_number=number, pg_collection=pg_collection, vp_stage=vp_stage)
            for number, layer in enumerate(specs, start=config.num_layers + 1)
        )

    def forward(
        self, embeddings: Tensor, hidden: Tensor, rotary_table: Tensor, packed: PackedSeqParams
    ) -> list[Tensor]:
        """What each layer's head reads.

        Args:
            embeddings: [T, 1, H], words and images that went into the decoder ([T / tensor ranks, 1, H] under sequence
                parallelism).
            hidden: As `embeddings`, behind the decoder's final norm.
            rotary_table: The pack's `rotary_table`.
            packed: Borders of the sub-sequences.

        Returns:
            For each layer a tensor like `hidden`.
        """
        outputs = []
        row = gather_from_sequence_ranks(embeddings, self.config)  # a rank's next token may be another rank's first
        for layer in self.layers:
            row = following(row, packed.cu_seqlens_q)
            hidden = layer(scatter_to_sequence_ranks(row, self.config), hidden, rotary_table, packed)
            outputs.append(hidden)
        return outputs

    def losses(
        self, outputs: list[Tensor], labels: Tensor, loss_mask: Tensor | None, packed: PackedSeqParams
    ) -> list[Tensor]:
        """Each layer's loss per token, [1, T] in fp32, 0 where the sub-sequence has no token that far ahead.

        Args:
            outputs: Of `forward`.
            labels: [1, T] int64 of the main head: the next token.
            loss_mask: [1, T] of the main head, or None for all.
            packed: Borders of the sub-sequences.
        """
        mask = torch.ones_like(labels, dtype=torch.float32) if loss_mask is None else loss_mask
        losses = []
        for layer, hidden in zip(self.layers, outputs, strict=True):
            labels, mask = (following(row[0], packed.cu_seqlens_q)[None] for row in (labels, mask))
            losses.append(loss_per_token(layer.output_layer, hidden, labels, mask))
        return losses

    def logits(self, outputs: list[Tensor], gather_output: bool | None) -> list[Tensor]:
        """Each layer's [T, 1, V (/ tensor ranks)]."""
        heads: list[Any] = [layer.output_layer for layer in self.layers]
        pairs = zip(heads, outputs, strict=True)
        return [head(hidden, runtime_gather_output=gather_output)[0] for head, hidden in pairs]


def mtp_layer_specs(
    config: Step37TransformerConfig,
    pg_collection: ProcessGroupCollection,
    attention_backend: AttentionBackend = "auto",
) -> list[ModuleSpec] | None:
    """Specs of the MTP layers, or None where the config builds none."""
    text = config.step37.text
    if not text.mtp:
        return None
    return [
        ModuleSpec(
            module=MTPLayer,
            submodules=MTPLayerSubmodules(
                enorm=ZeroCentredRMSNorm,
                hnorm=ZeroCentredRMSNorm,
                eh_proj=EmbeddingHiddenProjection,
                transformer_layer=decoder_layer_spec(
                    config, layer, pg_collection, attention_backend, config.recompute.mode
                ),
                final_layernorm=ZeroCentredRMSNorm,
            ),
        )
        for layer in range(text.num_layers, text.total_layers)
    ]
