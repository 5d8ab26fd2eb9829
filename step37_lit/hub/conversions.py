"""How the hub's tensors become the weights of `Step37Model`, and back.

A conversion is a layout: where in our fused weight the elements of each hub tensor stand. So both directions are
copies through the same views, of whole tensors or of a rank's share, and gradients convert as the weights do.

H = hidden, F = inner width, N = query heads, G = key/value heads, D = head_dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]


class Conversion(ABC):
    """Where the hub's tensors of a row stand in our one weight."""

    @abstractmethod
    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of our weight made of hub tensors of `shapes`."""

    @abstractmethod
    def views(self, fused: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """For each hub tensor a view of `fused` with its elements in its order (its shape, or its first dimension
        split in two)."""

    def from_hub(self, tensors: Sequence[Tensor]) -> Tensor:
        """Our weight, a new tensor of the first one's dtype."""
        shapes = [tuple(tensor.shape) for tensor in tensors]
        fused = tensors[0].new_empty(self.fused_shape(shapes))
        for view, tensor in zip(self.views(fused, shapes), tensors, strict=True):
            view.copy_(tensor.reshape(view.shape))
        return fused

    def to_hub(self, fused: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """The hub's tensors; views of `fused` where they can be."""
        return [view.reshape(shape) for view, shape in zip(self.views(fused, shapes), shapes, strict=True)]


class Copy(Conversion):
    """One tensor, the same on both sides."""

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        (shape,) = shapes
        return tuple(shape)

    def views(self, fused: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [fused]


class GateUp(Conversion):
    """gate [(E,) F, H] and up [(E,) F, H] -> [(E,) 2 F, H], gate first."""

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        gate, _ = shapes
        return (*gate[:-2], 2 * gate[-2], gate[-1])

    def views(self, fused: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return list(fused.chunk(2, dim=-2))


@dataclass(frozen=True)
class FuseQKV(Conversion):
    """q [N D, H], k [G D, H], v [G D, H] -> [(N + 2 G) D, H] in megatron's order: for each of the G groups its N / G
    query heads, then its key, then its value. So a tensor rank's share is whole groups.

    Args:
        head_dim: Channels of a head (D).
    """

    head_dim: int

    def fused_shape(self, shapes: Sequence[Shape]) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def views(self, fused: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        groups = shapes[1][0] // self.head_dim
        sizes = [shape[0] // groups for shape in shapes]
        return list(fused.unflatten(0, (groups, -1)).split(sizes, dim=1))


COPY = Copy()
GATE_UP = GateUp()
