"""x @ weight.T without gradients, with the weight laid out once for the kernels of the device.

n = rows, E = experts, I = inputs, O = outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 16  # what the layout is made for; measured to be as good from 1 to 2,000 rows


def grouped_matmul(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Each row with the matrix of its group: [n, I] sorted by group, [E, O, I], [E] int (rows of each) -> [n, O]."""
    ends = rows.to(device=x.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def matmul_of(weight: Tensor) -> Callable[..., Tensor]:
    """Function of `input` [..., I] that gives [..., O], for a weight [O, I] that does not change any more.

    On a CPU oneDNN's blocked layout halves the time of few rows in fp32 (see benchmarks/LOG.md); it is a copy.
    """
    weight = weight.detach()
    if not _can_pack(weight):
        return lambda input, **_: F.linear(input, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)

    def multiply(input: Tensor, **unused: Any) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, packed, None, "none", [], "")

    return multiply


def grouped_matmul_of(*weights: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`grouped_matmul` for weights [E, O, I] that do not change any more."""
    if not all(_can_pack(weight) for weight in weights):
        return grouped_matmul
    packed = {id(weight): [matmul_of(matrix) for matrix in weight] for weight in weights}

    def multiply(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        parts = zip(packed[id(weight)], x.split(rows.tolist()), strict=True)
        return torch.cat([x.new_empty(0, weight.shape[1]), *(of(part) for of, part in parts if len(part))])

    return multiply


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
