"""Runs a piece of megatron-core once with every CUDA stand-in and once without each of them.

    python tests/cuda_names_probe.py        prints one JSON object: name left out -> "ok" or the error

Each run is a forked child, so that nothing leaks from one to the next. `tests/test_cuda_names.py` reads the result.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import mappings
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer.moe import token_dispatcher

from step37_lit.config import Step37Config
from step37_lit.megatron import cuda_names, process
from step37_lit.megatron.build import build_model
from step37_lit.megatron.layout import ParallelLayout

LAYOUTS = {
    "one rank": ParallelLayout(),
    "PP2": ParallelLayout(pipeline=2),
    "EP2": ParallelLayout(expert=2),
    "TP2+SP EP2 ETP2": ParallelLayout(tensor=2, expert=2, expert_tensor=2, sequence_parallel=True),
}


def piece(layout: ParallelLayout) -> None:
    """Two microbatches of a MoE model through megatron's DDP, schedule, clipping and distributed optimizer."""
    config = Step37Config.preset("tiny_moe")
    process.initialize(layout)
    with cuda_names.cpu_for_cuda():
        model = build_model(config, layout)
        ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True)
        ddp = DistributedDataParallel(model.config, ddp_config, model)
        optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, use_distributed_optimizer=True), [ddp])
        model.config.finalize_model_grads_func = finalize_model_grads
        row = torch.arange(16, 48).unsqueeze(0)

        def forward_step(iterator: object, chunk: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            loss = chunk(input_ids=row, labels=row.roll(-1, 1))
            return loss, lambda out: (out.sum(), torch.tensor(out.numel()), {})

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[ddp],
            num_microbatches=2,
            seq_length=row.numel(),
            micro_batch_size=1,
            forward_only=False,
        )
        ok, norm, _ = optimizer.step()
    if not ok or not norm > 0:
        raise AssertionError(f"optimizer step: successful {ok}, gradient norm {norm}")


def stand_ins() -> dict[str, tuple[object, str]]:
    """Every stand-in: name -> (owner, attribute) of what `install` replaces."""
    owners: dict[str, tuple[object, str]] = {f"torch.cuda.{n}": (torch.cuda, n) for n in cuda_names.TORCH_CUDA_NAMES}
    owners["random._get_cuda_rng_state"] = (tensor_parallel_random, "_get_cuda_rng_state")
    owners["mappings._gather_along_first_dim"] = (mappings, "_gather_along_first_dim")
    owners["token_dispatcher.maybe_move_tensor_to_cpu"] = (token_dispatcher, "maybe_move_tensor_to_cpu")
    return owners


def run_without(name: str | None) -> str:
    """ "ok" if the piece runs in every layout with one stand-in taken back, else the layout and the error."""
    for label, layout in LAYOUTS.items():
        ranks = layout.pipeline * layout.expert * layout.tensor
        with tempfile.TemporaryDirectory() as folder:
            children = [_fork(name, layout, rank, ranks, folder) for rank in range(ranks)]
            for child in children:
                os.waitpid(child, 0)
            results = [(Path(folder) / f"result{rank}").read_text() for rank in range(ranks)]
        errors = [result for result in results if result != "ok"]
        if errors:
            return f"{label}: {errors[0]}"
    return "ok"


def _fork(name: str | None, layout: ParallelLayout, rank: int, ranks: int, folder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        store = dist.FileStore(f"{folder}/store", ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=20))
        if name is not None:
            _leave_out(name)
        piece(layout)
        result = "ok"
    except BaseException as error:  # the child reports whatever it died of
        result = f"{type(error).__name__}: {error}".splitlines()[0]
    Path(folder, f"result{rank}").write_text(result)
    os._exit(0)


def _leave_out(name: str) -> None:
    if name == "cpu_for_cuda":
        cuda_names._CpuForCuda.__torch_function__ = lambda self, func, types, args=(), kwargs=None: func(
            *args, **(kwargs or {})
        )
        return
    owner, attribute = stand_ins()[name]
    original, install = vars(owner)[attribute], cuda_names.install

    def install_but_one() -> None:
        install()
        setattr(owner, attribute, original)

    cuda_names.install = install_but_one


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = [None, "cpu_for_cuda", *stand_ins()]
    json.dump({name or "nothing": run_without(name) for name in names}, sys.stdout, indent=1)
