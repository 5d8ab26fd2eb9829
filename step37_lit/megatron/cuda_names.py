"""CUDA names that mean the CPU, so that unmodified megatron-core runs where there is no CUDA.

megatron-core is written for CUDA: it asks `torch.cuda` for the current device, for streams and for the generator's
state, and it makes small tensors on `device="cuda"`. On a machine without CUDA each of these raises. `install` gives
the names that megatron-core reaches a meaning on the CPU; nothing of megatron's code is changed, and where CUDA is
present `install` does nothing.

Why each stand-in is there (megatron-core 0.16; `tests/test_cuda_names.py` runs a piece of megatron with and without):

* `torch.cuda.current_device` answers `torch.device("cpu")`: router buffers, DDP's gradient buffers and pipeline
  receives are made there. A device and not a number, so that it also works inside `backward`, where no torch function
  mode is active.
* `torch.cuda.Stream`, `current_stream`: DDP's gradient reduction and the MoE dispatcher put copies on side streams; the
  CPU has one.
* `torch.cuda.synchronize`: pipeline stages wait for the device when they exchange shapes.
* `torch.cuda.get_rng_state`: the tensor-parallel random-number tracker reads the device's generator.
* `tensor_parallel.random._get_cuda_rng_state`: under sequence parallelism each block forks the tracker, which reads
  CUDA's default generators directly. (Writing is queued by torch until there is CUDA; the model draws no numbers.)
* `token_dispatcher.maybe_move_tensor_to_cpu`: splits of an all-to-all must be Python numbers; megatron leaves a CPU
  tensor as it is.
* `mappings._gather_along_first_dim`: the ranks that share an expert's matrices gather different numbers of tokens,
  which gloo's all-gather refuses; an all-to-all takes them.

`cpu_for_cuda` is the context for what no attribute can reach: literal `device="cuda"` and `Tensor.type()` in
megatron's schedules, gradient clipping and optimizer. It is entered around those calls only, so that a user's own
`device="cuda"` still fails loudly on a machine that has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _Stream:
    """The one stream of the CPU: everything on it has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self) -> _Stream:
        return self  # an event is only ever waited for


_STREAM = _Stream()


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _as_number_or_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron's `maybe_move_tensor_to_cpu` for tensors that are there already."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor


def _gather_along_first_dim(
    rows: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """megatron's function of this name; a buffer that is kept for the output would save nothing here."""
    ranks = group.size()
    if ranks == 1:
        return rows
    sizes = [len(rows)] * ranks if output_split_sizes is None else output_split_sizes
    output = rows.new_empty((sum(sizes), *rows.shape[1:]))
    if output_split_sizes is None:
        dist.all_gather_into_tensor(output, rows.contiguous(), group=group)
    else:
        dist.all_to_all_single(output, torch.cat([rows] * ranks), sizes, [len(rows)] * ranks, group=group)
    return output


TORCH_CUDA_NAMES: dict[str, Any] = {
    "current_device": lambda: CPU,
    "Stream": _Stream,
    "current_stream": lambda *args: _STREAM,
    "synchronize": lambda *args: None,
    "get_rng_state": _get_rng_state,
}


def install() -> None:
    """Makes the names of the table above mean the CPU; does nothing where CUDA is present. May be called again."""
    if torch.cuda.is_available():
        return
    for name, stand_in in TORCH_CUDA_NAMES.items():
        setattr(torch.cuda, name, stand_in)

    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    random._get_cuda_rng_state = _get_rng_state
    mappings._gather_along_first_dim = _gather_along_first_dim
    token_dispatcher.maybe_move_tensor_to_cpu = _as_number_or_numpy


class _CpuForCuda(TorchFunctionMode):
    """`device="cuda"` becomes the CPU, `Tensor.cuda()` the identity, `Tensor.type()` the name of the CUDA type."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        device = kwargs.get("device")
        if device is not None and (device == "cuda" or (isinstance(device, torch.device) and device.type == "cuda")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


@contextlib.contextmanager
def cpu_for_cuda() -> Iterator[None]:
    """Around calls into megatron that name the device "cuda"; does nothing where CUDA is present."""
    if torch.cuda.is_available():
        yield
        return
    with _CpuForCuda():
        yield


def native_names() -> contextlib.AbstractContextManager:
    """Inside `cpu_for_cuda`, around the model's own forward: it names no device, and is spared the detour of each of
    its operations through the mode (3,400 in a step of the tiny model)."""
    return contextlib.nullcontext() if torch.cuda.is_available() else torch._C.DisableTorchFunction()
