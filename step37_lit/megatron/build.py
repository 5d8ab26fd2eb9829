"""From a `Step37Config` to a `Step37Model` on this rank, or to several with virtual pipeline stages."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from step37_lit.config import Step37Config
from step37_lit.megatron import cuda_names
from step37_lit.megatron.chunks import ModelChunks
from step37_lit.megatron.core_attention import AttentionBackend
from step37_lit.megatron.initialize import initialize_weights, mark_tensor_parallel_weights
from step37_lit.megatron.layout import ParallelLayout
from step37_lit.megatron.transformer_config import Step37TransformerConfig, to_megatron
from step37_lit.model.mtp import mtp_layer_specs
from step37_lit.model.recompute import Recompute
from step37_lit.model.step37_model import Step37Model
from step37_lit.model.text_decoder import decoder_block_spec


def build_stage(
    config: Step37Config,
    layout: ParallelLayout | None = None,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute | None = None,
    seed: int | None = 0,
) -> Step37Model | ModelChunks:
    """All of the model that this rank's pipeline stage holds; arguments as of `build_model`."""
    layout = layout if layout is not None else ParallelLayout()
    if layout.virtual_pipeline is None:
        return build_model(config, layout, dtype, recompute=recompute, seed=seed)
    # One configuration for all chunks: the schedule and the reduction of gradients ask the first one's.
    transformer_config = to_megatron(config, layout, dtype, recompute)
    return ModelChunks(_build(transformer_config, layout, chunk, seed=seed) for chunk in range(layout.virtual_pipeline))


def build_model(
    config: Step37Config,
    layout: ParallelLayout | None = None,
    dtype: torch.dtype = torch.float32,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    vp_stage: int | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    attention_backend: AttentionBackend = "auto",
    recompute: Recompute | None = None,
) -> Step37Model:
    """This rank's part of the model, on its device; `process.initialize` must have run.

    Args:
        config: The model.
        layout: How it is split; must be the one that the parallel groups were made for.
        dtype: Of the parameters; the router's bias is always fp32.
        pre_process: Whether this chunk has the embedding and the vision tower; None asks the pipeline stage.
        post_process: Whether this chunk has the output head; None asks the pipeline stage.
        vp_stage: Virtual pipeline stage of this chunk; needed where the layout has such.
        seed: Of the initial weights, the same on every rank; None leaves them as allocated (for loading).
        device: None is this rank's accelerator, or the CPU; "meta" allocates nothing.
        attention_backend: See `core_attention_of`.
        recompute: What is computed again in the backward pass; None is nothing.
    """
    layout = layout if layout is not None else ParallelLayout()
    transformer_config = to_megatron(config, layout, dtype, recompute)
    return _build(transformer_config, layout, vp_stage, pre_process, post_process, seed, device, attention_backend)


def _build(
    config: Step37TransformerConfig,
    layout: ParallelLayout,
    vp_stage: int | None,
    pre_process: bool | None = None,
    post_process: bool | None = None,
    seed: int | None = 0,
    device: torch.device | str | None = None,
    attention_backend: AttentionBackend = "auto",
) -> Step37Model:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    piece = (vp_stage or 0) * layout.pipeline + get_pg_rank(groups.pp)
    device = torch.device(device) if device is not None else torch.device(torch.cuda.current_device())
    with cuda_names.cpu_for_cuda(), device:
        model = Step37Model(
            language_transformer_config=config,
            language_transformer_layer_spec=decoder_block_spec(config, groups, vp_stage, attention_backend),
            vision_transformer_config=config.step37.vision,
            pre_process=piece == 0 if pre_process is None else pre_process,
            post_process=piece == layout.pieces - 1 if post_process is None else post_process,
            pg_collection=groups,
            mtp_block_spec=mtp_layer_specs(config, groups, attention_backend),
            vp_stage=vp_stage,
        )
    mark_tensor_parallel_weights(model)
    if seed is not None and device.type != "meta":
        initialize_weights(model, seed)
    return model
