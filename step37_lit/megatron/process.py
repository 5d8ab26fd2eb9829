"""Process group and megatron's parallel state: one call, also for one process without a launcher."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from step37_lit.megatron import cuda_names
from step37_lit.megatron.layout import ParallelLayout


def initialize(layout: ParallelLayout | None = None, seed: int = 0) -> None:
    """Makes what megatron's modules need before they are built; keeps what is there already.

    * the CUDA names, where CUDA is absent;
    * the default process group: one process that no launcher started gets a group of its own;
    * megatron's parallel groups for `layout` (default: one rank) and its random-number tracker.

    Raises:
        RuntimeError: the parallel groups exist already with another layout; both are named.
    """
    layout = layout if layout is not None else ParallelLayout()
    cuda_names.install()
    if not dist.is_initialized():
        _init_process_group()
    with cuda_names.cpu_for_cuda():
        if parallel_state.model_parallel_is_initialized():
            _check_same(layout)
            return
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
            context_parallel_size=layout.context,
            expert_model_parallel_size=layout.expert,
            expert_tensor_parallel_size=layout.expert_tensor,
        )
        model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Undoes `initialize`: for notebooks and tests that change the layout in one process."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _init_process_group() -> None:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _check_same(layout: ParallelLayout) -> None:
    found = {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }
    wanted = {name: getattr(layout, name) for name in found}
    if found != wanted:
        raise RuntimeError(f"parallel groups exist for {found}, but {wanted} is asked for: call process.shutdown first")
