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
* `mappings._gather_along_first_dim`, `_reduce_scatter_along_first_dim`: the ranks that share an expert's matrices have
  different numbers of tokens, and gloo refuses an all-gather of different sizes. An all-to-all takes them.

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
_MAPPINGS: dict[str, Any] = {}  # megatron's own functions, by name


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
    input_: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """megatron's function of this name; rows of each rank as many as `output_split_sizes` says."""
    if output_split_sizes is None or group.size() == 1:
        return _MAPPINGS["_gather_along_first_dim"](input_, group, output_split_sizes, use_global_buffer)
    output = input_.new_empty((sum(output_split_sizes), *input_.shape[1:]))
    same = input_.contiguous().repeat(group.size(), *(1 for _ in input_.shape[1:]))
    dist.all_to_all_single(output, same, output_split_sizes, [len(input_)] * group.size(), group=group)
    return output


def _reduce_scatter_along_first_dim(
    input_: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
) -> torch.Tensor:
    """megatron's function of this name; each rank gets as many rows as `input_split_sizes` says, summed over ranks."""
    if input_split_sizes is None or group.size() == 1:
        return _MAPPINGS["_reduce_scatter_along_first_dim"](input_, group, input_split_sizes, use_global_buffer)
    own = input_split_sizes[group.rank()]
    parts = input_.new_empty((group.size() * own, *input_.shape[1:]))
    dist.all_to_all_single(parts, input_.contiguous(), [own] * group.size(), input_split_sizes, group=group)
    return parts.unflatten(0, (group.size(), own)).sum(dim=0)


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
    for stand_in in (_gather_along_first_dim, _reduce_scatter_along_first_dim):
        _MAPPINGS.setdefault(stand_in.__name__, getattr(mappings, stand_in.__name__))
        setattr(mappings, stand_in.__name__, stand_in)
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
