"""Counts what autograd keeps for the backward pass: bytes by storage, now and at the peak."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class SavedTensors:
    """A context in which the tensors that autograd saves are counted, each storage once.

    Storages of `apart` (parameters, the batch) are not counted: they are held anyway.

    Attributes:
        live: Bytes that are kept now.
        peak: Largest `live` so far.
        by_module: Bytes first saved inside each module of `watch`, summed over its runs.
    """

    def __init__(self, apart: Iterable[Tensor] = ()):
        self.live = self.peak = 0
        self.by_module: Counter[str] = Counter()
        self.tensors: list[tuple[str, tuple[int, ...], torch.dtype, int]] = []
        self._apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self._users: Counter[int] = Counter()
        self._inside: list[str] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def watch(self, module: nn.Module) -> None:
        """Attributes what is saved to the innermost submodule that runs."""
        for name, part in module.named_modules():
            part.register_forward_pre_hook(lambda module, args, name=name: self._inside.append(name))
            part.register_forward_hook(self._leave, always_call=True)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key == 0 or key in self._apart:
            return tensor
        if self._users[key] == 0:
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            name = self._inside[-1] if self._inside else ""
            self.by_module[name] += storage.nbytes()
            self.tensors.append((name, tuple(tensor.shape), tensor.dtype, storage.nbytes()))
        self._users[key] += 1
        held = _Held(tensor)
        weakref.finalize(held, self._release, key, storage.nbytes())
        return held

    def _unpack(self, held: Any) -> Tensor:
        return held.tensor if isinstance(held, _Held) else held

    def _release(self, key: int, nbytes: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            self.live -= nbytes


class _Held:
    """A saved tensor; goes when the graph lets go of it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
