"""How the hub's tensors become the weights of `Step37Model`, and back.

Small pure functions over whole tensors; gradients convert as the weights do.

H = hidden, F = inner width, N = query heads, G = key/value heads, D = head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Conversion(Protocol):
    """Both directions between the hub's tensors of a row and our one weight."""

    def from_hub(self, tensors: Sequence[Tensor]) -> Tensor: ...

    def to_hub(self, weight: Tensor, shapes: Sequence[Shape]) -> list[Tensor]: ...

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape: ...


class Copy:
    """One tensor, the same on both sides."""

    def from_hub(self, tensors: Sequence[Tensor]) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hub(self, weight: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [weight]

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return shape


class GateUp:
    """gate [(E,) F, H] and up [(E,) F, H] -> [(E,) 2 F, H], gate first."""

    def from_hub(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=-2)

    def to_hub(self, weight: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return list(weight.chunk(2, dim=-2))

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        gate, _ = shapes
        return (*gate[:-2], 2 * gate[-2], gate[-1])


@dataclass(frozen=True)
class FuseQKV:
    """q [N D, H], k [G D, H], v [G D, H] -> [(N + 2 G) D, H] in megatron's order: for each of the G groups its N / G
    query heads, then its key, then its value. So a tensor rank's share is whole groups.

    Args:
        groups: Key/value heads (G).
    """

    groups: int

    def from_hub(self, tensors: Sequence[Tensor]) -> Tensor:
        by_group = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def to_hub(self, weight: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        sizes = [shape[0] // self.groups for shape in shapes]
        parts = weight.unflatten(0, (self.groups, -1)).split(sizes, dim=1)
        return [part.flatten(0, 1) for part in parts]

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


COPY = Copy()
GATE_UP = GateUp()
