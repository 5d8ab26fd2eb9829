"""x @ weight.T: by groups of rows, and with a weight that was laid out once for the kernels of a CPU.

n = rows, E = experts, I = inputs, O = outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Laying out costs as much as a few steps, and a single row is slower by it (benchmarks/LOG.md).
PACKED_ROWS = 8
# A smaller matrix stays in the processor's own cache, and a call of the packed kernel costs more.
PACKED_SIZE = 200_000


def grouped_matmul(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Each row with the matrix of its group: [n, I] sorted by group, [E, O, I], [E] int (rows of each) -> [n, O]."""
    ends = rows.to(device=x.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)


def matmul_of(weight: Tensor, packed: bool) -> Callable[..., Tensor]:
    """Function of `input` [..., I] that gives [..., O] without gradients, as megatron's linear layers call it.

    Args:
        weight: [O, I]; the function may keep a copy.
        packed: Lay a large weight out in oneDNN's blocks where it is fp32 on a CPU.
    """
    weight = weight.detach()
    if not (packed and _can_pack(weight) and weight.numel() >= PACKED_SIZE):
        return lambda input, **unused: F.linear(input, weight)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)

    def multiply(input: Tensor, **unused: Any) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, blocks, None, "none", [], "")

    return multiply


def grouped_matmul_of(*weights: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`grouped_matmul` for these weights [E, O, I]; on a CPU in fp32 matrix by matrix, large ones packed."""
    if not all(_can_pack(weight) for weight in weights):
        return grouped_matmul
    blocks = {id(weight): [matmul_of(matrix, packed=True) for matrix in weight] for weight in weights}

    def multiply(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        parts = zip(blocks[id(weight)], x.split(rows.tolist()), strict=True)
        return torch.cat([x.new_empty(0, weight.shape[1]), *(of(part) for of, part in parts if part.shape[0])])

    return multiply


def _can_pack(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
