"""`Step37Model`: vision tower, fusion and text decoder as one `MegatronModule`.

T = tokens of the pack, H = hidden, V = vocabulary, P = features of an image.

    forward(input_ids [1, T], images, cu_seqlens)
      |- forward_head                                     first pipeline stage
      |    |- embedding                  words            [T, 1, H]
      |    |- _encode_images_for_insert  vision_model     [N, P, 4 x width], this rank's share of the images
      |    |- align_projector            features         [N, P, H], gathered
      |    `- insert_features            fused            [T, 1, H]
      |- rotary_table                    positions restart in each sub-sequence
      |- decoder                         TransformerBlock [T, 1, H]
      |- output_layer                    last stage       logits [1, T, V], or loss per token [1, T]
      `- mtp                             last stage       the same of tokens further ahead, where asked for
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor, nn

from step37_lit.batch import ImageForInsert
from step37_lit.config import VisionConfig
from step37_lit.megatron.context import context_borders, split_row
from step37_lit.megatron.head import loss_per_token, scatter_to_sequence_ranks
from step37_lit.megatron.transformer_config import Step37TransformerConfig
from step37_lit.megatron.vision_parallel import SpreadImages
from step37_lit.model.image_insert import insert_features
from step37_lit.model.kv_cache import KVCache
from step37_lit.model.mtp import MTPBlock
from step37_lit.model.packing import pack_borders, restarting_positions
from step37_lit.model.rotary import rotary_table
from step37_lit.model.vision_tower import VisionTower


class Step37Model(MegatronModule):
    """Step-3.7 on megatron-core.

    Args:
        language_transformer_config: megatron's configuration of the decoder (`to_megatron`).
        language_transformer_layer_spec: Specs of this stage's layers (`decoder_block_spec`).
        vision_transformer_config: The vision tower.
        parallel_output: Leave the logits split over the tensor ranks.
        pre_process: This stage has the embedding (and the vision tower).
        post_process: This stage has the output head.
        add_encoder: Build the vision tower where `pre_process`.
        add_decoder: Build the text decoder.
        pg_collection: megatron's process groups; None takes the global ones.
        mtp_block_spec: Specs of the MTP layers (`mtp_layer_specs`), built where `post_process`; None builds none.
        vp_stage: Virtual pipeline stage of this chunk.
    """

    def __init__(
        self,
        language_transformer_config: Step37TransformerConfig,
        language_transformer_layer_spec: TransformerBlockSubmodules,
        vision_transformer_config: VisionConfig,
        parallel_output: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
        add_encoder: bool = True,
        add_decoder: bool = True,
        pg_collection: ProcessGroupCollection | None = None,
        mtp_block_spec: list[ModuleSpec] | None = None,
        vp_stage: int | None = None,
    ):
        super().__init__(config=language_transformer_config)
        config = language_transformer_config
        self.pg_collection = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.step37 = config.step37
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        # What megatron's schedules and finalize_model_grads ask a model for:
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.has_mtp = mtp_block_spec is not None  # on every stage: the first ones hand on what the last one needs
        self.vision_model: VisionTower | None = None
        self.align_projector: nn.Linear | None = None
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=config.step37.text.vocab_size,
                max_sequence_length=config.step37.text.max_position,
                position_embedding_type="rope",
                scatter_to_sequence_parallel=False,  # images go in first
                tp_group=self.pg_collection.tp,
            )
            if add_encoder:
                self.vision_model = VisionTower(vision_transformer_config, config.recompute.vision)
                self.vision_model.to(config.params_dtype)
                self.align_projector = nn.Linear(
                    vision_transformer_config.output_dim,
                    config.hidden_size,
                    bias=config.step37.projector_bias,
                    dtype=config.params_dtype,
                )
        self.decoder: TransformerBlock | None = None
        if add_decoder:
            self.decoder = TransformerBlock(
                config=config,
                spec=language_transformer_layer_spec,
                pre_process=pre_process,
                post_process=post_process,
                pg_collection=self.pg_collection,
                vp_stage=vp_stage,
            )
        if post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                config.step37.text.vocab_size,
                config=config,
                init_method=None,
                bias=False,
                gather_output=not parallel_output,
                tp_group=self.pg_collection.tp,
            )
            if mtp_block_spec is not None:  # megatron's schedules look for an attribute of this name
                self.mtp = MTPBlock(config, mtp_block_spec, self.pg_collection, vp_stage)

    def forward(
        self,
        input_ids: Tensor,
        images: list[ImageForInsert] | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        max_seq_len: int | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_params: Any = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        inference_context: KVCache | None = None,
        runtime_gather_output: bool | None = None,
        with_mtp: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        """One pack through the model.

        Args:
            input_ids: [1, T] int64, the samples of the pack behind each other.
            images: Images in the order of their start tokens; entries with `image_features` are not encoded again.
            cu_seqlens: [n + 1] int32, borders of the sub-sequences, 0 to T. With neither this nor
                `packed_seq_params` the row is one sequence.
            position_ids: [1, T] int64; None restarts at 0 in each sub-sequence, or goes on where a row of
                `inference_context` ends.
            attention_mask: Must be None: attention is causal inside the borders.
            labels: [1, T] int64, shifted already; asks for the loss.
            loss_mask: [1, T]; where it is 0 the loss is 0 and the output head is not computed.
            max_seq_len: Longest sub-sequence; None is counted.
            packed_seq_params: megatron's form of the borders; must agree with `cu_seqlens` where both are given.
            inference_params: Must be None: `inference_context` is its successor.
            inference_context: A `KVCache`: the first pass fills it with a pack of prompts and gives logits of each
                sub-sequence's last token only, every further one adds a few tokens to each row.
            extra_block_kwargs: Further arguments of the `TransformerBlock`.
            runtime_gather_output: Gather the logits over the tensor ranks, whatever `parallel_output` says.
            with_mtp: Also what the MTP layers give, layer by layer behind the main head's; nothing where there are
                none. Layer k (0-based) predicts token t + k + 2 at position t, and has a loss where that token is of
                the same sub-sequence and `loss_mask` has it learnt. With an `inference_context` the layers do not
                run, and the last stage leaves what they read to it (`KVCache.mtp_inputs`).

        Returns:
            On the last stage the loss [1, T] in fp32 where `labels` are given, else logits [1, T, V (/ tensor
            ranks)] ([1, n, V] for the prompts of an `inference_context`), with the MTP layers' [1 + layers, ...]; on
            other stages the hidden states [T, 1, H] for the next ([2T, 1, H] with the embeddings, where the MTP layers
            need them).
            Where context ranks share the pack, T is this rank's share here (`megatron.context.split_row`); arguments
            are always of the whole pack.

        Raises:
            ValueError: shapes or borders that do not fit; `ImageInsertError` where images and text do not.
        """
        refused = {"attention_mask": attention_mask, "inference_params": inference_params, **kwargs}
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"{name}: expected None, found {type(value).__name__}")
        with_mtp = with_mtp and self.has_mtp
        packed = pack_borders(input_ids, cu_seqlens, max_seq_len, packed_seq_params)
        if inference_context is not None:
            inference_context.begin(packed)
        if position_ids is None:
            if inference_context is None:
                position_ids = restarting_positions(packed.cu_seqlens_q, input_ids.shape[1])
            else:
                position_ids = inference_context.positions

        table = rotary_table(self.step37.text, split_row(position_ids, dim=1))
        packed = context_borders(packed)
        hidden: Any = None  # later stages take theirs from set_input_tensor
        embeddings: Any = None
        if self.pre_process:
            hidden = scatter_to_sequence_ranks(self.forward_head(input_ids, images, position_ids), self.config)
            embeddings = hidden
        elif with_mtp and self.decoder is not None:
            received, embeddings = self.decoder.input_tensor.chunk(2)
            self.decoder.set_input_tensor(received)
        if self.decoder is not None:
            hidden = self.decoder(
                hidden_states=hidden,
                attention_mask=None,
                rotary_pos_emb=table,
                packed_seq_params=packed,
                inference_context=inference_context,
                **(extra_block_kwargs or {}),
            )
        if inference_context is not None:
            inference_context.end()
        if not self.post_process:
            return torch.cat((hidden, embeddings)) if with_mtp else hidden
        if inference_context is not None:
            if with_mtp:  # their turn comes when the next token is chosen
                inference_context.mtp_inputs, with_mtp = (hidden, embeddings, packed), False
            hidden = inference_context.answered(hidden)
        ahead = self.mtp(embeddings, hidden, table, packed) if with_mtp else []
        if labels is not None:
            losses = loss_per_token(self.output_layer, hidden, labels, loss_mask)
            return torch.cat((losses, *self.mtp.losses(ahead, labels, loss_mask, packed))) if with_mtp else losses
        gather = self.output_layer.gather_output if runtime_gather_output is None else runtime_gather_output
        logits, _ = self.output_layer(hidden, runtime_gather_output=gather)
        if with_mtp:
            logits = torch.cat((logits, *self.mtp.logits(ahead, gather)), dim=1)
        return logits.transpose(0, 1).contiguous()

    def forward_head(
        self, input_ids: Tensor, images: list[ImageForInsert] | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Words and images fused: [T, 1, H], whole on every tensor rank."""
        words = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if not images:
            return insert_features(words, input_ids, [], [], self.step37.tokens)
        if self.align_projector is None:
            raise ValueError(f"images: expected none (the model has no vision tower), found {len(images)} entries")
        spread = SpreadImages(images, self.step37.vision)
        own = [self.align_projector(entry.image_features) for entry in self._encode_images_for_insert(spread.own)]
        features = spread.gather(own, like=self.align_projector.weight, trains=self._features_train(images))
        return insert_features(words, input_ids, images, features, self.step37.tokens)

    def _features_train(self, images: list[ImageForInsert]) -> bool:
        """Whether projected features need a gradient."""
        given = (entry.image_features for entry in images if entry.image_features is not None)
        weights = (
            p for part in (self.vision_model, self.align_projector) if part is not None for p in part.parameters()
        )
        return any(tensor.requires_grad for tensor in (*given, *weights))

    def _encode_images_for_insert(self, images: list[ImageForInsert]) -> list[ImageForInsert]:
        """Entries with `image_features` [N, P, output_dim] in place of pixels where they had none.

        Images of one size go through the tower together. The entries given are left as they are, so that a pack can
        be used again after its graph is gone.
        """
        pixels: dict[int, Tensor] = {}
        for i, entry in enumerate(images):
            if entry.image_features is None:
                if entry.images is None:
                    raise ValueError(f"images[{i}]: expected pixels or features, found neither")
                pixels[i] = entry.images
        if not pixels:
            return list(images)
        if self.vision_model is None:
            raise ValueError("images: expected features (this model has no vision tower), found pixels")
        by_size: dict[tuple, list[int]] = {}
        for i, values in pixels.items():
            by_size.setdefault((*values.shape[1:], values.dtype), []).append(i)
        encoded = list(images)
        for members in by_size.values():
            features = self.vision_model(torch.cat([pixels[i] for i in members]))
            for i, own in zip(members, features.split([len(pixels[i]) for i in members]), strict=True):
                encoded[i] = dataclasses.replace(images[i], images=None, image_features=own)
        return encoded

    def freeze(
        self,
        freeze_language_model: bool = False,
        freeze_vision_model: bool = False,
        freeze_vision_projection: bool = False,
    ) -> None:
        """Takes parts out of training (any combination); parts that are not named are left as they are."""
        parts: list[nn.Module | None] = []
        if freeze_language_model:
            parts += [self._modules.get(name) for name in ("embedding", "decoder", "output_layer", "mtp")]
        if freeze_vision_model:
            parts.append(self.vision_model)
        if freeze_vision_projection:
            parts.append(self.align_projector)
        for part in parts:
            if part is not None:
                part.requires_grad_(False)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hands the hidden states of the previous pipeline stage to the decoder."""
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if len(tensors) != 1:
            raise ValueError(f"input_tensor: expected 1 tensor, found {len(tensors)}")
        if self.decoder is not None:
            self.decoder.set_input_tensor(tensors[0])

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding on the first stage, the output head on the last; they are not tied."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        return self.output_layer.weight if self.post_process else None
