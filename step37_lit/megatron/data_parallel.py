"""megatron's DistributedDataParallel as every user of it in this project makes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.transformer.moe.router import TopKRouter

from step37_lit.megatron import cuda_names, vision_parallel
from step37_lit.megatron.chunks import ModelChunks, chunks_of
from step37_lit.model.step37_model import Step37Model


def wrap(model: Step37Model | ModelChunks, overlap: bool = False) -> list[DistributedDataParallel]:
    """Contiguous buffers of parameters and gradients; each data-parallel rank keeps its share of the optimizer's state.

    Args:
        model: A stage of `build_stage`; its config learns how gradients are finalised.
        overlap: Reduce gradients while the last backward pass runs, and gather the weights while the next forward pass
            does (until then a rank has only its own share of them: see `gather_weights`). Every rank must use the
            same parameters in every step.

    Returns:
        One for each chunk.
    """
    config = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    with cuda_names.cpu_for_cuda():
        chunks = [DistributedDataParallel(model.config, config, chunk) for chunk in chunks_of(model)]
    for ddp in chunks:
        _divide_repeated_gradients(ddp)
        for group in ddp.bucket_groups + ddp.expert_parallel_bucket_groups:
            if not overlap:  # what is overlapped is waited for
                _skip_exchange_with_oneself(group)
    waits = [ddp.no_sync for ddp in chunks]
    model.config.no_sync_func = (waits if len(waits) > 1 else waits[0]) if overlap else None
    model.config.finalize_model_grads_func = _finalize_gradients
    model.config.grad_scale_func = None
    return chunks


def _divide_repeated_gradients(ddp: DistributedDataParallel) -> None:
    """Tensor ranks without sequence parallelism send the same tokens to the experts, which sum over all that come."""
    if ddp.config.sequence_parallel:
        return
    for group in ddp.expert_parallel_bucket_groups:
        for bucket in group.buckets:
            bucket.gradient_scaling_factor /= ddp.config.tensor_model_parallel_size


def gather_weights(chunks: Sequence[DistributedDataParallel]) -> None:
    """Completes the weights of every rank behind a step that overlaps; collective."""
    for ddp in chunks:
        if ddp.ddp_config.overlap_param_gather:
            ddp.start_param_sync(force_sync=True)


@torch.no_grad()
def _finalize_gradients(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
    """megatron's reduction of the gradients, and that of the tower and projector over tensor ranks.

    A frozen router keeps its bias too, which moves by the load alone.
    """
    routers = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter) and m.enable_expert_bias]
    kept = [(router.expert_bias, router.expert_bias.clone()) for router in routers if not router.weight.requires_grad]
    finalize_model_grads(chunks, *args, **kwargs)
    for chunk in chunks:
        vision_parallel.sum_gradients((chunk.module.vision_model, chunk.module.align_projector))
    for bias, value in kept:
        bias.copy_(value)


def _skip_exchange_with_oneself(bucket_group: Any) -> None:
    """A group of one rank has nothing to exchange, but gloo copies both buffers through a third one for it.

    Without it `benchmarks/train_step.py` went from 1.26 to 1.47.
    """
    alone = dist.get_world_size(bucket_group.intra_distributed_optimizer_instance_group) == 1
    scaled = any(bucket.gradient_scaling_factor != 1.0 for bucket in bucket_group.buckets)
    if alone and not scaled:
        bucket_group.start_param_sync = _nothing
        bucket_group.start_grad_sync = _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
