"""What autograd keeps, for the benchmarks of freezing and recomputation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def kept_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of the tensors that `run` saves for its backward pass; the model's weights, which are there anyway, are not
    counted, and a storage of several tensors is counted once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in saved.values())
