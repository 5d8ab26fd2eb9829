"""Vision data parallelism: the images of a pack, spread over the ranks that share it.

The tower and the projector are the same on every tensor and context rank. Each of them encodes a share of a pack's
images and gathers the features of the others, so no image is encoded twice. A rank's gradient of the tower is that of
its own images: data parallelism adds them up over the context ranks, `sum_gradients` over the tensor ranks.

N = images of an entry, P = features of an image, D = their channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from step37_lit.batch import ImageForInsert
from step37_lit.config import VisionConfig
from step37_lit.megatron.shares import balanced


class SpreadImages:
    """Who encodes which images of a pack; every rank that shares the pack makes the same plan from their sizes.

    Args:
        images: Entries of the pack, pixels or features.
        vision: Tells how many features an image becomes.

    Attributes:
        own: Entries with the images of this rank, in their order; maybe none.
    """

    def __init__(self, images: Sequence[ImageForInsert], vision: VisionConfig):
        self._group = parallel_state.get_tensor_and_context_parallel_group()
        self._rank, self._ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.own: list[ImageForInsert] = list(images)
        if self._ranks == 1:
            return
        self._shapes = [(entry.num_images, _num_features(entry, vision)) for entry in images]
        costs = [_cost(entry) for entry in images for _ in range(entry.num_images)]
        self._owners = balanced(costs, self._ranks)
        by_entry = torch.tensor(self._owners).split([number for number, _ in self._shapes])
        rows = [(owners == self._rank).nonzero().squeeze(1) for owners in by_entry]
        self.own = [_rows(entry, own) for entry, own in zip(images, rows, strict=True) if own.numel()]

    def gather(self, own: list[Tensor], like: Tensor, trains: bool) -> list[Tensor]:
        """Features of all images from every rank's own.

        Args:
            own: [N, P, D] of each entry in `self.own`.
            like: Of the features' dtype and device and of D rows, such as the projector's weight: a rank may have no
                images.
            trains: Whether the features need a gradient on any rank, the same answer on all.

        Returns:
            [N, P, D] of each entry of the pack. Tensor ranks must go on with them in the same way, context ranks may
            each use its own part of them.
        """
        if self._ranks == 1:
            return own
        sizes = [size for number, size in self._shapes for _ in range(number)]
        held = [0] * self._ranks  # features of each rank, and so far the place of its next image
        firsts = []
        for owner, size in zip(self._owners, sizes, strict=True):
            firsts.append(held[owner])
            held[owner] += size
        longest = max(held)
        rows = torch.cat([like.new_empty((0, like.shape[0])), *(features.flatten(0, 1) for features in own)])
        if len(rows) != held[self._rank]:
            raise ValueError(f"features of this rank's images: expected {held[self._rank]}, found {len(rows)}")
        padded = F.pad(rows, (0, 0, 0, longest - len(rows)))
        # A rank without images has nothing that needs a gradient, but must take part in the backward's collective.
        anchor = torch.empty(0, device=like.device, requires_grad=trains)
        gathered = _GatherFeatures.apply(padded, anchor, self._group)
        places = [owner * longest + first for owner, first in zip(self._owners, firsts, strict=True)]
        index = torch.cat([torch.arange(place, place + size) for place, size in zip(places, sizes, strict=True)])
        flat = gathered.index_select(0, index.to(like.device))
        parts = flat.split([number * size for number, size in self._shapes])
        return [part.unflatten(0, shape) for part, shape in zip(parts, self._shapes, strict=True)]


@torch.no_grad()
def sum_gradients(modules: Iterable[nn.Module | None]) -> None:
    """Adds up, over the tensor ranks, the gradients in megatron's buffers of modules that saw other images on each."""
    group = parallel_state.get_tensor_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return
    for module in modules:
        for parameter in module.parameters() if module is not None else ():
            if parameter.requires_grad:
                # One by one and in place: a flat copy of the tower's gradients would be gigabytes.
                dist.all_reduce(parameter.main_grad, group=group)  # type: ignore[attr-defined]


def _num_features(entry: ImageForInsert, vision: VisionConfig) -> int:
    if entry.image_features is not None:
        return entry.image_features.shape[1]
    assert entry.images is not None
    return vision.num_tokens(*entry.images.shape[-2:])


def _cost(entry: ImageForInsert) -> int:
    """Pixels of one image: the tower's work is nearly proportional to them."""
    return 0 if entry.images is None else entry.images.shape[-2] * entry.images.shape[-1]


def _rows(entry: ImageForInsert, rows: Tensor) -> ImageForInsert:
    if len(rows) == entry.num_images:
        return entry
    if entry.rope_cu_seqlens is not None:
        raise ValueError("rope_cu_seqlens: expected None where ranks share the images of an entry, found borders")

    def chosen(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))

    return dataclasses.replace(entry, images=chosen(entry.images), image_features=chosen(entry.image_features))


class _GatherFeatures(torch.autograd.Function):
    """[longest, D] -> [ranks x longest, D]; the gradients of tensor ranks are equal, those of context ranks add up."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, anchor: Tensor, group: ProcessGroup) -> Tensor:
        ctx.rank, ctx.longest = dist.get_rank(group), len(padded)
        gathered = padded.new_empty((dist.get_world_size(group) * len(padded), padded.shape[1]))
        dist.all_gather_into_tensor(gathered, padded.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        context = parallel_state.get_context_parallel_group()
        if dist.get_world_size(context) > 1:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(gradient, group=context)
        return gradient[ctx.rank * ctx.longest :][: ctx.longest], None, None
